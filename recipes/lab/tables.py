"""A paper's printed results, and what was measured beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.errors import ConfigError, NotFoundError
from kdcli.reading_yaml import read_yaml

Measured = Mapping[str, Mapping[tuple[str, str], float]]
"""By table: values by row and column. What was not measured is left out."""
MEAN = "mean"
"""The column of means over the others."""


@final
class Partial(float):
    """A value over less than the paper's is over: it is shown, and not compared."""


@final
@dataclass(frozen=True, slots=True)
class Printed:
    """One table of a paper.

    Attributes:
        name: ``P2-1``.
        title: what it shows.
        place: in the paper.
        columns: from left to right.
        rows: values by row, None where the paper has none.
        decimals: that the paper prints.
    """

    name: str
    title: str
    place: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[float | None]]
    decimals: int = 1

    def value(self, row: str, column: str) -> float | None:
        """What is printed there."""
        return self.rows[row][self.columns.index(column)]


def read_printed(file: Path) -> dict[str, Printed]:
    """``printed.yaml``: tables by name, each with ``title``, ``place``, ``columns``, ``rows``, ``decimals``."""
    found = {}
    for name, fields in read_yaml(file).items():
        rows = fields["rows"]
        for row, values in rows.items():
            if len(values) != len(fields["columns"]):
                raise ConfigError(f"{file}: row '{row}' of {name} has {len(values)} values", "One a column.")
        found[name] = Printed(name, **{**fields, "columns": tuple(fields["columns"])})
    return found


def require_table(tables: Mapping[str, Printed], name: str) -> Printed:
    """The table of that name.

    Raises:
        NotFoundError: there is none.
    """
    if name not in tables:
        raise NotFoundError(f"the recipe has no table '{name}'", f"It has {', '.join(tables)}.")
    return tables[name]


def cells(table: Printed, measured: Measured) -> list[dict[str, Any]]:
    """Every cell: what is printed, what was measured, and measured - printed.

    A mean has a difference only where all that the paper averages was measured; a :class:`Partial` has none.
    """
    own = measured.get(table.name, {})
    found = []
    for row in table.rows:
        whole = all((row, column) in own for column in table.columns if table.value(row, column) is not None)
        for column in table.columns:
            printed, here = table.value(row, column), own.get((row, column))
            difference = None
            comparable = (whole or column != MEAN) and not isinstance(here, Partial)
            if printed is not None and here is not None and comparable:
                difference = here - printed
            found.append(
                {"table": table.name, "row": row, "column": column, "printed": printed, "measured": here,
                 "difference": difference}
            )  # fmt: skip
    return found


def text_rows(table: Printed, measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: measured, and in brackets printed and difference."""
    by_row: dict[str, list[str]] = {row: [row] for row in table.rows}
    for cell in cells(table, measured):
        by_row[cell["row"]].append(_text(cell, table.decimals))
    return ["measured (printed, difference)", *table.columns], list(by_row.values())


def means(
    values: Mapping[tuple[str, str], float], columns: Sequence[str], paper: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Column :data:`MEAN` of each row that has a value in all of ``columns``; the paper has it over ``paper``."""
    rows = dict.fromkeys(row for row, _ in values)
    kind = float if set(columns) >= set(paper) else Partial
    return {
        (row, MEAN): kind(sum(values[row, column] for column in columns) / len(columns))
        for row in rows
        if all((row, column) in values for column in columns)
    }


def _text(cell: Mapping[str, Any], decimals: int) -> str:
    here, printed, difference = cell["measured"], cell["printed"], cell["difference"]
    first = "-" if here is None else f"{here:.{decimals}f}"
    second = "-" if printed is None else f"{printed:.{decimals}f}"
    return f"{first} ({second})" if difference is None else f"{first} ({second}, {difference:+.{decimals}f})"
