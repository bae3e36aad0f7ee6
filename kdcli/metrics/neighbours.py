"""kNN: do the nearest other images have the same label? (Bolya et al. 2021, §4)."""

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError
from kdcli.metrics.base import Metric
from kdcli.metrics.pairs import prepare
from kdcli.metrics.targets import Labels, Targets

_ROWS = 512


def knn(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    *,
    neighbours: int = 1,
) -> float:
    """Leave-one-out accuracy of the k nearest neighbours in Euclidean distance.

    All images as near as the k-th vote, and classes with equally many votes share the image: no score
    depends on the order of images, nor on which of two duplicates comes first.

    Args:
        features: one row per image, any float type; computed in float64.
        labels: class index of each image, or ``Targets``.
        neighbours: k, below the number of images.

    Returns:
        An accuracy in [0, 1].

    Raises:
        BadDataError: the score would be undefined, or multi-label targets; the message names the cause.
    """
    targets = Targets.of(labels).single("kNN").beside(features)
    n = len(features)
    if not 0 < neighbours < n:
        raise BadDataError(
            f"{n} images do not have {neighbours} neighbours each", f"Ask for 1 to {n - 1} neighbours."
        )
    points = prepare(features, "euclidean", targets.row_name)
    votes, correct = targets.rows, np.empty(n)
    for start in range(0, n, _ROWS):
        part = slice(start, start + _ROWS)
        distances = points.between(part, slice(n))
        distances[np.arange(len(distances)), np.arange(n)[part]] = np.inf  # no image is its own neighbour
        furthest = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1, None]
        correct[part] = _share((distances <= furthest) @ votes, targets.classes[part])
    return float(correct.mean())


def _share(counts: Float64[np.ndarray, "m c"], classes: np.ndarray) -> Float64[np.ndarray, " m"]:
    """1 over the number of classes with most votes where the right one is among them, else 0."""
    winners = counts == counts.max(axis=1, keepdims=True)
    return np.asarray(winners[np.arange(len(classes)), classes] / winners.sum(axis=1))


KNN = Metric(
    "knn",
    knn,
    "Bolya et al. 2021, §4",
    "leave-one-out, k = 1, Euclidean",
    scale_free=True,
    rotation_free=True,
    order_free=True,
    renaming_free=True,
)
