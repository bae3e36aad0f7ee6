"""Which students there are to train, each with its plan: all of them are refused, or none."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from kdcli.console import console
from kdcli.errors import DivergedError, KdError, OutputExistsError
from kdcli.files import is_occupied
from kdcli.training.config import StudentConfig
from kdcli.training.evaluate import heads_to_test
from kdcli.training.fit import known_divergence
from kdcli.training.out import require_folder
from kdcli.training.plan import Plan
from kdcli.training.resolve import make_plan
from kdcli.training.result import TrainResult
from kdcli.training.rundir import (
    finished_result,
    forget_checkpoints,
    has_begun,
    read_pins,
    require_same_run,
)
from kdcli.training.sources import Sources
from kdcli.training.tracking import require_trackers
from kdcli.types import Ranking

Outcome = TypeVar("Outcome")
LONE = ""
"""Name of a student that is trained by itself."""


def for_each(names: Iterable[str], function: Callable[[str], Outcome]) -> dict[str, Outcome]:
    """Results by name; or the first of all errors, its message telling all of them and whose they are."""
    results: dict[str, Outcome] = {}
    errors: dict[str, tuple[KdError, list[str]]] = {}
    for name in names:
        try:
            results[name] = function(name)
        except KdError as error:
            errors.setdefault(error.message, (error, []))[1].append(name)
    if not errors:
        return results
    first = next(iter(errors.values()))[0]
    first.message = "; ".join(
        message if LONE in wrong else f"student {', '.join(repr(name) for name in wrong)}: {message}"
        for message, (_, wrong) in errors.items()
    )
    first.args = (first.message,)
    raise first


def decide(
    name: str, config: StudentConfig, ranking: Ranking | None, sources: Sources, processes: int
) -> Plan:
    """The plan of a student, whose folder is free for it or holds this very run."""
    require_folder(config.out)
    require_trackers(config.tracker)
    anew = config.overwrite and name == LONE
    plan = make_plan(config, ranking, None if anew else read_pins(config.out), processes, sources)
    heads_to_test(plan)  # refuses unsuitable test data before training rather than after it
    if anew:
        return plan
    try:
        require_same_run(plan)
    except OutputExistsError as error:
        if not has_begun(config.out) and not is_occupied(config.out):
            console.note(
                f"{config.out}: a run of other settings died there before its first checkpoint; this one starts over"
            )
            return make_plan(config.model_copy(update={"overwrite": True}), ranking, None, processes, sources)
        if not config.overwrite:
            if name != LONE:
                error.hint = (
                    "Give the changed student another name, or add --overwrite: it starts anew only those whose "
                    "folder holds another run."
                )
            raise
        return make_plan(config, ranking, None, processes, sources)
    return replace(plan, config=plan.config.model_copy(update={"overwrite": False}))


def known_outcome(name: str, plan: Plan) -> TrainResult | DivergedError | None:
    """How a run ended that needs no more training; None where it does."""
    out = plan.config.out
    if plan.config.overwrite:
        return None
    if (stored := finished_result(out)) is not None:
        forget_checkpoints(out)
        console.note(f"{out} is finished; nothing to do")
        return TrainResult.from_document(stored)
    error = None if name == LONE else known_divergence(out)
    if error is not None:
        console.warn(f"student '{name}' was given up before: {error.message}")
    return error
