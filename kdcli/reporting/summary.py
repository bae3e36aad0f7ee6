"""The report of one whole job: what :class:`~kdcli.reporting.values.Report` holds, as a document."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from kdcli.plotting import require_matplotlib
from kdcli.reporting import charts
from kdcli.reporting.cells import Cell, number, percent, word
from kdcli.reporting.curves import training_curves
from kdcli.reporting.document import (
    Chart,
    Column,
    Command,
    Commands,
    Document,
    Facts,
    Notes,
    Part,
    Section,
    Table,
)
from kdcli.reporting.page import spoken, write_page
from kdcli.reporting.values import Report, ReportRow

LOSSES = "Mean over each epoch's steps. Losses of different methods are different sums: compare shapes, not heights."


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` to ``path`` as one HTML file that needs nothing else, whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError, NoSpaceError: the file cannot be written.
    """
    require_matplotlib("the report's charts need")
    write_page(document_of(report), path)


def document_of(report: Report) -> Document:
    """The report in sections; what is empty is left out."""
    sentences = (_ranking_finding(report), _cost_finding(report))
    sections = (
        ("Students", _students(report)),
        ("Ranking", _ranking(report)),
        ("Score against accuracy", _scatter(report)),
        ("Training", _curves(report.histories)),
        (
            "Commands",
            [Commands(tuple(Command(*step) for step in report.commands))] if report.commands else [],
        ),
        ("Versions", [Facts(tuple(report.versions.items()))] if report.versions else []),
    )
    return Document(
        report.title,
        " ".join(sentence for sentence in sentences if sentence),
        report.intro,
        tuple(Section(title, tuple(parts)) for title, parts in sections if parts),
    )


# --- findings ---------------------------------------------------------------------------------


def _ranking_finding(report: Report) -> str:
    if report.ranking is None or not report.ranking.sources:
        return ""
    first = report.ranking.sources[0]
    count = len(report.ranking.sources)
    among = f" of {count} sources" if count > 1 else ""
    score = f", with a score of {first.score:.3f}" if math.isfinite(first.score) else ""
    return f"The ranking puts {first.name} first{among}{score}."


def _cost_finding(report: Report) -> str:
    pairs = [(row.seconds, row.live_seconds) for row in report.rows]
    known = [(cached, live) for cached, live in pairs if _real(cached) and _real(live)]
    if not known:
        return ""
    cached, live = (sum(column) for column in zip(*known, strict=True))
    many = f"The {len(known)} students" if len(known) > 1 else "The student"
    return (
        f"{many} that read teachers took {spoken(cached)} from the cache; "
        f"with live teachers {'they' if len(known) > 1 else 'it'} would have taken {spoken(live)}."
    )


def _real(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and math.isfinite(value)


# --- sections ---------------------------------------------------------------------------------

_COLUMNS = (
    Column("Student", "name"),
    Column("Method", "text"),
    Column("Test accuracy, %", best="high"),
    Column("Few-shot probe, %", best="high"),
    Column("Training, s"),
    Column("With live teachers, s"),
    Column("Note", "note"),
)


def _students(report: Report) -> list[Part]:
    if not report.rows:
        return []
    methods = any(row.method != row.name for row in report.rows)
    rows = tuple(
        (
            Cell(row.name, row.name),
            word(row.method if methods else None),
            percent(row.test_top1),
            percent(*row.probe) if row.probe else percent(None),
            number(row.seconds),
            number(row.live_seconds),
            word(row.note),
        )
        for row in report.rows
    )
    table = Table("students", _COLUMNS, rows).trimmed()
    shown: list[ReportRow] = [row for row in report.rows if _real(row.test_top1) or row.probe is not None]
    return [
        table,
        *([Notes(tuple(report.notes))] if report.notes else []),
        *([charts.accuracies(shown)] if len(shown) > 1 else []),
    ]


def _ranking(report: Report) -> list[Chart]:
    if report.ranking is None or not report.ranking.sources:
        return []
    return [charts.ranking_bars(report.ranking)]


def _scatter(report: Report) -> list[Chart]:
    points = [point for point in report.score_points if all(map(math.isfinite, point[1:]))]
    if not points:
        return []
    metric = report.ranking.metric.upper() if report.ranking is not None else "source"
    return [charts.score_scatter(points, metric)]


def _curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    known = {name: epochs for name, epochs in histories.items() if len(epochs)}
    return [training_curves(known, caption=LOSSES)] if known else []
