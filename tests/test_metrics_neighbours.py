"""kNN by leave-one-out: against loops and scikit-learn, and where distances tie."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from kdcli.errors import BadDataError
from kdcli.metrics.neighbours import knn


def problem(seed: int, n: int, d: int, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[labels], labels


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(["f8", "f2"]))
@settings(deadline=None, max_examples=15)
def test_equals_scikit_learn_where_nothing_ties(seed: int, d: int, dtype: str) -> None:
    features, labels = problem(seed, 24, d + 1, 3)
    features = features.astype(dtype)
    classifier = KNeighborsClassifier(1)
    expected = cross_val_score(classifier, features.astype(np.float64), labels, cv=LeaveOneOut()).mean()
    assert knn(features, labels) == pytest.approx(expected, abs=1e-12)


def test_votes_of_several_neighbours_with_ties_shared() -> None:
    features, labels = np.array([[0.0], [1], [2.1], [10], [11], [12.1]]), np.array([0, 0, 1, 1, 1, 0])
    # Each image's two nearest others: 0: 0 1 | 1: 0 1 | 2: 0 0 | 3: 1 0 | 4: 1 0 | 5: 1 1
    assert knn(features, labels, neighbours=2) == pytest.approx((0.5 + 0.5 + 0 + 0.5 + 0.5 + 0) / 6)


def test_duplicates_are_neighbours_and_no_image_is_its_own() -> None:
    features = np.array([[0.0, 1], [0, 1], [1, 0], [1, 0]])
    assert knn(features, np.array([0, 0, 1, 1])) == 1
    assert knn(features, np.array([0, 1, 1, 0])) == 0


def test_equally_near_images_of_two_classes_share_the_vote_in_any_order() -> None:
    features, labels = np.repeat(np.eye(2), 3, axis=0), np.array([0, 0, 1, 0, 1, 1])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(6)
        assert knn(features[order], labels[order]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("neighbours", [0, 12])
def test_more_neighbours_than_images_are_refused(neighbours: int) -> None:
    features, labels = problem(1, 12, 4, 3)
    with pytest.raises(BadDataError, match=f"12 images do not have {neighbours} neighbours"):
        knn(features, labels, neighbours=neighbours)
