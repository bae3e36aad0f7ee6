"""Probes of a report: accuracies, paired differences, P1's tally, and the classes that gained and lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.reporting import charts
from kdcli.reporting.charts import Spread
from kdcli.reporting.document import Cell, Column, Part, Section, Table, number, percent, points, word
from kdcli.reporting.probe_classes import class_parts
from kdcli.reporting.protocols import protocol_text

MOST_IN_CHART = 40
"""Probes in one chart; all are in the table."""


def probe_section(
    groups: Sequence[Sequence[Mapping[str, Any]]],
    contrasts: Sequence[Mapping[str, Any]],
    tallies: Sequence[Mapping[str, Any]],
) -> Section | None:
    """Accuracies of probes, a table per protocol; paired differences and their tally; changes by class.

    Args:
        groups: probes of one protocol each.
        contrasts: paired differences.
        tallies: documents of ``kd eval-probe`` that have one.
    """
    if not groups:
        return None
    names = [f"probes-{place}" if len(groups) > 1 else "probes" for place in range(1, len(groups) + 1)]
    parts: list[Part] = []
    for name, group in zip(names, groups, strict=True):
        parts += _probe_parts(group, name)
    if contrasts:
        parts.append(_contrasts(contrasts))
    if tallies:
        parts.append(_tally(tallies))
    for name, group in zip(names, groups, strict=True):
        parts += class_parts(group, name)
    return Section("Probes", tuple(parts))


def _probe_parts(group: Sequence[Mapping[str, Any]], name: str) -> list[Part]:
    targets = list(dict.fromkeys(probe.get("target") for probe in group))
    one_target = len(targets) == 1
    score = "mAP" if group[0].get("metric") == "mAP" else "Accuracy"
    columns = (
        Column("Representation", "name"),
        Column("Target", "text", setting=True),
        Column("Relatedness", "text", setting=True),
        Column(f"{score}, %, mean ± 95 %", best="high" if one_target else None),
        Column("Std"),
        Column("Top-5, %"),
        Column("Mean per class, %"),
        Column("Classes", setting=True),
        Column("Draws", setting=True),
        Column("From", "note", setting=True),
    )
    rows = tuple(
        (
            Cell(str(probe["representation"]), str(probe["representation"])),
            word(None if one_target else str(probe.get("target"))),
            word(probe.get("relatedness")),
            percent(probe["accuracy"]["mean"], probe["accuracy"].get("ci95")),
            percent(probe["accuracy"].get("std")),
            percent((probe.get("top5") or {}).get("mean")),
            percent((probe.get("mean_per_class") or {}).get("mean")),
            number(probe.get("classes"), 0),
            number(probe.get("draws"), 0),
            word(Path(probe["from"]).name),
        )
        for probe in group
    )
    ordered = sorted(
        group, key=lambda probe: (targets.index(probe.get("target")), -probe["accuracy"]["mean"])
    )
    text = protocol_text(group[0])
    table = Table(name, columns, rows, notes=(f"Protocol: {text}.",) if text else ()).trimmed()
    spread = [
        Spread(
            str(probe["representation"]) + ("" if one_target else f", {probe.get('target')}"),
            (), probe["accuracy"]["mean"], probe["accuracy"].get("ci95"),
        )
        for probe in ordered[:MOST_IN_CHART]
    ]  # fmt: skip
    chart = charts.spreads(spread, f"{name}-chart", "", "a draw", "mean over draws, 95 % interval")
    return [table, *([chart] if len(spread) > 1 else [])]


def _contrasts(contrasts: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("Representation", "name"),
        Column("Baseline", "text", setting=True),
        Column("Target", "text", setting=True),
        Column("Difference, points"),
        Column("± 95 %"),
        Column("p"),
        Column("p, no worse"),
        Column("Verdict", "text"),
    )
    rows = tuple(
        (
            Cell(str(each["representation"]), str(each["representation"])),
            word(each.get("baseline")),
            word(each.get("target")),
            points(each.get("mean")),
            percent(each.get("ci95")),
            _p(each.get("p")),
            _p((each.get("tost") or {}).get("p_not_worse")),
            word(each.get("verdict")),
        )
        for each in contrasts
    )
    return Table("probe-differences", columns, rows, "Paired differences").trimmed()


def _p(value: float | None) -> Cell:
    """A p-value; a small one is not 0."""
    return Cell(value, "< 0.001") if value is not None and value < 0.001 else number(value, 3)


def _tally(documents: Sequence[Mapping[str, Any]]) -> Table:
    """P1's Table 3: on how many targets each representation is better, equal or worse, by relatedness."""
    columns = (
        Column("Representation", "name"),
        Column("Baseline", "text", setting=True),
        Column("Targets", "text", setting=True),
        Column("Better"),
        Column("Equal"),
        Column("Worse"),
        Column("Better on", "note"),
        Column("Worse on", "note"),
    )
    rows = tuple(
        (
            Cell(name, name),
            word(document.get("baseline")),
            word(kind),
            *(number(len(found.get(verdict, ())), 0) for verdict in ("better", "equal", "worse")),
            *(word(", ".join(found.get(verdict, ()))) for verdict in ("better", "worse")),
        )
        for document in documents
        for name, kinds in document["tally"].items()
        for kind, found in kinds.items()
    )
    within = sorted({document.get("equal_within", 0.0) for document in documents})
    note = (
        "Targets by the mean difference from the baseline, related or not to what the representations learned from "
        f"(P1 Table 3); equal: by at most {' or '.join(f'{100 * each:g}' for each in within)} points."
    )
    return Table("probe-tally", columns, rows, "Tally", (note,)).trimmed()
