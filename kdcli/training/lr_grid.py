"""``train_grid``: choose the learning rate on a validation split, then train with it (P1 appendix A's experts)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from kdcli.console import console
from kdcli.documents import from_document, to_document
from kdcli.errors import DivergedError, OutputExistsError, UsageError
from kdcli.files import storage_errors, write_json
from kdcli.reading import read_json, require_inside
from kdcli.training.config import StudentConfig, learning_rates
from kdcli.training.out import GRID, require_folder
from kdcli.training.result import TrainResult
from kdcli.training.rundir import remove_run
from kdcli.training.scores import JUDGED, MAIN, main_score
from kdcli.training.sources import Sources
from kdcli.training.train import train_student
from kdcli.training.validation import ON_TEST
from kdcli.types import Ranking, differences


@final
@dataclass(frozen=True, slots=True)
class _Identity:
    rates: tuple[float, ...]
    validation: float | None
    select: str


@final
@dataclass(frozen=True, slots=True)
class _Grid:
    """grid.json."""

    identity: _Identity
    diverged: list[float]


def train_grid(
    config: StudentConfig, *, ranking: Ranking | None = None, sources: Sources | None = None
) -> TrainResult:
    """Train one student per learning rate, judge each on the validation split, and train with the best one.

    The runs of the grid are in OUT/lr-RATE; each is a run of its own that resumes by itself. With
    ``--select last`` the result is a new run in OUT at the best rate, on all data, the validation split
    included. With ``--select best`` it is trained again as in the grid, for no split would be left to select an
    epoch by. Only this last run sees ``--test``. A rate that diverges is out; of equals the smaller rate wins.

    Args:
        config: with ``lr_grid`` and ``validation``.
        ranking: the value of what ``config.ranking`` names.
        sources: opens data and caches; default: as they are named.

    Returns:
        The result of the last run; ``grid`` in its details holds rate, validation accuracy and epoch of each.

    Raises:
        UsageError: there is no validation split, or ``--lr`` is given as well.
        OutputExistsError: OUT holds another grid.
        DivergedError: every rate diverged.
        KdError: see :func:`kdcli.training.train.train_student`.
    """
    if config.lr_grid is None or config.validation is None:
        raise UsageError(
            "--lr-grid needs a validation split to choose by; a test set never selects",
            "Add --validation 0.2.",
        )
    if config.select == ON_TEST:
        raise UsageError(
            f"--lr-grid chooses on a validation split, and --select {ON_TEST} on the test data",
            "Use --select best, or give one --lr.",
        )
    if config.lr is not None:
        raise UsageError(f"--lr {config.lr:g} and --lr-grid {config.lr_grid}", "Give one of them.")
    rates = learning_rates(config.lr_grid)
    require_folder(config.out)
    diverged = _begin(config, rates)
    judged = []
    for number, rate in enumerate(rates, 1):
        console.note(f"learning rate {rate:g} ({number} of {len(rates)})")
        judged.append(_judge(config, rate, ranking, diverged, sources))
    best = max(judged, key=lambda found: (_score(found), -found["lr"]))
    if _score(best) == float("-inf"):
        raise DivergedError(
            f"all of the learning rates {config.lr_grid} diverged",
            "Choose smaller ones, and add --overwrite.",
        )
    console.note(f"best learning rate {best['lr']:g}: {_score(best):.4f} on the validation split")
    result = train_student(_last(config, best["lr"]), ranking=ranking, sources=sources)
    result = replace(result, details={**result.details, "grid": judged})
    write_json(Path(result.out) / "result.json", result.document())
    return result


def _begin(config: StudentConfig, rates: tuple[float, ...]) -> list[float]:
    """Mark OUT as this grid's; the rates that are known to diverge."""
    place = config.out / GRID
    identity = _Identity(rates, config.validation, config.select)
    if place.is_file() and config.overwrite:
        for rate in _read(place).identity.rates:
            folder = require_inside(_folder(config, rate), config.out, place)
            remove_run(folder)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        with storage_errors(place):
            place.unlink()
    if not place.is_file():
        if (config.out / "run.json").is_file() and not config.overwrite:
            raise OutputExistsError(
                f"--out {config.out} holds a run without --lr-grid",
                "Choose another --out, or add --overwrite to start anew.",
            )
        with storage_errors(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
        write_json(place, to_document(_Grid(identity, [])))
    grid = _read(place)
    found = differences(to_document(grid.identity), to_document(identity))
    if found:
        raise OutputExistsError(
            f"--out {config.out} holds another grid: {'; '.join(map(str, found))}",
            "Choose another --out, or add --overwrite to start anew.",
        )
    return grid.diverged


def _read(place: Path) -> _Grid:
    return from_document(_Grid, read_json(place), place)


def _judge(
    config: StudentConfig,
    rate: float,
    ranking: Ranking | None,
    diverged: list[float],
    sources: Sources | None,
) -> dict[str, Any]:
    folder = _folder(config, rate)
    if rate not in diverged:
        changes = {"lr": rate, "lr_grid": None, "out": folder, "test": None, "overwrite": False}
        try:
            result = train_student(config.model_copy(update=changes), ranking=ranking, sources=sources)
        except DivergedError as error:
            console.warn(f"learning rate {rate:g} diverged: {error.message}")
            diverged.append(rate)
            grid = replace(_read(config.out / GRID), diverged=diverged)
            write_json(config.out / GRID, to_document(grid))
        else:
            found = result.details["validation"]
            scores = {name: found[name] for name in JUDGED if name in found}
            return {"lr": rate, **scores, "epoch": found["epoch"], "out": str(folder)}
    return {"lr": rate, MAIN[config.multi_label is not None]: None, "epoch": None, "out": str(folder)}


def _score(judged: Mapping[str, Any]) -> float:
    """Minus infinity of a rate that diverged."""
    scores = {name: judged[name] for name in JUDGED if judged.get(name) is not None}
    return main_score(scores) if scores else float("-inf")


def _last(config: StudentConfig, rate: float) -> StudentConfig:
    changes: dict[str, Any] = {"lr": rate, "lr_grid": None}
    if config.select == "last":
        changes["validation"] = None
    return config.model_copy(update=changes)


def _folder(config: StudentConfig, rate: float) -> Path:
    return config.out / f"lr-{rate:g}"
