"""LogME against the published value and against direct maximisation of the evidence."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from kdcli.metrics.logme import LOGME, logme

I = np.arange(12)  # noqa: E741  # the index of methods.md's vectors
X = np.sin(1.3 * I[:, None] + 0.7 * np.arange(5) + 0.1 * I[:, None] * np.arange(5))
Y = I % 3


def evidence(features: Any, target: Any, log_alpha: float, log_beta: float) -> float:
    """You et al. 2021, Eq. 2, with the d x d matrix A and its determinant."""
    alpha, beta = np.exp(log_alpha), np.exp(log_beta)
    n, d = features.shape
    a = alpha * np.eye(d) + beta * features.T @ features
    mean = beta * np.linalg.solve(a, features.T @ target)
    fit = beta * ((target - features @ mean) ** 2).sum() + alpha * mean @ mean
    log_det = np.linalg.slogdet(a)[1]
    return float((d * log_alpha + n * log_beta - fit - log_det - n * np.log(2 * np.pi)) / 2)


def by_maximising(features: Any, labels: Any) -> float:
    """The authors' 1e-5 in the denominators is a prior exp(-1e-5 (alpha + beta) / 2) on both."""
    found = []
    for label in np.unique(labels):
        target = (labels == label).astype(float)

        def loss(point: Any, target: Any = target) -> float:
            return 5e-6 * float(np.exp(point).sum()) - evidence(features, target, *point)

        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 5000}
        starts = [(0, 0), (5, 1), (-3, 3)]
        best = min(
            (minimize(loss, start, method="Nelder-Mead", options=options) for start in starts),
            key=lambda result: result.fun,
        )
        found.append(evidence(features, target, *best.x) / len(labels))
    return float(np.mean(found))


def problem(seed: int, n: int, d: int, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[labels], labels


def test_vector_v12_of_the_fact_sheet() -> None:
    assert logme(X, Y) == pytest.approx(-0.8707421, abs=1e-7)


@pytest.mark.parametrize(("n", "d"), [(12, 5), (40, 6), (30, 20), (24, 24), (20, 60)])
def test_converged_it_is_the_maximum_of_the_evidence(n: int, d: int) -> None:
    features, labels = (X, Y) if n == 12 else problem(n, n, d, 3)
    converged = logme(features, labels, steps=100_000, tolerance=1e-13)
    assert converged == pytest.approx(by_maximising(features, labels), abs=1e-6)


@pytest.mark.parametrize(("n", "d"), [(30, 60), (24, 100), (20, 40)])
def test_with_more_steps_it_comes_closer_to_the_maximum_where_images_are_few(n: int, d: int) -> None:
    labels = np.arange(n) % 3
    features = np.random.default_rng(0).normal(size=(n, d)) + 0.3 * labels[:, None]  # that tell little
    best = by_maximising(features, labels)
    steps = (1, 11, 100)
    assert LOGME.stepped is not None
    gaps = [best - LOGME.stepped(count)(features, labels) for count in steps]
    assert LOGME(features, labels) == LOGME.stepped(11)(features, labels)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] > 1e-3  # what the docs say of eleven steps
    assert abs(gaps[2]) < 1e-3


@given(st.integers(0, 10_000), st.integers(2, 30))
@settings(deadline=None, max_examples=20)
def test_blind_to_rotations_to_the_order_of_images_and_to_zero_columns(seed: int, d: int) -> None:
    features, labels = problem(seed, 21, d, 3)
    rng = np.random.default_rng(seed)
    rotation, order = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.permutation(21)
    score = logme(features, labels)
    assert logme(features @ rotation, labels) == pytest.approx(score, abs=1e-6)
    assert logme(features[order], labels[order]) == pytest.approx(score, abs=1e-6)
    assert logme(np.pad(features, ((0, 0), (0, 40))), labels) == pytest.approx(score, abs=1e-6)


def test_better_features_have_more_evidence() -> None:
    features, labels = problem(1, 60, 8, 3)
    noise = np.random.default_rng(2).normal(size=features.shape)
    assert logme(features, labels) > logme(features + 2 * noise, labels) > logme(noise, labels) - 0.05


def test_features_that_explain_labels_exactly_have_a_finite_score() -> None:
    assert np.isfinite(logme(np.eye(3)[Y], Y))


def test_half_precision_is_computed_in_double() -> None:
    half = X.astype(np.float16)
    assert logme(half, Y) == logme(half.astype(np.float64), Y)
