"""PARC: do images with equal labels have similar representations? (P2 §4.1, after Bolya et al. 2021)."""

import math

import numpy as np
from jaxtyping import Float, Float64, Int

from kdcli.errors import BadDataError
from kdcli.metrics.checks import (
    RowName,
    check_classes,
    check_finite,
    check_images,
    check_rows_vary,
    row_number,
)

DIGITS = 12
"""Decimals of a correlation that count. Distances that are equal in exact arithmetic differ by about
1e-15 after a matrix product; unrounded, Spearman would rank that noise (trap T1)."""


def parc(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, row_name: RowName = row_number
) -> float:
    """Spearman correlation of feature distances and label distances over all pairs of images.

    PARC(phi, Y) = spear({D_phi[i, j]}, {D_Y[i, j]}), i < j, with D = 1 - Pearson between rows: the two
    unnumbered equations of P2 §4.1. This is the variant ``plain``: features are neither standardised nor
    reduced; a variant is a map of the features before this function. Between one-hot rows D_Y takes two
    values (0, and 1 + 1/(C-1)); only their order matters to ranks, so it is exact here: same class or not.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, >= 0.
        row_name: names a row in errors.

    Returns:
        A score in [-1, 1]; higher means that images of one class lie closer together.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_images(len(features))
    check_classes(labels)
    check_finite(features, row_name)
    check_rows_vary(features, row_name)
    order = np.argsort(labels, kind="stable")
    values, same = pair_correlations(features[order], labels[order])
    return _spearman_against_groups(values, same)


def pair_correlations(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " pairs"], int]:
    """Pearson correlations of all pairs of rows, in units of 1e-12, pairs of one class first.

    Args:
        features: rows in the order of their labels; no row is constant.
        labels: sorted ascending, so that a class is one block of the matrix.

    Returns:
        The n(n-1)/2 values as whole numbers (equal correlations are equal values), and how many
        of them, at the front, are of one class.
    """
    rows = features.astype(np.float64)
    rows /= np.abs(rows).max(axis=1, keepdims=True)  # squares must not over- or underflow
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gram = rows @ rows.T
    n = len(rows)
    ends = np.searchsorted(labels, labels, side="right")
    # Copying row slices touches half of the matrix once; index arrays would be twice its size.
    slices = [gram[i, i + 1 : ends[i]] for i in range(n)] + [gram[i, ends[i] :] for i in range(n)]
    values = np.concatenate(slices)
    values *= 10.0**DIGITS
    np.rint(values, out=values)
    return values, int((ends - np.arange(1, n + 1)).sum())


def _spearman_against_groups(values: Float64[np.ndarray, " pairs"], front: int) -> float:
    """Spearman correlation of -values with 0 for the first ``front`` of them and 1 for the others.

    With two groups it depends only on the rank sum R of one of them: cov = (R - front (N+1)/2) / N.
    Mid-ranks doubled are whole numbers, so everything up to the last line is exact.

    Args:
        values: similarities; sorted in place.
        front: size of the first group, 0 < front < N.
    """
    first = np.sort(values[:front])
    values.sort()
    count = len(values)
    below = np.searchsorted(values, first, side="left")
    up_to = np.searchsorted(values, first, side="right")
    rank_sum_twice = int((below + up_to + 1).sum())
    # Variance of mid-ranks: (N^3 - N - sum over ties of (t^3 - t)) / 12, in Python's unbounded integers.
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    sizes, times = np.unique(np.diff(starts, append=count), return_counts=True)
    groups = zip(sizes.tolist(), times.tolist(), strict=True)
    ties = sum(how_many * (size**3 - size) for size, how_many in groups)
    spread_of_ranks = (count**3 - count - ties) / 12
    spread_of_groups = front * (count - front) / count
    if spread_of_ranks == 0:
        raise BadDataError(
            "all images are equally far apart in this representation, so there is nothing to rank",
            "Use more images or another representation.",
        )
    score = (rank_sum_twice - front * (count + 1)) / 2 / math.sqrt(spread_of_ranks * spread_of_groups)
    return min(1.0, max(-1.0, score))
