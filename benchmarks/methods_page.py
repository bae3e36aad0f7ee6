"""The page of methods.py: intervals, verdicts, tables; its prose is methods_page.md."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods_place import IMAGENET, LETTERS, SIDE, TAP, Plan, Task
from scipy.stats import t as student_t

from kdcli.methods.base import Method, Needs, find_method

HELPS, HARMS, LEVEL = "helps", "harms", "no difference seen"


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        name: of the row: the method, and options that it stands for.
        method: its name in the registry.
        scores: accuracy in percent by seed; without those that diverged.
        cost: time of its steps as a multiple of the baseline's, the median over seeds.
        apart: whether it was trained apart from the baseline.
        rate: the learning rate that the validation images chose.
        bytes: what it reads of the cache, an image and view.
    """

    name: str
    method: str
    scores: tuple[float, ...]
    cost: float
    apart: bool
    rate: float
    bytes: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores) if self.scores else float("-inf")


@dataclass(frozen=True)
class Section:
    """A task.

    Attributes:
        rows: what was trained.
        references: teachers and untrained students, accuracy in percent by seed.
        refused: the other methods, and why.
    """

    task: Task
    rows: Sequence[Row]
    references: Mapping[str, Sequence[float]]
    refused: Mapping[str, str]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def base(self) -> Row:
        return self.row(self.task.baseline)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; of one value infinite."""
    if len(values) < 2:
        return statistics.fmean(values), float("inf")
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    middle, half = interval(values)
    return f"{middle:{sign}.1f} ± {half:.1f}" if half < float("inf") else f"{middle:{sign}.1f}"


def differences(row: Row, base: Row) -> list[float]:
    """By seed; empty where one of them diverged at some seed."""
    if len(row.scores) != len(base.scores):
        return []
    return [own - other for own, other in zip(row.scores, base.scores, strict=True)]


def verdict(row: Row, base: Row) -> str:
    """Whether a method helps, by the interval of its paired difference."""
    if not (apart := differences(row, base)):
        return f"diverged at {len(base.scores) - len(row.scores)} of {len(base.scores)} seeds"
    middle, half = interval(apart)
    return LEVEL if abs(middle) <= half else HELPS if middle > 0 else HARMS


# --- needs -----------------------------------------------------------------------------------------


def needs_of(name: str) -> Needs:
    """What a method needs with its default options."""
    method: Method = find_method(name)
    return method.needs_of(method.Options())


def needed(needs: Needs) -> str:
    """In words."""
    words = [
        *(["labels"] if needs.labels else []),
        *sorted(needs.kinds),
        *(["a teacher of the same classes"] if needs.classes or needs.same else []),
        *(["a ranking of the teachers"] if needs.ranking else []),
        *(["a generalist"] if needs.generalist else []),
        *(["unlabelled images"] if needs.unlabelled else []),
        *(["several data sets"] if needs.sets else []),
        *(["the student as it was"] if needs.frozen else []),
    ]
    return ", ".join(words) or "nothing"


# --- tables ----------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(section: Section) -> str:
    """Methods by their accuracy, the baseline and the references among them."""
    base = section.base
    lines: list[tuple[float, list[str]]] = [
        (statistics.fmean(values), [f"*{REFERENCES[name]}*", plus_minus(values), "", "", "", "", ""])
        for name, values in section.references.items()
    ]
    for row in section.rows:
        if not row.scores:
            lines.append((row.mean, [f"`{row.name}`", "diverged at every seed", *[""] * 5]))
            continue
        apart = differences(row, base)
        reading = ["", "**baseline**"] if row is base else [
            plus_minus(apart, "+") if apart else "–", verdict(row, base)
        ]  # fmt: skip
        cost = ("~" if row.apart else "") + f"{row.cost:.2f}"
        own = [f"`{row.name}`", plus_minus(row.scores), *reading, cost, f"{row.bytes:,}", f"{row.rate:g}"]
        lines.append((row.mean, own))
    lines.sort(key=lambda line: -line[0])
    head = ["method", "accuracy, %", f"minus `{base.name}`", "reading", "step time", "bytes", "rate"]
    return markdown(head, [line for _, line in lines])


REFERENCES = {
    LETTERS: f"teacher `{LETTERS}`",
    IMAGENET: f"teacher `{IMAGENET}`",
    "untrained": "untrained student",
}


def readings(section: Section) -> str:
    """Which methods help, a line a verdict."""
    base = section.base
    by_verdict: dict[str, list[str]] = {HELPS: [], LEVEL: [], HARMS: []}
    for row in sorted(section.rows, key=lambda row: -row.mean):
        if row is not base:
            by_verdict.setdefault(verdict(row, base), []).append(f"`{row.name}`")
    titles = {
        HELPS: f"Better than `{base.name}`",
        LEVEL: f"No difference from `{base.name}` seen",
        HARMS: f"Worse than `{base.name}`",
    }
    return "\n".join(
        f"* {titles.get(key, key)}: {', '.join(names) or 'none'}." for key, names in by_verdict.items()
    )


def in_a_line(name: str, sections: Sequence[Section]) -> str:
    """What was seen of a method on both tasks."""
    words = []
    for section, where in zip(sections, ("with labels", "without"), strict=True):
        row = next((row for row in section.rows if row.name == name), None)
        if row is None:
            words.append(f"{where}: not run")
        elif row is section.base:
            words.append(f"{where}: the baseline")
        else:
            words.append(f"{where}: {verdict(row, section.base)}")
    return "; ".join(words)


def page(sections: Sequence[Section], plan: Plan, machine: Mapping[str, Any], command: str) -> str:
    """The whole page."""
    labelled, unlabelled = sections
    names = dict.fromkeys(row.name for section in sections for row in section.rows)
    methods = {row.name: row.method for section in sections for row in section.rows}
    needs = [
        [
            f"`{name}`",
            find_method(methods[name]).summary,
            needed(needs_of(methods[name])),
            in_a_line(name, sections),
        ]
        for name in names
    ]
    left_out = dict.fromkeys(name for section in sections for name in section.refused)
    reasons = [
        [f"`{name}`", *(cell(section.refused.get(name, "run")) for section in sections)] for name in left_out
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        Path(__file__)
        .with_suffix(".md")
        .read_text(encoding="utf-8")
        .format(
            command=command,
            seeds=plan.seeds,
            machine=f"{machine['processor']}, {machine['processors']} processors, load {machine['load']} at the start, "
            f"{versions}; commit {machine['commit']}; {machine['minutes']:.0f} minutes",
            rates=", ".join(f"{rate:g}" for rate in plan.rates),
            epochs=plan.epochs,
            batch=plan.batch_size,
            views=plan.views,
            shots=labelled.task.shots,
            few=unlabelled.task.shots,
            student=plan.student,
            teacher=plan.teacher,
            side=SIDE,
            tap=TAP,
            comparisons=sum(len(section.rows) - 1 for section in sections),
            labelled=f"{readings(labelled)}\n\n{table(labelled)}",
            unlabelled=f"{readings(unlabelled)}\n\n{table(unlabelled)}",
            needs=markdown(["method", "what it does", "needs", "seen here"], needs),
            reasons=markdown(["method", "with labels", "without"], reasons),
        )
    )


def cell(text: str) -> str:
    """A text in a table, without what is particular to a machine."""
    return text.replace("|", "\\|")
