"""Representational similarity analysis: do two representations order pairs of images alike? (P2 §5.2)."""

import numpy as np
from jaxtyping import Float

from kdcli.errors import BadDataError
from kdcli.metrics.base import Metric
from kdcli.metrics.checks import RowName, check_images, row_number
from kdcli.metrics.pairs import Distance, pair_keys, prepare
from kdcli.metrics.ranks import centred_ranks, spearman, spearman_of_groups
from kdcli.metrics.targets import Labels, Targets


def rsa(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n k"],
    *,
    distance: Distance = "euclidean",
    row_name: RowName = row_number,
) -> float:
    """Spearman correlation of the distances of all pairs of images in two representations.

    As in Dwivedi and Roig 2019, where the reference ``y`` comes from a network trained on the target.

    Args:
        x: one row per image, any float type; computed in float64.
        y: the same images in the same order.
        distance: of both representations.
        row_name: names a row in errors.

    Returns:
        A score in [-1, 1]; 1 where all pairs are in the same order.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_images(len(x))
    if len(x) != len(y):
        raise BadDataError(
            f"the representations have {len(x)} and {len(y)} images",
            "Give both of the same images, in the same order.",
        )
    ranks = [centred_ranks(pair_keys(prepare(features, distance, row_name))) for features in (x, y)]
    return spearman(*ranks)


def rsa_labels(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    distance: Distance = "euclidean",
) -> float:
    """Spearman correlation of feature distances and label distances over all pairs of images.

    With ``distance="correlation"`` this is PARC (P2 reports other numbers for RSA and does not say in what
    it differs); the default therefore is the Euclidean distance. Labels are compared by 1 - Pearson of
    their one-hot or 0/1 rows, which orders one-hot rows as the Euclidean distance does.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, 0/1 rows, or ``Targets`` to share work between sources.
        distance: of the features.

    Returns:
        A score in [-1, 1]; higher means that images of one class lie closer together.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    targets = Targets.of(labels).beside(features)
    points = prepare(features, distance, targets.row_name)
    if targets.multi:
        return spearman(centred_ranks(pair_keys(points)), targets.pair_ranks)
    counts = targets.counts.astype(np.int64)
    return spearman_of_groups(pair_keys(points, targets.classes), int((counts * (counts - 1) // 2).sum()))


RSA = Metric(
    "rsa",
    rsa_labels,
    "P2 §5.2; Dwivedi and Roig 2019",
    "Euclidean, against labels",
    multi_label=True,
    scale_free=True,
    rotation_free=True,
    order_free=True,
    renaming_free=True,
)
