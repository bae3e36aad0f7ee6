"""Accuracy of a linear classifier on the features, cross-validated (the probe of P1 and P2 as a score)."""

import warnings

import numpy as np
from jaxtyping import Float

from kdcli.metrics.base import Metric
from kdcli.metrics.spectrum import centred_columns
from kdcli.metrics.targets import Labels, Targets

FOLDS = 5


def linear_probe(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    seed: int = 0,
) -> float:
    """Mean accuracy of L2-regularised logistic regression (C = 1) on standardised features.

    Stratified folds: five, or as many as the smallest class has images. Columns are standardised within
    each training part.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, or ``Targets``.
        seed: of the folds.

    Returns:
        An accuracy in [0, 1].

    Raises:
        BadDataError: the score would be undefined, or multi-label targets; the message names the cause.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    targets = Targets.of(labels).single("The linear probe").beside(features)
    folds = StratifiedKFold(min(FOLDS, int(targets.counts.min())), shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps are part of the definition
        accuracies = cross_val_score(
            probe, centred_columns(features, targets.row_name), targets.classes, cv=folds
        )
    return float(accuracies.mean())


LINEAR_PROBE = Metric(
    "linear-probe",
    linear_probe,
    "P2 §5.1",
    "logistic regression, C = 1, 5 folds",
    scale_free=True,
    renaming_free=True,
)
