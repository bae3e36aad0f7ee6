"""PARC: do images with equal labels have similar representations? (P2 §4.1, after Bolya et al. 2021)."""

from dataclasses import replace
from functools import partial
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Float

from kdcli.metrics.base import Metric
from kdcli.metrics.pairs import Distance
from kdcli.metrics.rsa import rsa_labels
from kdcli.metrics.spectrum import centred_columns, principal_scores, standardised
from kdcli.metrics.targets import Labels, Targets

Variant = Literal["plain", "standardised", "bolya"]
"""What is done to the features first (trap T2): nothing, columns to variance 1, or PCA and then that."""

_DISTANCE: Distance = "correlation"


def parc(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    variant: Variant = "plain",
    components: int = 32,
) -> float:
    """Spearman correlation of feature distances and label distances over all pairs of images.

    PARC(phi, Y) = spear({D_phi[i, j]}, {D_Y[i, j]}), i < j, with D = 1 - Pearson between rows: the two
    unnumbered equations of P2 §4.1. Between one-hot rows D_Y takes two values (0, and 1 + 1/(C-1)); only
    their order matters to ranks, so it is exact here: same class or not. Labels of multi-label images are
    0/1 rows, compared as they are.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, 0/1 rows, or ``Targets`` to share work between sources.
        variant: ``plain`` as in P2; ``standardised``: each column to mean 0 and variance 1;
            ``bolya``: as in Bolya et al. 2021, PCA first and the components standardised. The PCA is exact
            (theirs is randomised), and leaves out components without variance.
        components: of the PCA of ``bolya``.

    Returns:
        A score in [-1, 1]; higher means that images of one class lie closer together.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    targets = Targets.of(labels).beside(features)
    match variant:
        case "plain":
            pass
        case "standardised":
            features = standardised(centred_columns(features, targets.row_name))
        case "bolya":
            features = standardised(principal_scores(centred_columns(features, targets.row_name), components))
        case _:
            assert_never(variant)
    return rsa_labels(features, targets, distance=_DISTANCE)


PARC = Metric(
    "parc",
    parc,
    "P2 §4.1; Bolya et al. 2021",
    "plain",
    multi_label=True,
    scale_free=True,
    order_free=True,
    renaming_free=True,
)
STANDARDISED = replace(
    PARC,
    name="parc-standardised",
    score=partial(parc, variant="standardised"),
    settings="columns standardised",
)
BOLYA = replace(
    PARC,
    name="parc-bolya",
    score=partial(parc, variant="bolya"),
    source="Bolya et al. 2021",
    settings="exact PCA to 32, then columns standardised",
)
