"""Linear CKA against closed-form vectors, independent implementations and its invariances."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.errors import BadDataError
from kdcli.metrics.cka import label_cka, linear_cka, one_hot

I = np.arange(12)  # noqa: E741  # the index of methods.md's vectors
X = np.sin(1.3 * I[:, None] + 0.7 * np.arange(5) + 0.1 * I[:, None] * np.arange(5))
Z = np.cos(0.9 * I[:, None] - 0.4 * np.arange(4) + 0.05 * I[:, None] ** 2)
Y = I % 3


def by_gram(x: Any, y: Any) -> float:
    """The definition, with centring matrices."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def random(seed: int, n: int, d: int) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_vectors_v3_and_v3b_of_the_fact_sheet() -> None:
    assert linear_cka(X, Z) == pytest.approx(0.5549875654, abs=1e-9)
    assert label_cka(X, Y) == pytest.approx(0.0538880684, abs=1e-9)


@pytest.mark.parametrize(("n", "d", "k"), [(30, 5, 4), (30, 50, 4), (10, 50, 60), (12, 12, 12), (8, 3, 90)])
def test_all_branches_equal_the_definition(n: int, d: int, k: int) -> None:
    x, y = random(n, n, d), random(k, n, k)
    assert linear_cka(x, y) == pytest.approx(by_gram(x, y), abs=1e-12)


def test_equals_ckatorch() -> None:
    pytest.importorskip("ckatorch", reason="oracle: pip install --no-deps -r requirements-oracles.txt")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ckatorch.core import cka_base

    for x, y in ((X, Z), (random(1, 20, 40), random(2, 20, 30))):
        oracle = cka_base(torch.from_numpy(x), torch.from_numpy(y), kernel="linear", method="fro_norm")
        assert linear_cka(x, y) == pytest.approx(float(oracle), abs=1e-9)


@given(st.integers(0, 10_000), st.integers(5, 30), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_is_one_for_a_representation_and_itself_rotated_scaled_and_shifted(seed: int, n: int, d: int) -> None:
    x = random(seed, n, d)
    rotation = np.linalg.qr(random(seed + 1, d, d))[0]
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, -7.5 * x @ rotation + 3) == pytest.approx(1.0, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(5, 20), st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_is_symmetric_bounded_and_blind_to_the_order_of_images(seed: int, n: int, d: int, k: int) -> None:
    x, y = random(seed, n, d), random(seed + 1, n, k)
    order = np.random.default_rng(seed).permutation(n)
    score = linear_cka(x, y)
    assert 0 <= score <= 1
    assert linear_cka(y, x) == pytest.approx(score, abs=1e-12)
    assert linear_cka(x[order], y[order]) == pytest.approx(score, abs=1e-12)


def test_other_order_of_one_side_is_another_score() -> None:
    assert abs(linear_cka(X[::-1], Z) - linear_cka(X, Z)) > 0.01


def test_magnitudes_near_the_ends_of_the_float_range_do_not_matter() -> None:
    assert linear_cka(X * 1e200, Z * 1e-200) == pytest.approx(linear_cka(X, Z), abs=1e-12)


def test_half_precision_is_computed_in_double() -> None:
    half = X.astype(np.float16)
    assert linear_cka(half, Z) == linear_cka(half.astype(np.float64), Z)


def test_one_hot_has_a_column_per_class_that_occurs() -> None:
    assert one_hot(np.array([7, 2, 7])).tolist() == [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:3], Z[:3], "3 images are too few"),
        (np.full((12, 5), 0.1), Z, "all 12 images have the same representation"),
        (X, np.zeros((12, 2)), "all 12 images have the same representation"),
        (np.where(I[:, None] == 4, np.nan, X), Z, "row 4 holds NaN or inf"),
    ],
)
def test_degenerate_input_names_its_cause(x: Any, y: Any, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        linear_cka(x, y)


def test_labels_need_two_classes_of_two_images() -> None:
    with pytest.raises(BadDataError, match="of one class"):
        label_cka(X, np.zeros(12, np.int64))
    with pytest.raises(BadDataError, match="class 9 has 1 image"):
        label_cka(X, np.where(I == 4, 9, Y))
