"""What P1's study measured: percent by seed."""

from collections.abc import Iterable, Mapping
from statistics import fmean

from lab.realworld.claims import Values
from lab.realworld.p1_data import (
    ALL,
    GENERALIST,
    IMAGENET,
    Student,
    domains,
    students_of,
    tasks,
    taught_alone,
)
from lab.realworld.shared import Room

RELATED, UNRELATED, HEAD = "related", "unrelated", "head 1"
EXPERT = "expert"
Cells = dict[str, float]
"""By column."""


def values(room: Room) -> Values:
    """Few-shot accuracies, and what head 1 of a student knows of its expert's task, in percent of the expert.

    A row is a mean over domains; beside it is the same of each domain, of the students of all experts, and of curves.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for seed in room.settings["p1.seeds"]:
        if room.lab.has(f"p1/probe/seed{seed}"):
            for row, cells in _of_seed(room, seed).items():
                for column, value in cells.items():
                    found.setdefault((row, column), {})[seed] = value
    return found


def _of_seed(room: Room, seed: int) -> dict[str, Cells]:
    """Cells by row."""
    probed, every = _probed(room, seed), taught_alone(room)
    students = students_of(room, seed)
    by_domain: dict[str, dict[str, Cells]] = {
        **{
            row: {domain: _means(room, probed[row], [domain]) for domain in every}
            for row in (IMAGENET, GENERALIST)
        },
        EXPERT: {domain: _means(room, probed[f"{domain}.{EXPERT}"], [domain]) for domain in every},
    }
    curves: dict[str, Cells] = {}
    of_all = {GENERALIST: _of_all(room, probed[GENERALIST])}
    for each in students:
        if each.taught == ALL:
            of_all[each.row] = _of_all(room, probed[each.judged])
            continue
        cells = _means(room, probed[each.judged], [each.taught]) | {HEAD: _head(room, each)}
        if each.label:
            curves[f"{each.taught}: {each.row}, {each.label}"] = cells
        else:
            by_domain.setdefault(each.row, {})[each.taught] = cells
    rows = {row: mean_of(known.values()) for row, known in by_domain.items()}
    rows |= {f"{ALL} experts: {row}": cells for row, cells in of_all.items()}
    rows |= {
        f"{domain}: {row}": known[domain]
        for domain in every
        for row, known in by_domain.items()
        if domain in known
    }
    return rows | curves


def mean_of(found: Iterable[Cells]) -> Cells:
    """The mean of each column."""
    known = list(found)
    return {column: fmean(cells[column] for cells in known) for column in known[0]}


def _probed(room: Room, seed: int) -> dict[str, Cells]:
    """Percent by what the probe calls a network, and task."""
    found: dict[str, Cells] = {}
    for each in room.lab.document(f"p1/probe/seed{seed}")["results"]:
        found.setdefault(each["representation"], {})[each["target"]] = 100 * each["accuracy"]["mean"]
    return found


def _means(room: Room, accuracy: Mapping[str, float], taught: list[str]) -> Cells:
    """Of the tasks of these experts' domains, and of all others."""
    near = {task: each["domain"] in taught for task, each in tasks(room).items()}
    return {
        column: fmean(accuracy[task] for task, is_near in near.items() if is_near == wanted)
        for column, wanted in ((RELATED, True), (UNRELATED, False))
    }


def _of_all(room: Room, accuracy: Mapping[str, float]) -> Cells:
    """Where all experts have taught: each domain counts once."""
    every = domains(room)
    related = fmean(_means(room, accuracy, [domain])[RELATED] for domain in every)
    return {RELATED: related, UNRELATED: _means(room, accuracy, every)[UNRELATED]}


def _head(room: Room, student: Student) -> float:
    expert = room.lab.document(f"p1/experts/{student.taught}")["test"]["top1"]
    (own,) = (
        each for each in room.lab.document(f"p1/students/{student.stream}")["students"] if each["name"] == student.name
    )  # fmt: skip
    return float(100 * own["test"]["top1"] / expert)
