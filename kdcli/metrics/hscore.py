"""Regularised H-score: how far apart class means lie, relative to a shrunk covariance of the features."""

import numpy as np
from jaxtyping import Float

from kdcli.metrics.base import Metric
from kdcli.metrics.spectrum import centred_columns, principal_scores
from kdcli.metrics.targets import Labels, Targets


def hscore(features: Float[np.ndarray, "n d"], labels: Labels) -> float:
    """tr(cov_a(f)⁻¹ (1 - a) cov(E[f | y])) (Bao et al. 2019; shrinkage: Ibrahim et al. 2021, Eq. 3).

    cov_a(f) = (1 - a) S + a tr(S)/d I, with S over n and a by Ledoit and Wolf 2004; the covariance of class
    means is over n - 1, as in the published code. Computed along the principal directions: outside of
    them class means do not differ, so no d x d matrix is needed.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, or ``Targets``.

    Returns:
        At least 0, up to about the number of classes minus 1; higher is better.

    Raises:
        BadDataError: the score would be undefined, or multi-label targets; the message names the cause.
    """
    targets = Targets.of(labels).single("The H-score").beside(features)
    centred = centred_columns(features, targets.row_name)
    n, d = centred.shape
    scores = principal_scores(centred)
    variances = np.einsum("ij,ij->j", scores, scores) / n
    lengths = np.einsum("ij,ij->i", centred, centred)
    shrinkage = _ledoit_wolf(float((lengths**2).sum()) / n, variances, n, d)
    sums = targets.rows.T @ scores
    between = (sums**2 / targets.counts[:, None]).sum(axis=0) / (n - 1)
    within = (1 - shrinkage) * variances + shrinkage * variances.sum() / d
    return float(((1 - shrinkage) * between / within).sum())


def _ledoit_wolf(fourth: float, variances: Float[np.ndarray, " k"], n: int, d: int) -> float:
    """Shrinkage in [0, 1] towards tr(S)/d I that minimises the expected error (Ledoit and Wolf 2004, Eq. 9).

    Args:
        fourth: mean fourth power of the rows' lengths.
        variances: eigenvalues of S that are not 0.
        n: rows.
        d: columns.
    """
    squares = float((variances**2).sum())
    distance = squares - float(variances.sum()) ** 2 / d
    error = (fourth - squares) / n
    return min(1.0, max(0.0, error / distance)) if distance > 1e-12 * squares else 0.0


HSCORE = Metric(
    "hscore",
    hscore,
    "Ibrahim et al. 2021, Eq. 3",
    "Ledoit-Wolf shrinkage",
    scale_free=True,
    rotation_free=True,
    order_free=True,
    renaming_free=True,
)
