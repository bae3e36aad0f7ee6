"""The students of a report: table, accuracies, cost, curves, and the commands that made them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from kdcli.errors import ConfigError
from kdcli.metrics.intervals import of_seeds
from kdcli.models.folder import WEIGHTS_FILE
from kdcli.models.properties import cost_of
from kdcli.options.fields import StepConfig
from kdcli.options.resolving import command_line
from kdcli.registry import METHODS
from kdcli.reporting import charts
from kdcli.reporting.budgets import budget_of, interval_of, main_of, top1_of
from kdcli.reporting.cells import Cell, number, percent, word
from kdcli.reporting.charts import Costed, Spread
from kdcli.reporting.curves import accuracy_curves, fidelity_curves, training_curves
from kdcli.reporting.document import Chart, Column, Columns, Command, Fold, Notes, Part, Section, tabulate
from kdcli.reporting.material import Run
from kdcli.reporting.protocols import test_name
from kdcli.reporting.standing import comparable, contenders, seed_groups
from kdcli.training.config import StudentConfig
from kdcli.training.scores import MAIN

PANELS = 12
"""Curves in one chart."""
MOST_PANELS = 48
MOST_ROWS = 40
"""Names in one chart of accuracies."""
_TOP = 5  # the true class is always among the five most probable ones of so many
LOSSES = "Mean over each epoch's steps. Losses of different methods are different sums: compare shapes, not heights."
_PARTS = {"val": "validation", "test": "test"}


def _close(ordered: Sequence[Run]) -> bool:
    """Whether the second best lies in the interval of the best: no mark should call it more than chance."""
    known = [(score, interval_of(run)) for run in ordered if (score := top1_of(run)) is not None]
    return len(known) > 1 and known[0][1] is not None and known[0][1][0] <= known[1][0]


def students_section(runs: Sequence[Run], title: str, name: str) -> Section:
    """Runs of one test set.

    Args:
        runs: in the order given; the table is sorted by accuracy.
        title: of the section.
        name: of its files, different for each section.
    """
    ordered = sorted(runs, key=_rank)
    remarks = _remarks(ordered)
    columns: Columns = {
        (column if not (remarks or _close(ordered)) else replace(column, best=None)): cell
        for column, cell in _COLUMNS.items()
    } | {Column("Note", "note"): lambda run: word(_note(run) or remarks.get(run.name))}
    table = tabulate(name, ordered, columns)
    groups = seed_groups(ordered)
    parts: list[Part] = [*(_groups_parts(groups, name) if groups else []), table]
    tested = test_name(next((run for run in runs if test_name(run)), runs[0]))
    lines = [f"Tested on {tested}."] if tested else []
    lines += _warnings(runs)
    if lines:
        parts.append(Notes(tuple(lines)))
    known = [run for run in ordered if top1_of(run) is not None]
    if len(known) > 1 and not groups:
        rows = [charts.Reached(run.name, top1_of(run) or 0.0, interval_of(run)) for run in known[:MOST_ROWS]]
        left = len(known) - len(rows)
        parts.append(charts.accuracies(rows, f"{name}-accuracies"))
        if left:
            parts.append(Notes((f"The chart shows the best {MOST_ROWS}; {left} more are in the table.",)))
    cost = charts.accuracy_against_cost(
        [
            Costed(architecture_of(run).partition("[")[0], run.method, top1_of(run) or 0.0, *_cost(run))
            for run in known
        ],
        f"{name}-cost",
        "Accuracy against cost (P2 Fig. 5)",
    )  # fmt: skip
    if cost is not None:
        parts.append(cost)
    return Section(title, tuple(parts))


def _remarks(runs: Sequence[Run]) -> dict[str, str]:
    """Which of several tested runs may not be compared with the others, and why; then no best one is marked."""
    tested = [run for run in runs if main_of(run) is not None]
    if len(tested) < 2:
        return {}
    fair = {run.name for each in comparable(contenders(tested)) for run in each.runs}
    return {
        run.name: "epoch chosen on the test set: not compared"
        if run.result.get("selection") == "test"
        else "other budget: not compared"
        for run in tested
        if run.name not in fair
    }


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What results warn of, once each."""
    warned: dict[str, list[str]] = {}
    for run in runs:
        if warning := run.result.get("warning"):
            warned.setdefault(str(warning), []).append(run.name)
    return [
        f"{'All runs' if len(names) == len(runs) > 1 else ', '.join(names)}: {warning}."
        for warning, names in warned.items()
    ]


def _rank(run: Run) -> float:
    """Best first, untested ones last."""
    accuracy = main_of(run)
    return 1.0 if accuracy is None else -accuracy


def architecture_of(run: Run) -> str:
    """Its name."""
    return str(run.result.get("student") or run.identity.get("student") or run.config.get("student") or "?")


def _teachers(run: Run) -> list[str]:
    weights = run.result.get("weights") or run.identity.get("weights") or {}
    return [name for name, weight in weights.items() if weight > 0] or list(
        run.identity.get("teachers") or {}
    )


def _note(run: Run) -> str:
    return "" if run.finished else f"not finished: epoch {len(run.history)} of {_planned(run) or '?'}"


def _of(run: Run, *path: str) -> Any:
    """A number of a run's result by the keys that lead to it; None where it is not there."""
    found: Any = run.result
    for key in path:
        found = (found or {}).get(key)
    return found


_COLUMNS: Columns = {
    Column("Student", "name"): lambda run: word(run.name),
    Column("Method", "text", setting=True): lambda run: word(run.method),
    Column("Architecture", "text", setting=True): lambda run: word(architecture_of(run)),
    Column("Teachers", "text", setting=True): lambda run: Cell(
        ", ".join(_teachers(run)) or None, _few(_teachers(run))
    ),
    Column("Test top-1, %", best="high"): lambda run: percent(_of(run, "test", "top1")),
    Column("95 % interval", "text"): lambda run: _interval(run),
    Column("Test top-5, %"): lambda run: percent(
        _of(run, "test", "top5") if not 0 < _classes(run) <= _TOP else None
    ),
    Column("Test mAP, %", best="high"): lambda run: percent(_of(run, "test", "mAP")),
    Column("Labels right, %", best="high"): lambda run: percent(_of(run, "test", "label_accuracy")),
    Column("All labels right, %", best="high"): lambda run: percent(_of(run, "test", "exact_match")),
    Column("Test R2", best="high"): lambda run: number(_of(run, "test", "r2"), 3),
    Column("Validation R2"): lambda run: number(_of(run, "validation", "r2"), 3),
    Column("Validation mAP, %"): lambda run: percent(_of(run, "validation", "mAP")),
    Column("Validation top-1, %"): lambda run: percent(_of(run, "validation", "top1")),
    Column("Parameters, M", setting=True): lambda run: number(_cost(run)[0], 2, 1e6),
    Column("Multiply-adds, M", setting=True): lambda run: number(_cost(run)[1], 1, 1e6),
    Column("Size, MB", setting=True): lambda run: number(_bytes(run), 2, 1e6),
    Column("Images seen", setting=True): lambda run: number(budget_of(run).images, 0),
    Column("Epochs", setting=True): lambda run: number(_of(run, "epochs"), 0),
    Column("Seed", setting=True): lambda run: number(_of(run, "seed"), 0),
    Column("Training, s"): lambda run: number(_of(run, "seconds")),
}


def _planned(run: Run) -> int | None:
    """Epochs it will have, those of all stages of a sequence; None where they are not known."""
    epochs = run.identity.get("epochs") or run.config.get("epochs")
    stages = run.identity.get("sequential") or {}
    return epochs and int(epochs) * len(stages.get("teachers", [""]))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} teachers"


def _classes(run: Run) -> int:
    """How many there are; 0 where that is not recorded."""
    recorded = (run.identity.get("data"), run.identity.get("test"))
    known = (each for each in recorded if isinstance(each, Mapping) and "classes" in each)
    return next((int(each["classes"] or 0) for each in known), 0)


def _interval(run: Run) -> Cell:
    ends = interval_of(run)
    return word(None if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}")


def _bytes(run: Run) -> float | None:
    """Of the exported weights; of an export that is gone, four for each parameter."""
    weights = None if run.folder is None else run.folder / "export" / WEIGHTS_FILE
    if weights is not None and weights.is_file():
        return weights.stat().st_size
    parameters = _cost(run)[0]
    return None if parameters is None else 4 * parameters


def _cost(run: Run) -> tuple[int | None, int | None]:
    """Parameters and multiply-adds of its network; None for what no architecture of kd's tells."""
    architecture = architecture_of(run)
    classes = _classes(run)
    size = run.identity.get("image_size") or run.config.get("image_size")
    return _known_cost(architecture, classes, int(size) if size else None)


_known_cost = cache(cost_of)


# --- repeats ----------------------------------------------------------------------------------


def _groups_parts(groups: Mapping[str, Sequence[Run]], name: str) -> list[Part]:
    spread = [_spread_of(label, group) for label, group in groups.items()]
    spread.sort(key=lambda each: -each.mean)
    columns: Columns = {
        Column("Group", "name"): lambda each: word(each.name),
        Column("Test top-1, %, mean ± 95 %", best="high"): lambda each: percent(each.mean, each.half),
        Column("Std"): lambda each: percent(statistics.stdev(each.values) if len(each.values) > 1 else None),
        Column("Lowest"): lambda each: percent(min(each.values)),
        Column("Highest"): lambda each: percent(max(each.values)),
        Column("Runs"): lambda each: number(len(each.values), 0),
    }
    notes = (
        "Runs whose folders have the same name but for a number, of one method: the mean over them, and the 95 % "
        "interval of the mean (Student's t; few runs give a wide one).",
    )
    table = tabulate(f"{name}-groups", spread, columns, "Over seeds", notes)
    return [table, charts.spreads(spread, f"{name}-seeds", "", "a run", "mean, 95 % interval")]


def _spread_of(name: str, runs: Sequence[Run]) -> Spread:
    values = tuple(value for run in runs if (value := top1_of(run)) is not None)
    half = None
    if len(values) > 1:
        low, high = of_seeds(values)
        half = (high - low) / 2
    return Spread(name, values, statistics.fmean(values), half)


# --- curves and commands ----------------------------------------------------------------------


def curves_section(tests: Mapping[str, Sequence[Run]]) -> Section | None:
    """Losses with their parts, and accuracies, over the epochs.

    Args:
        tests: runs by what they were tested on; accuracies on different images do not share a chart.
    """
    histories = {run.name: run.history for runs in tests.values() for run in runs if run.history}
    if not histories:
        return None
    names = list(histories)
    drawn: list[Chart] = []
    for start in range(0, min(len(names), MOST_PANELS), PANELS):
        page = {name: histories[name] for name in names[start : start + PANELS]}
        drawn.append(training_curves(page, f"curves-{start // PANELS + 1}", LOSSES if not start else ""))
    fidelity = fidelity_curves({name: histories[name] for name in names[:PANELS]}, "fidelity-curves")
    parts: list[Part] = [drawn[0], *([fidelity] if fidelity else []), *_accuracy_charts(tests)]
    if len(drawn) > 1:
        parts.append(Fold(f"{min(len(names), MOST_PANELS) - PANELS} more runs", tuple(drawn[1:])))
    if len(names) > MOST_PANELS:
        parts.append(Notes((f"Curves of {len(names) - MOST_PANELS} more runs are not drawn.",)))
    return Section("Training", tuple(parts))


def _accuracy_charts(tests: Mapping[str, Sequence[Run]]) -> list[Chart]:
    """Validation and test accuracies over the epochs, a chart per test set."""
    found = []
    curves = [(f"{part}_{score}", title, score) for score in MAIN for part, title in _PARTS.items()]
    for key, title, score in curves:
        known = {
            test: {run.name: run.history for run in runs if any(key in epoch for epoch in run.history)}
            for test, runs in tests.items()
        }
        known = {test: histories for test, histories in known.items() if histories}
        for place, (test, histories) in enumerate(known.items(), 1):
            chosen = {name: histories[name] for name in list(histories)[:PANELS]}
            start = f"{title}-curves" if score == "top1" else f"{title}-mAP-curves"
            name = start if len(known) == 1 else f"{start}-{place}"
            where = f", tested on {test}" if len(known) > 1 and test else ""
            left = len(histories) - PANELS
            rest = f"; {left} more runs are left out" if left > 0 else ""
            chart = accuracy_curves(chosen, key, name)
            what = f"Top-1 {title} accuracy" if score == "top1" else f"Mean average precision ({title})"
            caption = f"{what} over the epochs{where}{rest}."
            found.append(replace(chart, caption=caption))
    return found


def run_commands(runs: Sequence[Run]) -> list[Command]:
    """The command of each run whose options are known."""
    return [
        Command(run.name, line, _seconds(run))
        for run in runs
        if run.config.get("method") in METHODS  # what a file names is not imported
        and (line := line_of(StudentConfig, run.config)) is not None
    ]  # fmt: skip


def _seconds(run: Run) -> float | None:
    seconds: Any = run.result.get("seconds")
    return None if seconds is None else float(seconds)


def line_of(kind: type[StepConfig], options: Mapping[str, Any]) -> str | None:
    """The shell command of recorded options; None where they are not known, or not those of this version."""
    if options.get("method", "") not in ("", *METHODS):  # an object that a file names is not imported
        return None
    try:
        return command_line(kind(**options)) if options else None
    except ConfigError:
        return None
