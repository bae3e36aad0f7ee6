"""Many transfers in a few numbers, as P3 reports them (section 5.1, Fig. 4 and 5, Tables 1, 7 and 8, B.4)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, final

import numpy as np
from jaxtyping import Float64

EQUAL_WITHIN = 0.01
"""Teachers whose accuracy is within one point of the student's count as equal [ours: P3 prints no threshold]."""
BINS = 5
"""Bins of Delta_acc [ours: P3 prints no number]."""
TOP_OF_BIN = 0.25
"""P3 reports the mean of the best quarter of each bin."""

Strength = Literal["weaker", "equal", "stronger"]
STRENGTHS: tuple[Strength, ...] = ("weaker", "equal", "stronger")
Item = TypeVar("Item")


@final
@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over pairs.

    Attributes:
        count: of pairs.
        mean: of them; None where there is none.
        std: population standard deviation (ddof 0), as in P3's Table 8; None where there is none.
    """

    count: int
    mean: float | None
    std: float | None


def mean_of(values: Iterable[float | None]) -> Mean:
    """Mean and population standard deviation of the values that there are (None is left out)."""
    known = np.asarray([value for value in values if value is not None], np.float64)
    if not len(known):
        return Mean(0, None, None)
    return Mean(len(known), float(known.mean()), float(known.std(ddof=0)))


def success_rate(deltas: Sequence[float]) -> float:
    """Share of transfers after which the student is better: Delta_transf strictly above 0 (P3 Fig. 4a).

    Args:
        deltas: at least one.
    """
    return sum(delta > 0 for delta in deltas) / len(deltas)


def success_rates(students: Sequence[str], deltas: Sequence[float]) -> dict[str, float]:
    """The success rate of each student over its teachers; P3 reports their median (:func:`median`)."""
    return {
        name: success_rate([delta for _, delta in pairs])
        for name, pairs in grouped(zip(students, deltas, strict=True), lambda pair: pair[0]).items()
    }


def median(values: Iterable[float]) -> float:
    """The median; of an even number the mean of the middle two."""
    return float(np.median(np.fromiter(values, np.float64)))


def grouped(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by key, keys in order of their first item."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def strength(delta_acc: float, equal_within: float = EQUAL_WITHIN) -> Strength:
    """What a teacher is to its student.

    Args:
        delta_acc: accuracy of the teacher less that of the student, as fractions.
        equal_within: largest difference, either way, that still counts as equal.
    """
    if abs(delta_acc) <= equal_within + 1e-12:  # 0.62 - 0.61 is a little more than 0.01
        return "equal"
    return "stronger" if delta_acc > 0 else "weaker"


@final
@dataclass(frozen=True, slots=True)
class Bin:
    """Transfers whose Delta_acc lies between two values.

    Attributes:
        low, high: of Delta_acc; ``high`` belongs to the next bin, but for the last one.
        count: transfers in it.
        top_mean: mean Delta_transf of the best quarter of them (at least one); None for an empty bin.
    """

    low: float
    high: float
    count: int
    top_mean: float | None


def edges(delta_acc: Sequence[float], bins: int = BINS) -> Float64[np.ndarray, " b1"]:
    """Edges of bins of equal width from the least to the greatest Delta_acc (P3 B.4: "equipartitions")."""
    low, high = min(delta_acc), max(delta_acc)
    return np.linspace(low, high, bins + 1) if high > low else np.asarray([low, high])


def binned(
    delta_acc: Sequence[float], delta_transf: Sequence[float], at: Float64[np.ndarray, " b1"]
) -> tuple[Bin, ...]:
    """Mean Delta_transf of the best quarter of each bin of Delta_acc (P3 Fig. 4b and 9).

    Args:
        delta_acc: of each transfer.
        delta_transf: of each transfer.
        at: edges, see :func:`edges`; the same for all methods that are compared.
    """
    bins = len(at) - 1
    place = np.clip(np.searchsorted(at, delta_acc, side="right") - 1, 0, bins - 1)
    values = np.asarray(delta_transf, np.float64)
    return tuple(
        Bin(float(at[b]), float(at[b + 1]), int((place == b).sum()), _best_quarter(values[place == b]))
        for b in range(bins)
    )


def _best_quarter(values: Float64[np.ndarray, " m"]) -> float | None:
    """Mean of the best quarter; of a number that 4 does not divide, rounded up."""
    if not len(values):
        return None
    return float(np.sort(values)[-math.ceil(TOP_OF_BIN * len(values)) :].mean())
