"""P1's tables from what the finished steps say: rows are FAMILY/REPRESENTATION, values in percent."""

from collections.abc import Iterable, Mapping
from typing import Any

from lab.p1.experts import IMAGENET, Sources
from lab.p1.judging import Judging
from lab.p1.students import SOFT_LABEL, Family, Students
from lab.steps import Lab
from lab.tables import Measured, Partial

Cells = dict[tuple[str, str], float]
TALLIES = (
    ("ours-kd", IMAGENET), ("ours-kd", "kd"), ("kd", IMAGENET),
    ("ours-crd", IMAGENET), ("ours-crd", "crd"), ("crd", IMAGENET),
)  # fmt: skip
"""Rows of Table 3: who is compared with whom."""
SIGNS = (">", "=", "<")
OLD = "old"
"""The column of the expert's own task."""


def measured(lab: Lab) -> Measured:
    """Values by the cells of printed.yaml."""
    students = Students(Sources(lab))
    families, judging = students.families(), Judging(students)
    probes: Cells = {}
    old: Cells = {}
    for family in families:
        here = _accuracies(lab, family, "probe")
        for target in judging.several():
            here |= _accuracies(lab, family, f"probe-{target}")
        probes |= here | _best_teacher(here, family, judging)
        if family.short in lab.settings["old_task"]:
            old |= _old_task(lab, family)
    return {
        "P1-2": probes | old,
        "P1-3": tallies(probes, families, judging),
        "P1-4": probes,
        "P1-5": probes,
        "P1-6": _all(lab, families, "few"),
        "P1-7": _all(lab, families, "full"),
        "P1-T": probes,
    }


def _all(lab: Lab, families: Iterable[Family], kind: str) -> Cells:
    found: Cells = {}
    for family in families:
        found |= _accuracies(lab, family, kind)
    return found


def _accuracies(lab: Lab, family: Family, kind: str) -> Cells:
    """What a step of a family measured, if it has run."""
    step = f"{family.name}/{kind}"
    if not lab.has(step):
        return {}
    return {
        (_row(family, each["representation"]), each["target"]): 100 * each["accuracy"]["mean"]
        for each in _results(lab.document(step))
    }


def _results(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A document of a single result is that result."""
    return list(document.get("results", [document]))


def _row(family: Family, representation: str) -> str:
    return representation if family.short == SOFT_LABEL else f"{family.short}/{representation}"


def _old_task(lab: Lab, family: Family) -> Cells:
    """Accuracy on the experts' own task: of students by their heads, of the expert where it was trained."""
    found: Cells = {}
    if lab.has(step := f"{family.name}/old"):
        for each in _results(lab.document(step)):
            found[_row(family, each["representation"]), OLD] = 100 * each["accuracy"]["mean"]
    if lab.has(step := f"experts/{family.experts[0].name}"):
        found[_row(family, "teacher"), OLD] = 100 * lab.document(step)["test"]["top1"]
    return found


def _best_teacher(values: Cells, family: Family, judging: Judging) -> Cells:
    """Of several parts the expert that is best on the related targets."""
    rows = {row for row, _ in values if row.startswith(f"{family.short}/teacher-")}
    if not rows:
        return {}
    related = judging.related(family, [column for _, column in values])
    best = max(sorted(rows), key=lambda row: sum(values.get((row, column), 0.0) for column in set(related)))
    return {
        (_row(family, "teacher"), column): value for (row, column), value in values.items() if row == best
    }


def tallies(values: Cells, families: Iterable[Family], judging: Judging) -> Cells:
    """Table 3: of how many experts one representation is above, near or below the other, by their mean difference.

    Counted are experts of which all targets have been probed with both; numbers of fewer than the paper's are partial.
    """
    settings = judging.lab.settings
    found: Cells = {}
    whole = set(settings["targets"]) >= set(settings.printed("targets"))
    for family in families:
        if family.short not in settings["experts"]:
            continue
        near = judging.related(family, settings["targets"])
        far = [target for target in settings["targets"] if target not in near]
        for one, other in TALLIES:
            second = IMAGENET if other == IMAGENET else _row(family, other)
            for kind, targets in (("related", near), ("unrelated", far)):
                pairs = [((_row(family, one), target), (second, target)) for target in targets]
                if not pairs or not all(cell in values for pair in pairs for cell in pair):
                    continue
                for sign in SIGNS:
                    found.setdefault((f"{one} - {other}", f"{kind} {sign}"), 0.0)
                mean = sum(values[here] - values[there] for here, there in pairs) / len(pairs)
                found[f"{one} - {other}", f"{kind} {_sign(mean, settings['equal_within'])}"] += 1
    for row, column in found:
        counted = sum(found[row, f"{column.partition(' ')[0]} {sign}"] for sign in SIGNS)
        if not whole or counted < len(settings.printed("experts")):
            found[row, column] = Partial(found[row, column])
    return found


def _sign(difference: float, equal_within: float) -> str:
    if abs(difference) <= equal_within:
        return "="
    return ">" if difference > 0 else "<"
