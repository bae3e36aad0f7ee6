"""What a command gives: a value that a notebook shows, pandas takes and matplotlib draws."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, final

from kdcli.console import console, shown
from kdcli.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@final
@dataclass(frozen=True, slots=True)
class Table:
    """A table for people, on a terminal and in a notebook; numbers are texts, as rounded as they should be read.

    Attributes:
        header: names of the columns.
        rows: their cells.
        title: a line above.
        legend: what columns mean, by name.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    legend: Mapping[str, str] = field(default_factory=dict)


class Result(ABC):
    """Abstract: what every command gives.

    Attributes:
        bars: what :meth:`plot` draws of the records: the field that names a bar, its length, and, where there is one,
            half the length of its interval.
    """

    __slots__ = ()
    bars: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The JSON document that the command prints."""

    def records(self) -> Sequence[Mapping[str, Any]]:
        """The rows of :meth:`to_pandas`: those parts of the document that are of one kind, else all of it."""
        return (self.document(),)

    def tables(self) -> Sequence[Table]:
        """What the command prints for people; where nothing is chosen, the single values of the records."""
        rows = [flat(record) for record in self.records()]
        names = dict.fromkeys(
            name for row in rows for name, value in row.items() if not isinstance(value, list)
        )
        if len(rows) == 1:
            return (Table(("field", "is"), [(name, rows[0][name]) for name in names]),)
        return (Table(tuple(names), [[row.get(name, "-") for name in names] for row in rows]),)

    def to_pandas(self) -> "pandas.DataFrame":
        """The numbers of the JSON document: a row a record, a column a field; ``a.b`` is field b within a.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise MissingExtraError(
                "to_pandas() needs the package pandas, which is not installed",
                "pip install 'kdcli[notebook]'",
            ) from error
        return DataFrame([flat(record) for record in self.records()])

    def plot(self) -> "Figure":
        """A bar a record.

        Raises:
            UsageError: there is nothing to draw.
        """
        from kdcli.plotting import color_of, figure_of, style

        rows = [row for row in map(flat, self.records()) if self.bars and row.get(self.bars[1]) is not None]
        if not rows:
            raise UsageError(f"{type(self).__name__} has nothing to draw", "Look at its to_pandas().")
        name, value, *error = self.bars
        with style():
            figure = figure_of(6, 0.9 + 0.35 * len(rows))
            axes = figure.add_subplot()
            axes.barh(
                range(len(rows)),
                [row[value] for row in rows],
                xerr=[row.get(error[0]) or 0 for row in rows] if error else None,
                color=color_of(0),
            )
            axes.set_yticks(range(len(rows)), [shown(row[name]) for row in rows])
            axes.invert_yaxis()
            axes.set_xlabel(value.replace("_", " "))
        return figure

    def _repr_html_(self) -> str:
        """The tables, for notebooks; names are text and never markup."""
        return "".join(map(_html, self.tables())) or f"<p>{type(self).__name__}: nothing to list</p>"


def flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A document's fields in one level; an inner one is called ``OUTER.INNER``."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def say(tables: Sequence[Table]) -> None:
    """Tables on stdout, with a blank line between."""
    for number, table in enumerate(tables):
        if number:
            console.say()
        if table.title:
            console.say(table.title)
        console.table(table.header, table.rows)
        if table.legend:
            console.legend(**table.legend)


def _html(table: Table) -> str:
    heads = [(escape(shown(name)), table.legend.get(name)) for name in table.header]
    head = "".join(
        f'<th title="{escape(said)}">{name}</th>' if said else f"<th>{name}</th>" for name, said in heads
    )
    caption = f"<caption>{escape(shown(table.title))}</caption>" if table.title else ""
    rows = ("".join(f"<td>{escape(shown(cell))}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
