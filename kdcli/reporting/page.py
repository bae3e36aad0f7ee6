"""A document as one HTML page that needs nothing else: no server, no network."""

import base64
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from kdcli.console import duration
from kdcli.files import atomic_write_text, storage_errors
from kdcli.reporting.cells import Cell
from kdcli.reporting.document import (
    Chart,
    Column,
    Commands,
    Document,
    Facts,
    Fold,
    Gallery,
    Notes,
    Part,
    Picture,
    Section,
    Table,
)
from kdcli.reporting.drawing import inline, legend
from kdcli.reporting.markup import Html, element
from kdcli.reporting.style import SCRIPT, STYLE

GENERATOR = "kd report"
"""Content of the page's ``generator``: a page without it is not kd's."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_LONGEST_WORD = 48
_ONE_LINE = 14  # letters
_PHONE_LETTERS = 40
"""Letters in a line of a phone, about."""
_MARKS = {True: "✓", False: "✗", None: "·"}
_KINDS = {True: "right", False: "wrong", None: "other"}
"""Whether a model is right, of its mark."""


def write_page(document: Document, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError, NoSpaceError: the file cannot be written.
    """
    text = render(document)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def render(document: Document) -> str:
    """The page as text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=GENERATOR),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", document.title),
        element("style", Html(STYLE)),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", document.title),
            element("p", _tied(document.lead), class_="lead") if document.lead else None,
            _notes([_tied(line) for line in document.points]) if document.points else None,
            element("p", document.intro, class_="soft") if document.intro else None,
        ),
        element("main", *(_section(section) for section in document.sections)),
        element("footer", f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by kd."),
        element("script", Html(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _tied(text: str) -> str:
    """Text in which no line ends between a number and its percent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _section(section: Section) -> Html:
    return element("section", element("h2", section.title), *(_part(part) for part in section.parts))


def _part(part: Part) -> Html:
    match part:
        case Table():
            return _table(part)
        case Chart():
            return _chart(part)
        case Notes():
            return _notes(part.lines)
        case Commands():
            return _commands(part)
        case Facts():
            pairs = (element("div", element("dt", name), element("dd", value)) for name, value in part.pairs)
            return element("dl", *pairs, class_="versions")
        case Gallery():
            return _gallery(part)
        case Fold():
            return element("details", element("summary", part.summary), *(_part(each) for each in part.parts))


def _notes(lines: Sequence[str]) -> Html:
    return element("ul", *(element("li", line) for line in lines), class_="notes soft")


def _chart(chart: Chart) -> Html:
    return element(
        "figure",
        element("h3", chart.title) if chart.title else None,
        legend(chart.legend) if chart.legend else None,
        inline(chart),
        element("figcaption", chart.caption) if chart.caption else None,
    )


def _gallery(gallery: Gallery) -> Html:
    strips = [
        element(
            "div",
            element("p", title, class_="strip-title"),
            element("div", *(_picture(each) for each in pictures), class_="strip"),
            class_="row wide" if gallery.wide else "row",
        )
        for title, pictures in gallery.strips
    ]
    return element(
        "figure",
        element("h3", gallery.title) if gallery.title else None,
        *strips,
        element("figcaption", gallery.caption) if gallery.caption else None,
        class_="gallery",
    )


def _picture(picture: Picture) -> Html:
    source = f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"
    lines = [
        element(
            "li",
            element("span", _MARKS[each.right], class_=_KINDS[each.right]),
            element("span", each.model, class_="model"),
            element("span", _tied(each.answer)),
        )
        for each in picture.said
    ]
    return element(
        "div",
        element("img", src=source, alt=picture.truth or picture.place, title=picture.place,
                class_="pixelated" if picture.pixelated else None),
        element("p", picture.truth) if picture.truth else None,
        element("ul", *lines) if lines else None,
        class_="picture film" if picture.wide else "picture",
    )  # fmt: skip


# --- tables -----------------------------------------------------------------------------------


def _table(given: Table) -> Html:
    table = given.settled()
    heads = [
        element("th", element("button", column.title, type="button"), scope="col", class_=column.kind)
        for column in table.columns
    ]
    best = [_best(table, place) for place in range(len(table.columns))]
    lines = [
        element("tr", *(_cell(c, cell, b) for c, cell, b in zip(table.columns, row, best, strict=True)))
        for row in table.rows
    ]
    body = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *lines),
        class_="slim" if _is_slim(table) else None,
    )
    return Html(
        (element("h3", table.title) if table.title else "")
        + element("div", body, class_="scroll")
        + (_notes(table.notes) if table.notes else "")
        + _legend(given)
    )


def _is_slim(table: Table) -> bool:
    """Whether a table fits a phone as it is; of others a phone shows each row as a list."""
    widths = [
        max(len(text) for text in (*column.title.split(), *(row[place].text for row in table.rows)))
        for place, column in enumerate(table.columns)
    ]  # fmt: skip
    return sum(widths) + 2 * len(widths) <= _PHONE_LETTERS


def _legend(table: Table) -> Html:
    """What each column says; one whose title says all of it is left out."""
    pairs = [
        element("div", element("dt", column.title), element("dd", column.legend))
        for column in table.columns
        if column.legend
    ]
    return element(
        "details", element("summary", "What the columns say"), element("dl", *pairs), class_="legend-of"
    )


def _best(table: Table, place: int) -> str | None:
    """How the best number of a column reads, if one is to be marked."""
    column = table.columns[place]
    known = [(row[place].value, _mean(row[place])) for row in table.rows]
    numbers = [(value, text) for value, text in known if isinstance(value, float | int)]
    if column.best is None or len(table.rows) < 2 or not numbers:
        return None
    if len(numbers) > 1 and len({text for _, text in numbers}) == 1:
        return None  # all are the best
    value, text = max(numbers) if column.best == "high" else min(numbers)
    spreads = [(row[place].value, row[place].spread) for row in table.rows]
    own = next(spread for each, spread in spreads if each == value)
    if own is not None and any(
        isinstance(each, float | int)
        and each != value
        and abs(value - each) <= math.hypot(own, spread or 0.0)
        for each, spread in spreads
    ):
        return None  # chance may have put it first
    return text


def _mean(cell: Cell) -> str:
    return cell.text.partition(" ±")[0]


def _cell(column: Column, cell: Cell, best: str | None) -> Html:
    sort = "" if cell.value is None else f"{cell.value}"
    size = " long" if len(cell.text) > _LONGEST_WORD else " tight" if len(cell.text) <= _ONE_LINE else ""
    kind = f"{column.kind}{size}"
    if column.kind == "name":
        return element("th", cell.text, scope="row", class_=kind, data_value=sort)
    content: Html | str = cell.text
    # Equal as shown is equal: nobody should wonder why one of two 91.2 is better.
    if best is not None and cell.value is not None and _mean(cell) == best:
        content = element("span", cell.text, class_="best", title="best of the column")
    return element("td", content, class_=kind, data_value=sort, data_label=column.title)


# --- commands ---------------------------------------------------------------------------------


def _commands(commands: Commands) -> Html:
    steps = [
        element(
            "li",
            element(
                "p",
                element("span", step.title),
                element("span", spoken(step.seconds)) if step.seconds is not None else None,
            ),
            element("pre", *_words(step.line), tabindex="0"),
        )
        for step in commands.steps
    ]
    hint = element("p", "One click selects a command.", class_="soft screen")
    return Html(hint + element("ol", *steps, class_="steps"))


def spoken(seconds: float) -> str:
    """Seconds as a person reads them; few of them with a decimal."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _words(command: str) -> list[Html | str]:
    """The command's words and the spaces between them; a line breaks in no word but a very long one."""
    return [
        element("span", piece) if not piece.isspace() and 0 < len(piece) <= _LONGEST_WORD else piece
        for piece in re.split(r"(\s+)", command)
    ]
