"""Which test images a probe gets right: top-1, top-5 and class by class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

TOP = 5
_CHUNK = 4096

Decide = Callable[[Float64[np.ndarray, "m d"]], Float64[np.ndarray, "m c"]]
"""From features of images to a score of every class; -inf for a class that is out of the question."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """What one classifier got right.

    Attributes:
        top1: of each test image, whether its class has the highest score; of ties the first class counts.
        top5: whether its class is among the best five; None where there are no more than five classes.
    """

    top1: Bool[np.ndarray, " m"]
    top5: Bool[np.ndarray, " m"] | None


def mark(
    decide: Decide,
    classes: Int64[np.ndarray, " c"],
    test: Float[np.ndarray, "m d"],
    labels: Int64[np.ndarray, " m"],
) -> Marks:
    """Test a classifier.

    Args:
        decide: the classifier.
        classes: class index of each of its scores, ascending.
        test: features of the test images.
        labels: class index of each, one of ``classes``.
    """
    ranks = np.empty(len(test), np.int64)
    columns = np.arange(len(classes))
    for start in range(0, len(test), _CHUNK):  # a float64 copy of a whole test set may not fit
        part = slice(start, start + _CHUNK)
        scores = decide(test[part].astype(np.float64))
        place = np.searchsorted(classes, labels[part])[:, None]
        own = np.take_along_axis(scores, place, axis=1)
        before = (scores > own) | ((scores == own) & (columns < place))
        ranks[part] = np.where(np.isfinite(own[:, 0]), before.sum(axis=1), len(classes))
    return Marks(ranks == 0, ranks < TOP if len(classes) > TOP else None)


def class_accuracies(
    right: Bool[np.ndarray, " m"], labels: Int64[np.ndarray, " m"], classes: int
) -> Float64[np.ndarray, " c"]:
    """Share of each class's images that are right; NaN of a class without test images."""
    sizes = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[right], minlength=classes)
    return np.where(sizes > 0, hits / np.maximum(sizes, 1), np.nan)
