"""LogME: log evidence of the labels under a Bayesian linear model of the features (You et al. 2021)."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError
from kdcli.metrics.base import Metric
from kdcli.metrics.checks import check_columns_vary, check_finite
from kdcli.metrics.kernels import largest
from kdcli.metrics.spectrum import principal_scores
from kdcli.metrics.targets import Labels, Targets

_STABILISER = 1e-5
"""Added to both denominators by the authors: without it alpha or beta is infinite for useless or perfect
features."""


def logme(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    steps: int = 11,
    tolerance: float = 1e-3,
) -> float:
    """Maximum evidence of each class's 0/1 labels, by the authors' fixed-point iteration.

    The evidence is Eq. 2 of You et al. 2021; the fixed point of alpha and beta is Algorithm 1 of its
    journal version, "Ranking and Tuning Pre-trained Models" (2022), with its stopping rule as default.

    Two ways in which numbers differ from what one may expect:

    * From the authors' code (thuml/LogME), wherever there are more columns than images: it leaves the d - n directions
      without variance out of d/2 log alpha - 1/2 log det A, where Eq. 2 has all d. They cancel there, and here; in
      that code they do not, so its scores of wide features are not the evidence.
    * From the largest evidence, where the iteration ends before it gets there. Eleven steps are enough for more
      images than columns (5e-5 too low in our trials), but not for fewer (0.01 too low): ``--logme-steps 100``. What is
      left then, some 1e-3 at most, is the ``1e-5`` that the authors add to both denominators.

    Args:
        features: one row per image, any float type; computed in float64, neither centred nor scaled.
        labels: class index of each image, or ``Targets``.
        steps: iterations at most.
        tolerance: stop where alpha / beta changes relatively less.

    Returns:
        Log evidence per image, mean over classes; any sign, higher is better.

    Raises:
        BadDataError: the score would be undefined, or multi-label targets; the message names the cause.
    """
    targets = Targets.of(labels).single("LogME").beside(features)
    check_finite(features, targets.row_name)
    check_columns_vary(features)
    greatest = largest(features)
    if not 1e-70 < greatest < 1e70:
        raise BadDataError(
            f"values as large as {greatest:g} over- or underflow when squared, and LogME does depend on scale",
            "Scale the features of all sources alike.",
        )
    scores = principal_scores(features.astype(np.float64))
    variances = np.einsum("ij,ij->j", scores, scores)
    projected = (scores.T @ targets.rows) ** 2 / variances[:, None]
    evidences = [
        _evidence(variances, column, float(count), len(features), steps, tolerance)
        for column, count in zip(projected.T, targets.counts, strict=True)
    ]
    return math.fsum(evidences) / len(evidences)


def _evidence(
    variances: Float64[np.ndarray, " k"],
    projected: Float64[np.ndarray, " k"],
    squares: float,
    n: int,
    steps: int,
    tolerance: float,
) -> float:
    """Evidence of one class per image.

    Args:
        variances: squared singular values of the features.
        projected: squared coordinates of the 0/1 labels along the left singular vectors.
        squares: squared length of the 0/1 labels.
        n: images.
        steps: iterations at most.
        tolerance: relative change of alpha / beta to stop at.
    """
    outside = max(0.0, squares - float(projected.sum()))
    alpha = beta = 1.0
    for _ in range(steps):
        ratio = alpha / beta
        shrunk = projected / (variances + ratio) ** 2
        weights = float((variances * shrunk).sum())  # squared length of their posterior mean
        residual = float(shrunk.sum()) * ratio**2 + outside
        effective = float((variances / (variances + ratio)).sum())
        alpha = effective / (weights + _STABILISER)
        beta = (n - effective) / (residual + _STABILISER)
        if abs(alpha / beta - ratio) <= tolerance * ratio:
            break
    # d/2 log alpha - 1/2 log det A without the directions in which the features have no variance
    volume = -float(np.log1p(variances * beta / alpha).sum()) / 2
    fit = -(beta * residual + alpha * weights) / 2
    return (volume + fit) / n + math.log(beta / (2 * math.pi)) / 2


def _stepped(steps: int) -> Metric:
    return replace(LOGME, score=partial(logme, steps=steps), settings=f"fixed point, {steps} steps")


LOGME = Metric(
    "logme",
    logme,
    "You et al. 2021, Eq. 2",
    "fixed point, 11 steps",
    rotation_free=True,
    order_free=True,
    renaming_free=True,
    stepped=_stepped,
)
