"""What a report consists of, whatever it is written as: sections of tables, charts, notes and commands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from kdcli.plotting import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        title: with the unit of its numbers.
        kind: how it is set: the row's name, a number, a word, or a remark.
        best: which of its numbers is marked; None marks none.
        setting: says how a row came about: for a reader, one that is the same in all rows becomes a note.
    """

    title: str
    kind: Literal["name", "number", "text", "note"] = "number"
    best: Literal["high", "low"] | None = None
    setting: bool = False


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One value.

    Attributes:
        value: what a table is sorted by and a CSV file holds, in the unit of the column; None is unknown.
        text: what a person reads.
        spread: half-width of the interval that the text gives, in the same unit.
    """

    value: float | str | None
    text: str
    spread: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values.

    Attributes:
        name: of its file.
        columns: at least one.
        rows: a cell for each column.
        title: above it; empty where the section's own says it.
        notes: below it, one line each: what a reader must know to read the numbers right.
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def trimmed(self) -> "Table":
        """The table without the columns that say nothing."""
        kept = [
            place
            for place, column in enumerate(self.columns)
            if column.kind == "name" or any(row[place].value is not None for row in self.rows)
        ]
        return Table(
            self.name,
            tuple(self.columns[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            self.title,
            self.notes,
        )

    def settled(self) -> "Table":
        """The table for a reader: settings that are the same in all of several rows are a note below it."""
        same = {
            place
            for place, column in enumerate(self.columns)
            if column.setting and len(self.rows) > 1 and len({row[place].text for row in self.rows}) == 1
        }
        if not same:
            return self
        said = [
            f"{column.title[0].lower()}{column.title[1:]} {self.rows[0][place].text}"
            for place, column in enumerate(self.columns)
            if place in same
        ]
        return Table(
            self.name,
            tuple(column for place, column in enumerate(self.columns) if place not in same),
            tuple(tuple(cell for place, cell in enumerate(row) if place not in same) for row in self.rows),
            self.title,
            (f"The same in all rows: {'; '.join(said)}.", *self.notes),
        )


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """One entry of a legend.

    Attributes:
        text: what the mark stands for.
        color: number of a colour of the series, or ``"ink"``.
        shape: a marker of matplotlib among ``o D s`` and ``-D-`` (on its interval); empty for a line.
        dashes: of a line.
        width: of a line.
    """

    text: str
    color: int | Literal["ink"]
    shape: str = ""
    dashes: tuple[float, ...] = ()
    width: float = 1.8


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """A picture.

    Attributes:
        name: of its file, and of its ids in a page.
        label: for those who cannot see it.
        draw: makes it, in the colours given.
        caption: below it.
        legend: above it.
        title: above it; empty where the section's own says it.
    """

    name: str
    label: str
    draw: Callable[[Look], "Figure"]
    caption: str = ""
    legend: tuple[Mark, ...] = ()
    title: str = ""


@final
@dataclass(frozen=True, slots=True)
class Notes:
    """Remarks, one line each."""

    lines: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Command:
    """One step: what it is for, the exact shell command, and the seconds it took where they are known."""

    title: str
    line: str
    seconds: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Commands:
    """Steps in their order."""

    steps: tuple[Command, ...]


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, such as versions."""

    pairs: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True, slots=True)
class Fold:
    """Parts that a reader opens when wanted; on paper they are open."""

    summary: str
    parts: "tuple[Part, ...]"


Part = Table | Chart | Notes | Commands | Facts | Fold


@final
@dataclass(frozen=True, slots=True)
class Section:
    """A title and what is below it."""

    title: str
    parts: tuple[Part, ...]


@final
@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    Attributes:
        title: of it.
        lead: what was found, in sentences.
        intro: what was done, on what.
        sections: in order; none is empty.
    """

    title: str
    lead: str
    intro: str
    sections: tuple[Section, ...]

    def tables(self) -> Iterator[tuple[Section, Table]]:
        """All tables with their section."""
        return ((section, part) for section, part in self._parts() if isinstance(part, Table))

    def charts(self) -> Iterator[tuple[Section, Chart]]:
        """All charts with their section."""
        return ((section, part) for section, part in self._parts() if isinstance(part, Chart))

    def _parts(self) -> Iterator[tuple[Section, Part]]:
        for section in self.sections:
            for part in _flat(section.parts):
                yield section, part


def _flat(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, Fold):
            yield from _flat(part.parts)
        else:
            yield part


def percent(fraction: float | None, half: float | None = None) -> Cell:
    """A fraction in percent, with the half-width of its interval where that is known."""
    if fraction is None or not _finite(fraction):
        return Cell(None, "–")
    text = f"{100 * fraction:.1f}"
    if half is None or not _finite(half):
        return Cell(100 * fraction, text)
    return Cell(100 * fraction, f"{text} ± {100 * half:.1f}", 100 * half)


def points(fraction: float | None, digits: int = 1) -> Cell:
    """A difference of fractions in points, with its sign."""
    if fraction is None or not _finite(fraction):
        return Cell(None, "–")
    return Cell(100 * fraction, f"{100 * fraction:+.{digits}f}".replace("-", "−"))


def number(value: float | None, digits: int = 1, unit: float = 1.0) -> Cell:
    """A number in units of ``unit``."""
    if value is None or not _finite(value):
        return Cell(None, "–")
    return Cell(value / unit, f"{value / unit:,.{digits}f}".replace("-", "−"))


def word(text: str | None) -> Cell:
    """A word; an empty one says nothing."""
    return Cell(text or None, text or "")


def _finite(value: float) -> bool:
    return value - value == 0
