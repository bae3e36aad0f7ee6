"""Centred and standardised columns, and principal components by the smaller of the two Gram matrices."""

import numpy as np
from jaxtyping import Float, Float64
from scipy.linalg import eigh

from kdcli.metrics.checks import RowName, check_columns_vary, check_finite, row_number
from kdcli.metrics.kernels import magnitude


def centred_columns(
    features: Float[np.ndarray, "n d"], row_name: RowName = row_number
) -> Float64[np.ndarray, "n d"]:
    """Columns of mean 0, with 1 as the largest absolute value of all: for metrics that have no scale.

    Raises:
        BadDataError: values that are not finite, or only equal rows.
    """
    check_finite(features, row_name)
    check_columns_vary(features)
    columns = features.astype(np.float64)
    columns /= magnitude(columns)
    columns -= columns[0]  # exact for close values, so that a common offset changes no bit of what follows
    columns -= columns.mean(axis=0)
    columns /= max(columns.max(), -columns.min())  # a large common offset leaves small differences
    return columns


def principal_scores(x: Float64[np.ndarray, "n d"], limit: int | None = None) -> Float64[np.ndarray, "n k"]:
    """Coordinates of the rows along their principal directions (U S of the singular values), largest first.

    Directions without variance beyond rounding are left out. Signs are those of scikit-learn's PCA: the
    largest entry of a direction is positive.

    Args:
        x: rows; centre them first for a PCA.
        limit: at most so many directions.
    """
    n, d = x.shape
    wide = n < d
    size = min(n, d)
    kept = size if limit is None else min(limit, size)
    values, vectors = eigh(x @ x.T if wide else x.T @ x, subset_by_index=(size - kept, size - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    above_noise = values > values[0] * max(n, d) * np.finfo(np.float64).eps
    values, vectors = values[above_noise], vectors[:, above_noise]
    directions = x.T @ vectors if wide else vectors
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(len(values))])
    scores = vectors * np.sqrt(values) if wide else x @ vectors
    return np.asarray(scores * signs)


def standardised(x: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Columns of mean 0 and variance 1 (over n); columns that are constant up to rounding become 0."""
    centred: Float64[np.ndarray, "n d"] = x - x.mean(axis=0)
    spread = centred.std(axis=0)
    # A constant column is one up to the rounding of its own mean, or of the largest column's.
    noise = 1e-12 * np.maximum(np.abs(x).max(axis=0), np.abs(x).max() * 1e-3)
    centred /= np.where(spread > noise, spread, np.inf)
    return centred
