"""Values of a table, each with what a person reads: numbers with their units, differences with their signs."""

import math
from dataclasses import dataclass
from typing import final


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


def percent(fraction: float | None, half: float | None = None) -> Cell:
    """A fraction in percent, with the half-width of its interval where that is known."""
    if fraction is None or not math.isfinite(fraction):
        return Cell(None, "–")
    text = f"{100 * fraction:.1f}"
    if half is None or not math.isfinite(half):
        return Cell(100 * fraction, text)
    return Cell(100 * fraction, f"{text} ± {100 * half:.1f}", 100 * half)


def points(fraction: float | None, digits: int = 1) -> Cell:
    """A difference of fractions in points, with its sign."""
    if fraction is None or not math.isfinite(fraction):
        return Cell(None, "–")
    return Cell(100 * fraction, f"{100 * fraction:+.{digits}f}".replace("-", "−"))


def number(value: float | None, digits: int = 1, unit: float = 1.0) -> Cell:
    """A number in units of ``unit``."""
    if value is None or not math.isfinite(value):
        return Cell(None, "–")
    return Cell(value / unit, f"{value / unit:,.{digits}f}".replace("-", "−"))


def word(text: str | None) -> Cell:
    """A word; an empty one counts as unknown."""
    return Cell(text or None, text or "")
