"""Linear CKA against closed-form vectors, independent implementations and its invariances."""

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from kdcli.errors import BadDataError
from kdcli.metrics.cka import label_cka, label_rbf_cka, linear_cka, rbf_cka
from kdcli.metrics.streaming import StreamingCKA
from kdcli.metrics.targets import Targets

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


def u_centred(kernel: Any) -> Any:
    """Székely and Rizzo 2014: the definition, entry by entry."""
    n, k = len(kernel), kernel.copy()
    np.fill_diagonal(k, 0)
    sums, total = k.sum(axis=0), k.sum()
    for i in range(n):
        for j in range(n):
            if i != j:
                k[i, j] += total / (n - 1) / (n - 2) - (sums[i] + sums[j]) / (n - 2)
    np.fill_diagonal(k, 0)
    return k


def debiased_by_kernels(k: Any, m: Any) -> float:
    k, m = u_centred(k), u_centred(m)
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def rbf(x: Any, threshold: float) -> Any:
    squares = cdist(x, x, "sqeuclidean")
    return np.exp(-squares / (2 * threshold**2 * np.median(squares)))


def test_vectors_v3_v3b_and_v3c_debiased_and_rbf() -> None:
    assert linear_cka(X, Z, debiased=True) == pytest.approx(0.4694181088, abs=1e-9)
    assert label_cka(X, Y, debiased=True) == pytest.approx(-0.2094532344, abs=1e-9)
    assert rbf_cka(X, Z, threshold=0.5) == pytest.approx(0.6672817, abs=1e-7)
    assert rbf_cka(X, Z) == pytest.approx(0.5986015, abs=1e-7)


def test_vector_v3e_the_published_demo() -> None:
    draw = np.random.RandomState(1337)
    x = draw.randn(100, 10)
    y = draw.randn(100, 10) + x
    assert linear_cka(x, y) == pytest.approx(0.55761, abs=1e-5)
    assert linear_cka(x, y, debiased=True) == pytest.approx(0.51346, abs=1e-5)
    assert rbf_cka(x, y, threshold=0.5) == pytest.approx(0.65483, abs=1e-5)


@pytest.mark.parametrize(("n", "d", "k"), [(30, 5, 4), (30, 50, 4), (10, 50, 60), (12, 12, 12), (4, 3, 90)])
def test_debiased_equals_the_definition(n: int, d: int, k: int) -> None:
    x, y = random(n, n, d) + 3, random(k, n, k)
    expected = debiased_by_kernels(x @ x.T, y @ y.T)
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_rbf_equals_the_definition(threshold: float) -> None:
    x, y = random(1, 25, 6) + 5, random(2, 25, 40)
    k, m = rbf(x, threshold), rbf(y, threshold)
    centre = np.eye(25) - 1 / 25
    expected = float(((centre @ k @ centre) * m).sum())
    expected /= float(np.linalg.norm(centre @ k @ centre) * np.linalg.norm(centre @ m @ centre))
    assert rbf_cka(x, y, threshold=threshold) == pytest.approx(expected, abs=1e-9)
    debiased = rbf_cka(x, y, threshold=threshold, debiased=True)
    assert debiased == pytest.approx(debiased_by_kernels(k, m), abs=1e-9)


def test_rbf_on_labels_is_the_rbf_of_one_hot_rows() -> None:
    """A kernel of two values is the linear one up to scale and shift."""
    one_hot = np.eye(3)[Y]
    for debiased in (False, True):
        expected = rbf_cka(X, one_hot, debiased=debiased)
        assert label_rbf_cka(X, Y, debiased=debiased) == pytest.approx(expected, abs=1e-12)


def test_debiased_is_zero_on_average_for_noise_where_biased_is_high() -> None:
    pairs = [(random(seed, 32, 200), random(seed + 1000, 32, 200)) for seed in range(60)]
    assert np.mean([linear_cka(x, y) for x, y in pairs]) > 0.8  # trap T19
    assert abs(np.mean([linear_cka(x, y, debiased=True) for x, y in pairs])) < 0.02


@pytest.mark.parametrize("debiased", [False, True])
def test_streams_equal_the_whole_whatever_the_batches(debiased: bool) -> None:
    x, y = random(1, 101, 7) * 3 + 50, random(2, 101, 4) - 8
    y[:, 0] += x[:, 0]
    expected = linear_cka(x, y, debiased=debiased)
    assert expected == pytest.approx(
        debiased_by_kernels(x @ x.T, y @ y.T) if debiased else by_gram(x, y), abs=1e-9
    )
    for size in (1, 10, 64, 101):
        stream = StreamingCKA(debiased=debiased)
        for start in range(0, 101, size):
            stream.update(x[start : start + size], y[start : start + size])
        assert stream.score() == pytest.approx(expected, abs=1e-9)


def test_streams_stay_flat_in_memory() -> None:
    peaks = []
    for batches in (3, 30):
        stream = StreamingCKA()
        tracemalloc.start()
        for seed in range(batches):
            stream.update(random(seed, 500, 64).astype(np.float16), random(seed, 500, 16))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_wide_representations_are_not_copied_as_a_whole() -> None:
    x, y = random(1, 40, 100_000).astype(np.float16), np.arange(40) % 4
    label_cka(x[:, :5000], y)
    tracemalloc.start()
    score = label_cka(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes
    assert score == pytest.approx(by_gram(x.astype(np.float64), np.eye(4)[y]), abs=1e-9)


def test_streams_refuse_what_has_no_score() -> None:
    with pytest.raises(BadDataError, match="0 images are too few"):
        StreamingCKA().score()
    stream = StreamingCKA()
    stream.update(np.full((9, 4), 0.1), Z[:9])
    stream.update(np.full((3, 4), 0.1), Z[9:])
    with pytest.raises(BadDataError, match="all 12 images have the same representation"):
        stream.score()
    with pytest.raises(BadDataError, match="row 1 holds NaN"):
        stream.update(np.array([[1.0] * 4, [np.nan] * 4]), Z[:2])


def test_rbf_refuses_representations_of_mostly_duplicates() -> None:
    x = np.zeros((12, 3))
    x[0] = 1
    with pytest.raises(BadDataError, match="more than half of the pairs"):
        rbf_cka(x, Z)


def test_multi_label_rows_are_compared_by_pearson() -> None:
    labels = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]])[Y]
    rows = labels - labels.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert label_cka(X, labels) == pytest.approx(by_gram(X, rows), abs=1e-12)
    assert label_cka(X, np.eye(3)[Y]) == pytest.approx(label_cka(X, Y), abs=1e-12)


def test_label_rows_have_a_column_per_class_that_occurs() -> None:
    rows = Targets.of(np.array([7, 2, 7, 2])).rows
    assert rows.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]


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
