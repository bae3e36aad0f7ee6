"""Calibration: whether predictions that a model makes with 80 % confidence are right in 80 % of the cases."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int64

BINS = 10


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Predictions in bins of equal width by their confidence (Guo et al., ICML 2017, section 2).

    Attributes:
        counts: predictions in each bin.
        confidence: mean of each bin; NaN of an empty one.
        accuracy: share of each bin that is right; NaN of an empty one.
    """

    counts: Int64[np.ndarray, " b"]
    confidence: Float[np.ndarray, " b"]
    accuracy: Float[np.ndarray, " b"]

    @property
    def error(self) -> float:
        """The expected calibration error (their eq. 3), a fraction: bins' mean distance from the diagonal."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


def reliability(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS
) -> Reliability:
    """Sort predictions into bins: the k-th holds confidences above k/bins, up to (k+1)/bins.

    Args:
        confidence: probability of the predicted class, 0 to 1; of one image at least.
        right: whether it is the true one.
        bins: how many.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(place, confidence, bins) / counts
        shares = np.bincount(place, right.astype(np.float64), bins) / counts
    return Reliability(counts, means, shares)
