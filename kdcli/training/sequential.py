"""``train_sequence``: one teacher after the other, each stage's student the next one's start (P3 section 4.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.console import console
from kdcli.errors import UsageError
from kdcli.files import write_json
from kdcli.methods.base import find_method
from kdcli.training.config import StudentConfig
from kdcli.training.distributed import Ranks, join_ranks
from kdcli.training.gains import (
    measure_stages,
    teachers_on_test,
)
from kdcli.training.out import require_folder
from kdcli.training.result import TrainResult
from kdcli.training.rundir import (
    adopt,
    begin,
    finished_result,
    require_same_identity,
    stage_folder,
)
from kdcli.training.sources import Sources
from kdcli.training.stages import Stages, arrange, ranking_of, stage_config
from kdcli.training.start import NEAREST_SOURCE
from kdcli.training.train import train_student
from kdcli.types import Ranking


def train_sequence(config: StudentConfig, *, ranking: Ranking | None = None) -> TrainResult:
    """Train one stage a teacher, or go on with them; each is a run of its own in OUT/stage-K-TEACHER.

    A stage starts from the export of the one before, which is so also what its method takes for the student
    before training (P3's frozen student); optimiser, schedule, order and seeds are those of a new run. The
    student of the last stage becomes OUT's. Teachers, options and data are checked for all stages before the first.

    Args:
        config: with ``sequential``.
        ranking: the value of what ``config.ranking`` names; its scores then give the order.

    Returns:
        The result of the last stage as that of a run in OUT, over all stages: ``history`` and ``seconds``. In its
        details, ``sequential`` has the order and what gave it, ``stages`` and ``original`` what
        :func:`kdcli.training.gains.measure_stages` found on the test data.

    Raises:
        UsageError: the method does not learn from one teacher a run, or another option contradicts stages.
        OutputExistsError: OUT holds another run, or another sequence.
        StoppedEarly: a signal arrived; the same call goes on.
        KdError: see :func:`kdcli.training.train.train_student`.
    """
    _require_possible(config)
    with join_ranks(config.device) as ranks, ranks.company():  # the stages meet in the same group
        before, console.silent = console.silent, not ranks.first
        try:
            return _train(config, ranking, ranks)
        finally:
            console.silent = before


def _require_possible(config: StudentConfig) -> None:
    method = find_method(config.method)
    needs = method.needs_of(config.options)
    contradictions = {
        f"{method.name} reads no teacher": not needs.kinds,
        f"{method.name} starts from its generalist": needs.generalist,
        f"{method.name} learns from several data sets": needs.sets,
        "--lr-grid makes a grid of runs": config.lr_grid is not None,
        "--train-from starts from a cached teacher": config.train_from is not None,
        "--init nearest-source starts from a cached teacher": config.init == NEAREST_SOURCE,
    }
    for reason, found in contradictions.items():
        if found:
            raise UsageError(
                f"--sequential trains one student from one teacher after the other, but {reason}",
                "Leave one of the two out.",
            )


def _train(config: StudentConfig, ranking: Ranking | None, ranks: Ranks) -> TrainResult:
    out = config.out.absolute()
    with ranks.one_fate():
        require_folder(out)
        sources = Sources()
        sequence = arrange(config, ranking, ranks.world, sources)
        if not config.overwrite:
            require_same_identity(out, sequence.identity())
        stored = None if config.overwrite else finished_result(out)
        lone = [sources.cache((path,), config) for path in config.cache]
        if stored is not None and _complete(stored):
            console.note(f"{out} is finished; nothing to do")
            return TrainResult.from_document(stored)
        predicted = teachers_on_test(sequence.first, sequence.records, lone)
    if stored is not None:
        return _measured_late(sequence, stored, predicted, ranks)
    _tell(sequence)
    with ranks.one_fate():
        if ranks.first:
            begin(sequence.whole(), sequence.identity())
    results, init = [], config.init
    for number, name in enumerate(sequence.plans, 1):
        console.note(f"stage {number} of {len(sequence.plans)}: teacher '{name}'")
        stage = stage_config(config, sequence.training, name, stage_folder(out, number, name), init)
        stage = stage.model_copy(update={"amp": sequence.first.precision.amp})  # as the sequence was begun
        results.append(train_student(stage, ranking=ranking_of(ranking, config, name)))
        init = f"local-dir:{results[-1].out}/export"
    return _finish(sequence, results, predicted, ranks)


def _complete(stored: Mapping[str, Any]) -> bool:
    """Whether a finished sequence lacks nothing that could still be measured."""
    return stored["test"] is None or all(stage.get("teacher_top1") is not None for stage in stored["stages"])


def _measured_late(
    sequence: Stages, stored: Mapping[str, Any], predicted: Mapping[str, Any], ranks: Ranks
) -> TrainResult:
    """A finished sequence, with the gain of teachers whose outputs on the test data were cached since."""
    out = sequence.config.out.absolute()
    lacking = [stage["teacher"] for stage in stored["stages"] if stage.get("teacher_top1") is None]
    if not set(lacking) & set(predicted):
        console.note(f"{out} is finished; nothing to do")
        return TrainResult.from_document(stored)
    with ranks.one_fate():
        if ranks.first:
            folders = [stage_folder(out, number, name) for number, name in enumerate(sequence.plans, 1)]
            measured = _measure(sequence, folders, predicted)
            write_json(out / "result.json", {**stored, **measured})
    return _stored(out, ranks)


def _finish(
    sequence: Stages, results: Sequence[TrainResult], predicted: Mapping[str, Any], ranks: Ranks
) -> TrainResult:
    out, last = sequence.config.out.absolute(), results[-1]
    folders = [Path(result.out) for result in results]
    with ranks.one_fate():
        if ranks.first:
            details = {
                **last.details,
                "init": results[0].details["init"],
                "weights": sequence.weights,
                "teachers": {name: record.id for name, record in sequence.records.items()},
                "sequential": {**sequence.order(), "by": sequence.by, "scores": dict(sequence.scores)},
                **_measure(sequence, folders, predicted),
            }
            history = [
                {**epoch, "stage": number}
                for number, result in enumerate(results, 1)
                for epoch in result.history
            ]
            whole = replace(
                last,
                out=str(out),
                epochs=sum(result.epochs for result in results),
                history=tuple(history),
                seconds=sum(result.seconds for result in results),
                details=details,
            )
            adopt(out, folders[-1], whole.document())
    return _stored(out, ranks)


def _stored(out: Path, ranks: Ranks) -> TrainResult:
    """The result that the first process wrote."""
    first, *_ = ranks.gather(finished_result(out) if ranks.first else None)
    assert first is not None  # it was written just now
    return TrainResult.from_document(first)


def _measure(sequence: Stages, folders: Sequence[Path], predicted: Mapping[str, Any]) -> dict[str, Any]:
    found = measure_stages(
        sequence.first, list(sequence.plans), [folder / "export" for folder in folders], predicted
    )
    for stage, folder in zip(found["stages"], folders, strict=True):
        stage["out"] = str(folder)
    return found


def _tell(sequence: Stages) -> None:
    scores = sequence.scores
    stages = ", ".join(f"{name} {scores[name]:.4f}" if name in scores else name for name in sequence.plans)
    console.note(
        f"{len(sequence.plans)} stages, {sequence.config.sequential}"
        f"{f' by {sequence.by}' if sequence.by else ''}: {stages}"
    )
