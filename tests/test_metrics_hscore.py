"""The regularised H-score against scikit-learn's Ledoit-Wolf and a pseudo-inverse."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf

from kdcli.metrics.hscore import hscore


def by_definition(features: Any, labels: Any) -> float:
    """As published: d x d matrices."""
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    shrunk = LedoitWolf().fit(centred)
    means = np.stack([centred[labels == label].mean(axis=0) for label in labels])
    between = np.atleast_2d(np.cov(means, rowvar=False))
    inverse = np.linalg.pinv(shrunk.covariance_, rcond=1e-15)
    return float(np.trace(inverse @ ((1 - shrunk.shrinkage_) * between)))


def problem(seed: int, n: int, d: int, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    spread = rng.uniform(0.2, 3, d)
    return rng.normal(size=(n, d)) * spread + rng.normal(size=(classes, d))[labels], labels


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 60), st.sampled_from(["f8", "f4", "f2"]))
@settings(deadline=None, max_examples=40)
def test_equals_the_published_formula(seed: int, classes: int, d: int, dtype: str) -> None:
    features, labels = problem(seed, 6 * classes, d, classes)
    features = features.astype(dtype)
    assert hscore(features, labels) == pytest.approx(by_definition(features, labels), rel=1e-9, abs=1e-9)


def test_a_hundred_thousand_columns_need_no_square_matrix() -> None:
    features, labels = problem(1, 20, 100_000, 4)
    assert 0 < hscore(features.astype(np.float16), labels) < 4


def test_does_not_change_with_rotation_scale_and_shift() -> None:
    features, labels = problem(2, 40, 12, 4)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0]
    assert hscore(1e150 * features @ rotation + 7e150, labels) == pytest.approx(
        hscore(features, labels), abs=1e-9
    )


def test_classes_further_apart_score_higher() -> None:
    rng = np.random.default_rng(4)
    labels = np.arange(60) % 3
    noise, means = rng.normal(size=(60, 10)), rng.normal(size=(3, 10))[labels]
    assert hscore(noise + 3 * means, labels) > hscore(noise + means, labels) > hscore(noise, labels)
