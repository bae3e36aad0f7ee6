"""How good a student is: of one class an image, and of several labels."""

from collections.abc import Mapping
from typing import final

import numpy as np
from jaxtyping import Bool, Float

from kdcli.metrics.average_precision import average_precisions

MAIN = ("top1", "mAP")
"""The scores that runs are compared by: of images of one class, and of several labels."""
JUDGED = (*MAIN, "r2")
"""Those that epochs and rates are chosen by: where teachers judge, the variance of their outputs that is explained."""


def main_score(scores: Mapping[str, float]) -> float:
    """The one of :data:`JUDGED` that there is, as a fraction."""
    return next(scores[name] for name in JUDGED if name in scores)


@final
class LabelScores:
    """Logits of images, as they come, and in the end how well they tell which labels each image has.

    Args:
        labels: which labels each of n images has.
    """

    def __init__(self, labels: Bool[np.ndarray, "n l"]) -> None:
        self._labels = labels
        self.logits = np.zeros(labels.shape, np.float32)
        """Of the images seen; 0 of the others, so that those of several processes add up."""

    def of(self, logits: Float[np.ndarray, "n l"]) -> dict[str, float]:
        """Of all images, as fractions.

        Returns:
            ``mAP``: the mean over the labels of their average precision (scikit-learn's), without labels that every
            image has, or none; ``label_accuracy``: the share of yes and no that are right at a probability of 0.5,
            over all images and labels; ``exact_match``: the share of images whose labels are all right.
        """
        right = (logits > 0) == self._labels
        precisions = average_precisions(self._labels, logits)
        known = np.isfinite(precisions)
        return {
            "mAP": float(precisions[known].mean()) if known.any() else 0.0,
            "label_accuracy": float(right.mean()),
            "exact_match": float(right.all(axis=1).mean()),
        }
