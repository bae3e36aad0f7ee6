"""The page: summary, table, charts, commands, versions."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeGuard, final

from kdcli.console import duration
from kdcli.reporting import charts
from kdcli.reporting.markup import Html, element
from kdcli.reporting.style import SCRIPT, STYLE
from kdcli.reporting.values import Report, ReportRow
from kdcli.runtime import atomic_write_text, storage_errors

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LONGEST_WORD = 48
_FEW_POINTS = 3  # fewer have no rank correlation worth a number


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` to ``path`` as one HTML file that needs nothing else, whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError, NoSpaceError: the file cannot be written.
    """
    charts.require_matplotlib()
    text = render(report)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def render(report: Report) -> str:
    """The page as text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", report.title),
        element("style", Html(STYLE)),
    )
    sections = (_table, _ranking, _scatter, _curves, _commands, _versions)
    body = element(
        "body",
        element("header", *_opening(report)),
        element("main", *(section(report) for section in sections)),
        element("footer", f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by kd."),
        element("script", Html(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


# --- opening ----------------------------------------------------------------------------------


def _opening(report: Report) -> list[Html]:
    findings = " ".join(
        sentence
        for sentence in (_ranking_finding(report), _accuracy_finding(report), _cost_finding(report))
        if sentence
    )
    return [
        element("h1", report.title),
        *([element("p", findings, class_="lead")] if findings else []),
        *([element("p", report.intro, class_="soft")] if report.intro else []),
    ]


def _ranking_finding(report: Report) -> str:
    if report.ranking is None or not report.ranking.sources:
        return ""
    first = report.ranking.sources[0]
    count = len(report.ranking.sources)
    among = f" of {count} sources" if count > 1 else ""
    score = f", with a score of {first.score:.3f}" if math.isfinite(first.score) else ""
    return f"The ranking puts {first.name} first{among}{score}."


def _accuracy_finding(report: Report) -> str:
    tested = [(row.test_top1, row.name) for row in report.rows if _real(row.test_top1)]
    if not tested:
        return ""
    best, name = max(tested, key=lambda pair: pair[0])
    sentence = f"The best student on the test set is {name} with {100 * best:.1f} %"
    plain = [row for row in report.rows if row.method == "labels-only" and _real(row.test_top1)]
    if plain and plain[0].name != name:
        sentence += f"; labels alone give {100 * (plain[0].test_top1 or 0.0):.1f} %"
    return f"{sentence}."


def _cost_finding(report: Report) -> str:
    pairs = [(row.seconds, row.live_seconds) for row in report.rows]
    known = [(cached, live) for cached, live in pairs if _real(cached) and _real(live)]
    if not known:
        return ""
    cached, live = (sum(column) for column in zip(*known, strict=True))
    many = f"The {len(known)} students" if len(known) > 1 else "The student"
    return (
        f"{many} that read teachers took {_spoken(cached)} from the cache; "
        f"with live teachers {'they' if len(known) > 1 else 'it'} would have taken {_spoken(live)}."
    )


def _spoken(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


# --- the table --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Column:
    """One column: what it is called, what to sort by, what to show; ``marked``: its highest value is best."""

    title: str
    value: Callable[[ReportRow], float | str | None]
    show: Callable[[ReportRow], str]
    marked: bool = False
    kind: str = "number"


_COLUMNS = (
    _Column("Student", lambda row: row.name, lambda row: row.name, kind="name"),
    _Column("Method", lambda row: row.method, lambda row: row.method, kind="text"),
    _Column("Test accuracy, %", lambda row: row.test_top1, lambda row: _percent(row.test_top1), marked=True),
    _Column(
        "Few-shot probe, %",
        lambda row: row.probe[0] if row.probe else None,
        lambda row: f"{_percent(row.probe[0])} ± {_percent(row.probe[1])}" if row.probe else "–",
        marked=True,
    ),
    _Column("Training, s", lambda row: row.seconds, lambda row: _number(row.seconds)),
    _Column("With live teachers, s", lambda row: row.live_seconds, lambda row: _number(row.live_seconds)),
    _Column("Note", lambda row: row.note or None, lambda row: row.note, kind="note"),
)


def _percent(value: float | None) -> str:
    return f"{100 * value:.1f}" if _real(value) else "–"


def _number(value: float | None) -> str:
    return f"{value:,.1f}" if _real(value) else "–"


def _table(report: Report) -> Html | None:
    if not report.rows:
        return None
    columns = [
        column
        for column in _COLUMNS
        if any(_known(column.value(row)) for row in report.rows)
        and not (column.title == "Method" and all(row.method == row.name for row in report.rows))
    ]
    heads = [
        element("th", element("button", column.title, type="button"), scope="col", class_=column.kind)
        for column in columns
    ]
    lines = [element("tr", *(_cell(column, row, report.rows) for column in columns)) for row in report.rows]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *lines))
    shown = [row for row in report.rows if _real(row.test_top1) or row.probe is not None]
    chart = None
    if len(shown) > 1:
        chart = _figure(charts.accuracies(shown), "", charts.accuracy_legend(shown))
    notes = [element("li", note) for note in report.notes]
    return _section(
        "Students",
        element("div", table, class_="scroll"),
        element("ul", *notes, class_="notes soft") if notes else None,
        chart,
    )


def _cell(column: _Column, row: ReportRow, rows: Sequence[ReportRow]) -> Html:
    value, text = column.value(row), column.show(row)
    best = ""
    if column.marked and len(rows) > 1 and _real(value):
        # Equal as shown is equal: nobody should wonder why one of two 91.2 is better.
        highest = max(other for other in map(column.value, rows) if _real(other))
        best = " best" if f"{100 * value:.1f}" == f"{100 * highest:.1f}" else ""
    sort = f"{value}" if _known(value) else ""
    if column.kind == "name":
        wide = "name long" if len(text) > _LONGEST_WORD else "name"
        return element("th", text, scope="row", class_=wide, data_value=sort)
    content: Html | str = text
    if best:
        content = element("span", text, class_="best", title="best of the column")
    return element("td", content, class_=column.kind, data_value=sort)


def _known(value: float | str | None) -> bool:
    return isinstance(value, str) or _real(value)


def _real(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and math.isfinite(value)


# --- the charts -------------------------------------------------------------------------------


def _section(title: str, *children: Html | str | None) -> Html:
    return element("section", element("h2", title), *children)


def _figure(chart: Html, caption: str, legend: Html | None = None) -> Html:
    return element(
        "figure",
        legend,
        element("div", chart, class_="scroll"),
        element("figcaption", caption) if caption else None,
    )


def _ranking(report: Report) -> Html | None:
    if report.ranking is None or not report.ranking.sources:
        return None
    ranking = report.ranking
    what = "teachers' features" if ranking.on == "features" else "teachers' softmax outputs"
    size = ranking.probe.get("size")
    probe = f", on {size} probe images" if size is not None else ""
    caption = (
        f"{ranking.metric.upper()} of the {what} with the labels of the task{probe}; "
        "beside it the weight that distill-weighted gives each source."
    )
    return _section("Ranking", _figure(charts.ranking_bars(ranking), caption))


def _scatter(report: Report) -> Html | None:
    points = [point for point in report.score_points if all(map(math.isfinite, point[1:]))]
    if not points:
        return None
    metric = report.ranking.metric.upper() if report.ranking is not None else "source"
    caption = "Each point is a source: its score, and the accuracy of a student of this source alone."
    if len(points) >= _FEW_POINTS and (rho := _rank_correlation(points)) is not None:
        caption += f" Rank correlation {rho:.2f}".replace("-", "−") + f" over {len(points)} sources."
    return _section("Score against accuracy", _figure(charts.score_scatter(points, metric), caption))


def _rank_correlation(points: Sequence[tuple[str, float, float]]) -> float | None:
    """Spearman's, None where one side is constant."""
    from scipy.stats import spearmanr

    scores = [score for _, score, _ in points]
    accuracies = [accuracy for _, _, accuracy in points]
    if len(set(scores)) == 1 or len(set(accuracies)) == 1:
        return None
    return float(spearmanr(scores, accuracies).statistic)


def _curves(report: Report) -> Html | None:
    histories = {name: epochs for name, epochs in report.histories.items() if len(epochs)}
    if not histories:
        return None
    chart, legend = charts.training_curves(histories)
    caption = (
        "Mean over each epoch's steps. Losses of different methods are different sums: "
        "compare shapes, not heights."
    )
    return _section("Training", _figure(chart, caption, legend))


# --- commands and versions --------------------------------------------------------------------


def _commands(report: Report) -> Html | None:
    if not report.commands:
        return None
    steps = [
        element(
            "li",
            element("p", element("span", title), element("span", _spoken(seconds))),
            element("pre", *_words(command), tabindex="0"),
        )
        for title, command, seconds in report.commands
    ]
    hint = element("p", "One click selects a command.", class_="soft screen")
    return _section("Commands", hint, element("ol", *steps, class_="steps"))


def _words(command: str) -> list[Html | str]:
    """The command's words and the spaces between them; a line breaks in no word but a very long one."""
    return [
        element("span", piece) if not piece.isspace() and 0 < len(piece) <= _LONGEST_WORD else piece
        for piece in re.split(r"(\s+)", command)
    ]


def _versions(report: Report) -> Html | None:
    if not report.versions:
        return None
    pairs = [
        element("div", element("dt", name), element("dd", version))
        for name, version in report.versions.items()
    ]
    return _section("Versions", element("dl", *pairs, class_="versions"))
