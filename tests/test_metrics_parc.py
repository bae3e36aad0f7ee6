"""PARC against closed-form vectors, independent implementations and its invariances."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from kdcli.errors import BadDataError
from kdcli.metrics.parc import parc
from kdcli.metrics.targets import Targets

I = np.arange(12)  # noqa: E741  # the index of methods.md's vectors
X = np.sin(1.3 * I[:, None] + 0.7 * np.arange(5) + 0.1 * I[:, None] * np.arange(5))
Y = I % 3


def by_scipy(features: Any, labels: Any) -> float:
    """PARC the slow way: all distances, exact label distance, scipy's Spearman."""
    same = labels[:, None] != labels[None, :]
    upper = np.triu_indices(len(labels), 1)
    distances = pdist(features.astype(np.float64), "correlation").round(12)
    return float(spearmanr(distances, same[upper].astype(float)).statistic)


def problem(seed: int, n: int, d: int, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    return rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[labels] * rng.uniform(0, 2), labels


def test_vector_v1_of_the_fact_sheet() -> None:
    assert parc(X, Y) == pytest.approx(-0.1785828181, abs=1e-9)


def test_equals_rsatoolbox_end_to_end() -> None:
    pytest.importorskip("rsatoolbox", reason="oracle: pip install --no-deps -r requirements-oracles.txt")
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    for features, labels in ((X, Y), problem(3, 40, 7, 5)):
        one_hot = np.eye(labels.max() + 1)[labels]
        rdms = [calc_rdm(Dataset(values), method="correlation") for values in (features, one_hot)]
        # Its label distances of 0 and 1 + 1/(C-1) carry rounding noise too (trap T1).
        rdms[1].dissimilarities = rdms[1].dissimilarities.round(12)
        expected = float(compare(*rdms, method="spearman")[0, 0])
        assert parc(features, labels) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 40), st.sampled_from(["f8", "f4", "f2"]))
@settings(deadline=None, max_examples=40)
def test_equals_scipy(seed: int, classes: int, d: int, dtype: str) -> None:
    features, labels = problem(seed, 4 * classes, d + 1, classes)
    features = features.astype(dtype)
    assert parc(features, labels) == pytest.approx(by_scipy(features, labels), abs=1e-9)


@pytest.mark.parametrize("classes", [2, 7, 37, 101])
def test_exact_ties_of_distances_stay_ties(classes: int) -> None:
    labels = np.repeat(np.arange(classes), 3)
    assert parc(np.eye(max(classes, 3))[labels], labels) == pytest.approx(1.0, abs=1e-12)


def test_duplicate_images_have_a_score() -> None:
    features = np.concatenate([X, X])
    labels = np.concatenate([Y, Y])
    assert parc(features, labels) == pytest.approx(by_scipy(features, labels), abs=1e-9)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_does_not_change_with_an_affine_map_of_each_image(seed: int) -> None:
    features, labels = problem(seed, 24, 10, 4)
    rng = np.random.default_rng(seed + 1)
    mapped = features * rng.uniform(0.1, 10, (24, 1)) + rng.normal(size=(24, 1))
    assert parc(mapped, labels) == pytest.approx(parc(features, labels), abs=1e-9)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_does_not_change_with_the_order_of_images_or_names_of_classes(seed: int) -> None:
    features, labels = problem(seed, 24, 10, 4)
    order = np.random.default_rng(seed).permutation(24)
    assert parc(features[order], 40 - 3 * labels[order]) == pytest.approx(parc(features, labels), abs=1e-12)


def test_magnitudes_near_the_ends_of_the_float_range_do_not_matter() -> None:
    scales = np.where(I % 2, 1e200, 1e-200)[:, None]
    assert parc(X * scales, Y) == pytest.approx(parc(X, Y), abs=1e-12)


def test_variants_are_vectors_v1b_and_v1c_of_the_fact_sheet() -> None:
    assert parc(X, Y, variant="standardised") == pytest.approx(-0.1767969900, abs=1e-9)
    assert parc(X, Y, variant="bolya", components=3) == pytest.approx(-0.1053638627, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (60, 100), (120, 40)])
def test_variants_equal_scikit_learn_and_scipy(n: int, d: int) -> None:
    features, labels = problem(n + d, n, d, 5)
    features[:, 1] = 0.1  # a constant column must not become noise of variance 1
    scaled = StandardScaler().fit_transform(features)
    assert parc(features, labels, variant="standardised") == pytest.approx(by_scipy(scaled, labels), abs=1e-9)
    reduced = PCA(min(32, d - 1), svd_solver="full").fit_transform(features)
    expected = by_scipy(StandardScaler().fit_transform(reduced), labels)
    assert parc(features, labels, variant="bolya") == pytest.approx(expected, abs=1e-9)


def test_multi_label_images_are_compared_by_whole_label_rows() -> None:
    features, _ = problem(5, 50, 9, 5)
    labels = (np.random.default_rng(6).random((50, 7)) < 0.4).astype(int)
    labels[:, 0], labels[:, 1] = 1, 0  # no row is constant
    distances = [pdist(rows.astype(float), "correlation").round(12) for rows in (features, labels)]
    assert parc(features, labels) == pytest.approx(float(spearmanr(*distances).statistic), abs=1e-9)


def test_one_hot_rows_as_multi_label_equal_class_indices() -> None:
    features, labels = problem(7, 45, 9, 5)
    assert parc(features, np.eye(5)[labels]) == pytest.approx(parc(features, labels), abs=1e-12)


def test_targets_are_shared_between_sources() -> None:
    labels = Targets.of(Y)
    assert parc(X, labels) == parc(X, Y)
    rows = Targets.of(np.eye(3)[Y])
    assert parc(X, rows) == parc(X, np.eye(3)[Y])
    assert rows.pair_ranks is rows.pair_ranks


def test_neither_blocks_nor_threads_show_in_the_score() -> None:
    features, labels = problem(8, 700, 20, 6)
    features[350:] = features[:350]  # many ties, across blocks and threads
    expected = by_scipy(features, labels)
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            assert parc(features, labels) == pytest.approx(expected, abs=1e-9)


def test_takes_less_memory_than_two_distance_matrices() -> None:
    n = 2000
    features, labels = problem(9, n, 300, 10)
    parc(features[:500], labels[:500])
    tracemalloc.start()
    parc(features, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * n * n * 8


def wrong(name: str) -> tuple[Any, Any]:
    features, labels = X.copy(), Y.copy()
    match name:
        case "one class":
            labels[:] = 5
        case "singleton":
            labels[4] = 9
        case "three images":
            features, labels = features[:3], np.array([0, 0, 1])
        case "constant row":
            features[7] = 0
        case "one column":
            features = features[:, :1]
        case "NaN":
            features[2, 1] = np.nan
        case "inf":
            features[6, 0] = np.inf
        case "no columns":
            features = features[:, :0]
        case "equal distances":
            features, labels = np.eye(4), np.array([0, 0, 1, 1])
    return features, labels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one class", "all 12 images are of one class, 5"),
        ("singleton", "class 9 has 1 image"),
        ("three images", "3 images are too few"),
        ("constant row", "row 7 is constant: all 5 features are 0"),
        ("one column", "row 0 is constant"),
        ("NaN", "row 2 holds NaN or inf"),
        ("inf", "row 6 holds NaN or inf"),
        ("no columns", "0 columns"),
        ("equal distances", "equally far apart"),
    ],
)
def test_degenerate_input_names_its_cause(name: str, message: str) -> None:
    features, labels = wrong(name)
    with pytest.raises(BadDataError, match=message) as error:
        parc(features, labels)
    assert error.value.hint


def test_errors_call_rows_what_the_caller_calls_them() -> None:
    features, labels = wrong("constant row")
    with pytest.raises(BadDataError, match="image no7 is constant"):
        parc(features, Targets.of(labels, lambda row: f"image no{row}"))
