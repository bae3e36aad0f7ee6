"""RSA and its ranks against vectors, scipy and rsatoolbox."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import rankdata, spearmanr

from kdcli.errors import BadDataError
from kdcli.metrics.parc import parc
from kdcli.metrics.ranks import centred_ranks, spearman, spearman_of_groups
from kdcli.metrics.rsa import rsa, rsa_labels

I = np.arange(12)  # noqa: E741  # the index of methods.md's vectors
X = np.sin(1.3 * I[:, None] + 0.7 * np.arange(5) + 0.1 * I[:, None] * np.arange(5))
Z = np.cos(0.9 * I[:, None] - 0.4 * np.arange(4) + 0.05 * I[:, None] ** 2)
Y = I % 3


def by_scipy(x: Any, y: Any, distance: str) -> float:
    return float(
        spearmanr(*(pdist(np.asarray(rows, float), distance).round(10) for rows in (x, y))).statistic
    )


def random(seed: int, n: int, d: int) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_vector_v2_of_the_fact_sheet() -> None:
    assert rsa(X, Z, distance="correlation") == pytest.approx(0.6626239432, abs=1e-9)


@pytest.mark.parametrize("distance", ["correlation", "euclidean"])
def test_equals_rsatoolbox_end_to_end(distance: Any) -> None:
    pytest.importorskip("rsatoolbox", reason="oracle: pip install --no-deps -r requirements-oracles.txt")
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    for x, y in ((X, Z), (random(1, 40, 9), random(2, 40, 70))):
        rdms = [calc_rdm(Dataset(values), method=distance) for values in (x, y)]
        expected = float(compare(*rdms, method="spearman")[0, 0])
        assert rsa(x, y, distance=distance) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(4, 30), st.integers(2, 40), st.sampled_from(["f8", "f4", "f2"]))
@settings(deadline=None, max_examples=30)
def test_equals_scipy(seed: int, n: int, d: int, dtype: str) -> None:
    x, y = random(seed, n, d + 1).astype(dtype), random(seed + 1, n, 6)
    assert rsa(x, y) == pytest.approx(by_scipy(x, y, "euclidean"), abs=1e-9)
    assert rsa(x, y, distance="correlation") == pytest.approx(by_scipy(x, y, "correlation"), abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(deadline=None, max_examples=30)
def test_labels_are_a_representation_of_two_distances(seed: int, classes: int) -> None:
    features, labels = random(seed, 4 * classes, 7), np.arange(4 * classes) % classes
    one_hot = np.eye(classes)[labels]
    assert rsa_labels(features, labels) == pytest.approx(by_scipy(features, one_hot, "euclidean"), abs=1e-9)
    assert rsa_labels(features, labels) == pytest.approx(rsa(features, one_hot), abs=1e-12)


def test_with_one_minus_pearson_rsa_against_labels_is_parc() -> None:
    assert rsa_labels(X, Y, distance="correlation") == parc(X, Y)
    assert rsa_labels(X, Y) != pytest.approx(parc(X, Y), abs=0.01)


def test_multi_label_rows_are_compared_by_pearson() -> None:
    labels = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]])[Y]
    distances = pdist(X, "euclidean").round(10), pdist(labels.astype(float), "correlation").round(10)
    assert rsa_labels(X, labels) == pytest.approx(float(spearmanr(*distances).statistic), abs=1e-9)


def test_is_one_for_a_representation_and_itself_rotated_scaled_and_shifted() -> None:
    rotation = np.linalg.qr(random(3, 5, 5))[0]
    assert rsa(X, X) == 1
    assert rsa(X, 1e100 * X @ rotation - 4e100) == pytest.approx(1, abs=1e-12)


def test_duplicates_and_far_outliers_keep_ties_and_order() -> None:
    x = np.concatenate([X, X, [[1e4] * 5]])
    y = np.concatenate([Z, Z, [[0.0] * 4]])
    assert rsa(x, y) == pytest.approx(by_scipy(x, y, "euclidean"), abs=1e-6)
    labels = np.array([*Y, *Y, 0])
    assert rsa_labels(np.concatenate([X, X, [[3.0] * 5]]), labels) == pytest.approx(
        by_scipy(np.concatenate([X, X, [[3.0] * 5]]), np.eye(3)[labels], "euclidean"), abs=1e-9
    )


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=60).filter(lambda values: len(set(values)) > 1))
def test_ranks_equal_scipy_with_ties(values: list[int]) -> None:
    keys = np.array(values, np.int64)
    assert centred_ranks(keys) == pytest.approx(rankdata(keys) - (len(keys) + 1) / 2)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 1)), min_size=4, max_size=60))
def test_spearman_of_groups_equals_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    distances, groups = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    if len(set(distances)) > 1 and len(set(groups)) > 1:
        expected = float(spearmanr(distances, groups).statistic)
        score = spearman_of_groups(2 * distances + groups, int((groups == 0).sum()))
        assert score == pytest.approx(expected, abs=1e-12)


def test_vector_v4_mid_ranks() -> None:
    a, b = (centred_ranks(np.array(values)) for values in ([1, 2, 2, 3, 3, 3], [2, 1, 2, 4, 3, 4]))
    assert spearman(a, b) == pytest.approx(0.8104432009, abs=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:3], Z[:3], "3 images are too few"),
        (X, Z[:11], "12 and 11 images"),
        (X, np.full((12, 2), 0.3), "all 12 images have the same representation"),
        (np.eye(12), Z, "equally far apart"),
        (np.where(I[:, None] == 4, np.inf, X), Z, "row 4 holds NaN or inf"),
    ],
)
def test_degenerate_input_names_its_cause(x: Any, y: Any, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        rsa(x, y)


# --- a large common offset ----------------------------------------------------------------------


def exact_keys(features: np.ndarray) -> list[int]:
    """Squared distances of all pairs in whole numbers: fp16 values are multiples of 2^-24."""
    whole = [[round(value * 2**24) for value in row] for row in features.astype(np.float64).tolist()]
    pairs = itertools.combinations(whole, 2)
    distances = [sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) for one, other in pairs]
    order = {distance: place for place, distance in enumerate(sorted(set(distances)))}
    return [order[distance] for distance in distances]  # beyond 64 bits otherwise


@given(st.integers(0, 10_000), st.sampled_from([0, 100, 1e4, -3e4, 6e4]))
@settings(deadline=None, max_examples=30)
def test_fp16_features_around_a_large_offset_keep_their_ties(seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(24) % 3
    features = (16 * rng.normal(size=(24, 6)) + 8 * labels[:, None] + offset).astype(np.float16)
    differs = [int(a != b) for a, b in itertools.combinations(labels.tolist(), 2)]
    assert rsa_labels(features, labels) == pytest.approx(
        spearmanr(exact_keys(features), differs).statistic, abs=1e-12
    )
    other = rng.normal(size=(24, 4)).astype(np.float16)
    expected = spearmanr(exact_keys(features), exact_keys(other)).statistic
    assert rsa(features, other) == pytest.approx(expected, abs=1e-12)
