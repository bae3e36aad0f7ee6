"""Probes of a report: accuracies, paired differences, P1's tally, and the classes that gained and lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.reporting import charts
from kdcli.reporting.cells import Cell, number, percent, points, word
from kdcli.reporting.charts import Spread
from kdcli.reporting.classes import class_parts
from kdcli.reporting.document import Column, Columns, Part, Section, Table, tabulate
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
    columns: Columns = {
        Column("Representation", "name"): lambda probe: word(str(probe["representation"])),
        Column("Target", "text", setting=True): lambda probe: word(
            None if one_target else str(probe.get("target"))
        ),
        Column("Relatedness", "text", setting=True): lambda probe: word(probe.get("relatedness")),
        Column(f"{score}, %, mean ± 95 %", best="high" if one_target else None): lambda probe: percent(
            probe["accuracy"]["mean"], probe["accuracy"].get("ci95")
        ),
        Column("Std"): lambda probe: percent(probe["accuracy"].get("std")),
        Column("Top-5, %"): lambda probe: percent((probe.get("top5") or {}).get("mean")),
        Column("Mean per class, %"): lambda probe: percent((probe.get("mean_per_class") or {}).get("mean")),
        Column("Classes", setting=True): lambda probe: number(probe.get("classes"), 0),
        Column("Draws", setting=True): lambda probe: number(probe.get("draws"), 0),
        Column("From", "note", setting=True): lambda probe: word(Path(probe["from"]).name),
    }
    ordered = sorted(
        group, key=lambda probe: (targets.index(probe.get("target")), -probe["accuracy"]["mean"])
    )
    text = protocol_text(group[0])
    table = tabulate(name, group, columns, notes=(f"Protocol: {text}.",) if text else ())
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
    columns: Columns = {
        Column("Representation", "name"): lambda each: word(str(each["representation"])),
        Column("Baseline", "text", setting=True): lambda each: word(each.get("baseline")),
        Column("Target", "text", setting=True): lambda each: word(each.get("target")),
        Column("Difference, points"): lambda each: points(each.get("mean")),
        Column("± 95 %"): lambda each: percent(each.get("ci95")),
        Column("p"): lambda each: _p(each.get("p")),
        Column("p, no worse"): lambda each: _p((each.get("tost") or {}).get("p_not_worse")),
        Column("Verdict", "text"): lambda each: word(each.get("verdict")),
    }
    return tabulate("probe-differences", contrasts, columns, "Paired differences")


def _p(value: float | None) -> Cell:
    """A p-value; a small one is not 0."""
    return Cell(value, "< 0.001") if value is not None and value < 0.001 else number(value, 3)


def _tally(documents: Sequence[Mapping[str, Any]]) -> Table:
    """P1's Table 3: on how many targets each representation is better, equal or worse, by relatedness."""
    rows = [
        (document.get("baseline"), name, kind, found)
        for document in documents
        for name, kinds in document["tally"].items()
        for kind, found in kinds.items()
    ]
    columns: Columns = {
        Column("Representation", "name"): lambda row: word(row[1]),
        Column("Baseline", "text", setting=True): lambda row: word(row[0]),
        Column("Targets", "text", setting=True): lambda row: word(row[2]),
        Column("Better"): lambda row: number(len(row[3].get("better", ())), 0),
        Column("Equal"): lambda row: number(len(row[3].get("equal", ())), 0),
        Column("Worse"): lambda row: number(len(row[3].get("worse", ())), 0),
        Column("Better on", "note"): lambda row: word(", ".join(row[3].get("better", ()))),
        Column("Worse on", "note"): lambda row: word(", ".join(row[3].get("worse", ()))),
    }
    within = sorted({document.get("equal_within", 0.0) for document in documents})
    note = (
        "Targets by the mean difference from the baseline, related or not to what the representations learned from "
        f"(P1 Table 3); equal: by at most {' or '.join(f'{100 * each:g}' for each in within)} points."
    )
    return tabulate("probe-tally", rows, columns, "Tally", (note,))
