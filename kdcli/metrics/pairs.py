"""Distances of all pairs of images as whole numbers, so that equal distances are equal (trap T1)."""

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Float, Float64, Int32, Int64

from kdcli.metrics.checks import RowName, check_columns_vary, check_finite, check_rows_vary, row_number
from kdcli.metrics.kernels import magnitude
from kdcli.metrics.threads import parallel_map

Distance = Literal["correlation", "euclidean"]
"""1 - Pearson correlation, or the Euclidean distance (ranked by its square, which has the same order)."""

RESOLUTION = 1e12
"""Steps per unit of distance. Distances that are equal in exact arithmetic differ by about 1e-15 after a
matrix product; unrounded, Spearman would rank that noise (trap T1)."""

_ORIGIN = 1024
"""Parts of the spread that the origin of Euclidean distances is a multiple of."""

_BLOCK = 256
"""Rows at a time: the block of the distance matrix stays in the processor's cache."""


@final
@dataclass(frozen=True, eq=False)
class Points:
    """Rows prepared for their distances.

    Attributes:
        rows: centred rows; for correlations of unit length.
        squares: their squared lengths; None where distances are 1 - inner products.
        steps: per unit of distance.
    """

    rows: Float64[np.ndarray, "n d"]
    squares: Float64[np.ndarray, " n"] | None
    steps: float

    def between(self, some: slice, others: slice) -> Float64[np.ndarray, "m k"]:
        """Distances in steps, as whole numbers, up to the same number for all of them."""
        block: Float64[np.ndarray, "m k"] = self.rows[some] @ self.rows[others].T
        if self.squares is None:
            block *= -self.steps
        else:
            block *= -2
            block += self.squares[some, None]
            block += self.squares[others]
            block *= self.steps
        np.rint(block, out=block)
        return np.asarray(block)


def prepare(features: Float[np.ndarray, "n d"], distance: Distance, row_name: RowName = row_number) -> Points:
    """Scale rows for a distance, in float64 whatever type they have.

    Euclidean steps are relative to the mean squared length of the centred rows. Of values with few digits, as fp16
    has, distances are exact: the origin has few digits, too, and nothing is scaled but by powers of two.

    Raises:
        BadDataError: values that are not finite; for ``correlation`` a constant row, for ``euclidean``
            only equal rows.
    """
    if distance == "correlation":
        return Points(_unit_rows(features, row_name), None, RESOLUTION)
    check_finite(features, row_name)
    check_columns_vary(features)
    rows = features.astype(np.float64)
    rows /= magnitude(rows)
    means = rows.mean(axis=0)
    spread = np.ldexp(
        1.0, np.frexp(max((rows.max(axis=0) - means).max(), (means - rows.min(axis=0)).max()))[1]
    )
    rows -= np.rint(means / spread * _ORIGIN) / _ORIGIN * spread
    rows /= spread
    squares = np.einsum("ij,ij->i", rows, rows)
    # Whole numbers of float64 are exact up to 9e15: rows far from all others must not exceed that.
    return Points(rows, squares, RESOLUTION / max(squares.mean(), squares.max() / 1000))


def _unit_rows(features: Float[np.ndarray, "n d"], row_name: RowName) -> Float64[np.ndarray, "n d"]:
    """Rows of mean 0 and length 1: their inner products are correlations."""
    if features.shape[1] == 0:
        check_finite(features, row_name)
    rows = np.empty(features.shape)

    def fill(start: int) -> bool:
        block = rows[start : start + _BLOCK]
        block[:] = features[start : start + _BLOCK]
        high, low = block.max(axis=1, keepdims=True), block.min(axis=1, keepdims=True)
        if not (np.isfinite(high) & np.isfinite(low) & (high > low)).all():
            return False
        block /= magnitude(block, axis=1)
        block -= block.mean(axis=1, keepdims=True)
        length = np.sqrt(np.einsum("ij,ij->i", block, block))
        block /= length[:, None]
        return True

    starts = range(0, len(rows), _BLOCK)
    with parallel_map(len(starts)) as (over, _):
        sound = all(list(over(fill, starts)))
    if not sound:
        check_finite(features, row_name)
        check_rows_vary(features, row_name)
    return rows


def pair_keys(points: Points, classes: Int32[np.ndarray, " n"] | None = None) -> Int64[np.ndarray, " pairs"]:
    """Distances of all pairs i < j, row after row, in steps; equal distances are equal numbers.

    Args:
        points: prepared rows.
        classes: if given, a number is twice the distance, plus 1 where the classes differ: sorted, pairs
            of one class come first among equal distances.
    """
    n = len(points.rows)
    keys = np.empty(n * (n - 1) // 2, np.int64)

    def fill(start: int) -> None:
        stop = min(start + _BLOCK, n)
        block = points.between(slice(start, stop), slice(start, n))
        if classes is not None:
            block *= 2
            block += classes[start:stop, None] != classes[start:]
        for row in range(start, stop):
            first = row * (2 * n - row - 1) // 2
            keys[first : first + n - row - 1] = block[row - start, row - start + 1 :]

    starts = range(0, n, _BLOCK)
    with parallel_map(len(starts)) as (over, _):
        list(over(fill, starts))
    return keys
