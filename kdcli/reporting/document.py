"""What a report consists of, whatever it is written as: sections of tables, charts, notes and commands."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, final

from kdcli.plotting import Look
from kdcli.reporting.cells import Cell
from kdcli.reporting.glossary import GLOSSARY

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
        setting: how a row was made. One that is the same in all rows becomes a note below the table.
        about: what it says, where the glossary does not know its title.
    """

    title: str
    kind: Literal["name", "number", "text", "note"] = "number"
    best: Literal["high", "low"] | None = None
    setting: bool = False
    about: str = ""

    @property
    def legend(self) -> str:
        """What it says, in a line."""
        return self.about or GLOSSARY.get(self.title, "")


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
        """The table without its empty columns."""
        kept = [
            place
            for place, column in enumerate(self.columns)
            if column.kind == "name" or any(row[place].value is not None for row in self.rows)
        ]
        return self._only(kept)

    def settled(self) -> "Table":
        """The table for a reader: settings that are the same in all of several rows are a note below it."""
        said, kept = [], []
        for place, column in enumerate(self.columns):
            if column.setting and len(self.rows) > 1 and len({row[place].text for row in self.rows}) == 1:
                what, _, unit = column.title.partition(", ")
                said.append(f"{what[0].lower()}{what[1:]} {self.rows[0][place].text} {unit}".rstrip())
            else:
                kept.append(place)
        if not said:
            return self
        notes = (f"The same in all rows: {'; '.join(said)}.", *self.notes)
        return replace(self._only(kept), notes=notes)

    def _only(self, places: Sequence[int]) -> "Table":
        return replace(
            self,
            columns=tuple(self.columns[place] for place in places),
            rows=tuple(tuple(row[place] for place in places) for row in self.rows),
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


@final
@dataclass(frozen=True, slots=True)
class Said:
    """What a model said of an image: its answer with the probability, and whether that is right (None: unknown)."""

    model: str
    answer: str
    right: bool | None


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """A thumbnail.

    Attributes:
        jpeg: its bytes.
        truth: true class; empty where the strip says it.
        place: what a person calls the image.
        said: by the models.
        pixelated: whether it is a small image that is shown enlarged.
        wide: whether it is more than twice as wide as high, as the frames of a clip are.
    """

    jpeg: bytes
    truth: str
    place: str
    said: tuple[Said, ...] = ()
    pixelated: bool = False
    wide: bool = False


@final
@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures in strips, each with its title.

    Attributes:
        strips: title and pictures.
        title: above; empty where the section's own says it.
        caption: below.
        wide: whether each strip has lines of its own below its title, instead of standing beside it.
    """

    strips: tuple[tuple[str, tuple[Picture, ...]], ...]
    title: str = ""
    caption: str = ""
    wide: bool = False


Part = Table | Chart | Notes | Commands | Facts | Fold | Gallery


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
        points: more of what was found, a line each.
    """

    title: str
    lead: str
    intro: str
    sections: tuple[Section, ...]
    points: tuple[str, ...] = ()

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


Columns = Mapping[Column, Callable[[Any], Cell]]
"""The columns of a table, each with what it shows of an item."""


def tabulate(
    name: str,
    items: Iterable[Any],
    columns: Columns,
    title: str = "",
    notes: tuple[str, ...] = (),
) -> Table:
    """A table with a row for each item, without empty columns.

    Args:
        name: of the table's file.
        items: in the order of the rows.
        columns: in their order.
        title: above the table.
        notes: below it.
    """
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return Table(name, tuple(columns), rows, title, notes).trimmed()
