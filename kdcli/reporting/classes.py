"""Probes class by class: how the accuracy of each class differs between representations."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.reporting.cells import number, percent, points, word
from kdcli.reporting.document import Chart, Column, Columns, Fold, Part, Table, tabulate
from kdcli.reporting.matrices import Changes, class_changes

MOST_EXTREMES = 5
"""Classes named in the table at either end, for each representation."""
MOST_REPRESENTATIONS = 12
"""Rows of a chart."""
_CHANCE = "Means over the draws. A class with few test images moves much by chance."

Probe = Mapping[str, Any]


def class_parts(group: Sequence[Probe], name: str) -> list[Part]:
    """Charts and tables of probes of one protocol by class; with several targets, each is folded.

    Args:
        group: probes, each with ``per_class`` or not.
        name: of the files, different for each group.
    """
    targets: dict[str, list[Probe]] = {}
    for probe in group:
        if len(probe.get("per_class") or ()) > 1:
            targets.setdefault(str(probe.get("target")), []).append(probe)
    parts: list[Part] = []
    for place, (target, probes) in enumerate(targets.items(), 1):
        own = f"{name}-classes" if len(targets) == 1 else f"{name}-classes-{place}"
        found = _target_parts(probes, own, "By class" if len(targets) == 1 else f"By class: {target}")
        if len(targets) > 1 and len(found) > 1:
            parts.append(Fold(f"{len(_classes(probes))} classes of {target}", tuple(found)))
        else:
            parts += found
    return parts


def _target_parts(probes: Sequence[Probe], name: str, title: str) -> list[Part]:
    baseline, others = _baseline(probes)
    count = len(_classes(probes))
    whole: Part = _whole(probes, name, "" if baseline is not None else title)
    if count > 2 * MOST_EXTREMES:
        whole = Fold(f"{title}: accuracies of all {count} classes", (_whole(probes, name, ""),))
    changes = [] if baseline is None else [_changes(probe, baseline) for probe in others]
    if baseline is None or any(len(each.classes) < 2 for each in changes):
        return [whole]
    chart = _chart(changes, baseline, name, title)
    if count <= 2 * MOST_EXTREMES:
        return [chart, whole]
    return [chart, _extremes(others, baseline, f"{name}-changes"), whole]


def _baseline(probes: Sequence[Probe]) -> tuple[Probe | None, list[Probe]]:
    """The probe that the others of its document are compared with, and those; best first, so many as fit."""
    names = {probe["baseline"] for probe in probes if probe.get("baseline") is not None}
    found = [probe for probe in probes if probe["representation"] in names]
    if len(names) != 1 or len(found) != 1:
        return None, []
    others = [probe for probe in probes if probe is not found[0]]
    others.sort(key=lambda probe: -probe["accuracy"]["mean"])
    return (found[0], others[:MOST_REPRESENTATIONS]) if others else (None, [])


def _classes(probes: Sequence[Probe]) -> list[str]:
    return list(dict.fromkeys(name for probe in probes for name in probe["per_class"]))


def _differences(probe: Probe, baseline: Probe) -> dict[str, float]:
    """By class, as fractions, from the largest gain to the largest loss; classes that both were tested on."""
    before = baseline["per_class"]
    found = {
        name: value - before[name]
        for name, value in probe["per_class"].items()
        if value is not None and before.get(name) is not None
    }
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _changes(probe: Probe, baseline: Probe) -> Changes:
    found = _differences(probe, baseline)
    return Changes(str(probe["representation"]), tuple(found), tuple(100 * value for value in found.values()))


def _chart(changes: Sequence[Changes], baseline: Probe, name: str, title: str) -> Chart:
    caption = (
        f"Each dot is a class: its accuracy minus that of {baseline['representation']}. The diamond is the mean; the "
        "classes that gained and lost most are named."
    )
    return class_changes(changes, f"{name}-chart", title, caption)


def _extremes(others: Sequence[Probe], baseline: Probe, name: str) -> Table:
    """The classes that gained most and lost most, for each representation."""
    before = baseline["per_class"]
    columns: Columns = {
        Column("Class", "name"): lambda row: word(row[1]),
        Column("Representation", "text", setting=True): lambda row: word(str(row[0]["representation"])),
        Column(f"{baseline['representation']}, %", about="accuracy with the baseline"): lambda row: percent(
            before[row[1]]
        ),
        Column("Accuracy, %"): lambda row: percent(row[0]["per_class"][row[1]]),
        Column("Change, points"): lambda row: points(row[0]["per_class"][row[1]] - before[row[1]]),
    }
    rows = []
    for probe in others:
        found = _differences(probe, baseline)
        gained = [each for each in found if found[each] > 0][:MOST_EXTREMES]
        lost = [each for each in found if found[each] < 0][-MOST_EXTREMES:]
        rows += [(probe, each) for each in (*gained, *lost)]
    title = f"Classes that gained and lost most against {baseline['representation']}"
    return tabulate(name, rows, columns, title)


def _whole(probes: Sequence[Probe], name: str, title: str) -> Table:
    """Every class, with a column for each representation, and how far these are apart."""
    heads = [str(probe["representation"]) for probe in probes]
    heads = [
        head if heads.count(head) == 1 else f"{head} ({probe['from']})"
        for head, probe in zip(heads, probes, strict=True)
    ]
    columns = (
        Column("Class", "name"),
        *(Column(f"{head}, %", about=f"accuracy with {head}") for head in heads),
        Column("Spread, points"),
    )
    values = {each: [probe["per_class"].get(each) for probe in probes] for each in _classes(probes)}
    rows = [
        (word(each), *(percent(value) for value in row), number(_spread(row), 1, 0.01))
        for each, row in values.items()
    ]
    return Table(name, columns, tuple(rows), title, (_CHANCE,)).trimmed()


def _spread(row: Sequence[float | None]) -> float | None:
    known = [value for value in row if value is not None]
    return max(known) - min(known) if len(known) > 1 else None
