"""The weighted k-nearest-neighbour probe (Wu et al. 2018; Caron et al. 2021): nothing is fitted."""

from typing import Final, final

import numpy as np
from jaxtyping import Float64, Int64

TEMPERATURE: Final = 0.07
"""Of the weights exp(cosine / T), as in DINO's evaluation (Caron et al. 2021, appendix F.1)."""


@final
class Neighbours:
    """Votes of the nearest training images by cosine similarity, weighted by exp(cosine / 0.07).

    Args:
        features: of the training images; not centred, not scaled.
        targets: a row per image: the class's column is 1 (multi-label: each label's).
        neighbours: k; all training images where there are fewer.
    """

    def __init__(
        self, features: Float64[np.ndarray, "n d"], targets: Float64[np.ndarray, "n c"], neighbours: int
    ) -> None:
        self._features, self._targets = _unit(features), targets
        self._k = min(neighbours, len(features))

    def votes(self, features: Float64[np.ndarray, "m d"]) -> Float64[np.ndarray, "m c"]:
        """Share of the neighbours' weight that each class has."""
        similar = _unit(features) @ self._features.T
        near = np.argpartition(-similar, self._k - 1, axis=1)[:, : self._k]
        # Relative to exp(1 / T), so that nothing overflows; shares do not change.
        weights = np.exp((np.take_along_axis(similar, near, axis=1) - 1) / TEMPERATURE)
        weights /= weights.sum(axis=1, keepdims=True)
        found: Float64[np.ndarray, "m c"] = np.einsum("mk,mkc->mc", weights, self._targets[near])
        return found

    def scores(self, features: Float64[np.ndarray, "m d"]) -> Float64[np.ndarray, "m c"]:
        """Votes; -inf of a class that none of the neighbours is of: it is no answer, not even the fifth."""
        votes = self.votes(features)
        return np.where(votes > 0, votes, -np.inf)


def one_hot(labels: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " c"], Float64[np.ndarray, "n c"]]:
    """The classes, ascending, and a row of zeros and a one for each label."""
    classes, place = np.unique(labels, return_inverse=True)
    return classes, np.eye(len(classes))[place]


def _unit(rows: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Rows of length 1; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float64[np.ndarray, "n d"] = rows / np.where(norms > 0, norms, 1)
    return unit
