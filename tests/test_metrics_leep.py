"""LEEP, NCE and NLEEP against their definitions, written as loops."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from kdcli.errors import BadDataError
from kdcli.metrics.leep import leep, nce, nleep

I = np.arange(12)  # noqa: E741  # the index of methods.md's vectors
Z = np.cos(0.9 * I[:, None] - 0.4 * np.arange(4) + 0.05 * I[:, None] ** 2)
PSEUDO = np.exp(Z) / np.exp(Z).sum(axis=1, keepdims=True)
Y = I % 3


def leep_by_definition(pseudo: Any, labels: Any) -> float:
    n, sources = pseudo.shape
    joint = {(y, z): 0.0 for y in set(labels.tolist()) for z in range(sources)}
    for i in range(n):
        for z in range(sources):
            joint[int(labels[i]), z] += float(pseudo[i, z]) / n
    marginal = [sum(value for (_, z), value in joint.items() if z == wanted) for wanted in range(sources)]
    total = 0.0
    for i in range(n):
        terms = (
            joint[int(labels[i]), z] / marginal[z] * float(pseudo[i, z])
            for z in range(sources)
            if marginal[z]
        )
        total += math.log(sum(terms))
    return total / n


def nce_by_definition(pseudo: Any, labels: Any) -> float:
    decided = pseudo.argmax(axis=1)
    entropy = 0.0
    for z in set(decided.tolist()):
        for y in set(labels.tolist()):
            both = float(((decided == z) & (labels == y)).mean())
            if both:
                entropy -= both * math.log(both / float((decided == z).mean()))
    return -entropy


def random_pseudo(seed: int, n: int, sources: int) -> Any:
    return np.random.default_rng(seed).dirichlet(np.full(sources, 0.3), n)


def test_vectors_v12_of_the_fact_sheet() -> None:
    assert leep(PSEUDO, Y) == pytest.approx(-1.0920056, abs=1e-7)
    assert nce(PSEUDO, Y) == pytest.approx(-0.9946247, abs=1e-7)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_equal_their_definitions(seed: int, classes: int, sources: int) -> None:
    labels = np.arange(4 * classes) % classes
    pseudo = random_pseudo(seed, len(labels), sources)
    assert leep(pseudo, labels) == pytest.approx(leep_by_definition(pseudo, labels), abs=1e-9)
    assert nce(pseudo, labels) == pytest.approx(nce_by_definition(pseudo, labels), abs=1e-9)
    assert leep(pseudo, labels) <= 0
    half = pseudo.astype(np.float16)
    assert leep(half, labels) == pytest.approx(leep_by_definition(half, labels), abs=1e-9)


def test_perfect_predictions_score_zero_and_useless_ones_the_entropy_of_labels() -> None:
    perfect = np.eye(3)[Y]
    assert leep(perfect, Y) == nce(perfect, Y) == nce(perfect[:, ::-1], Y) == 0
    useless = np.full((12, 5), 0.2)
    assert leep(useless, Y) == pytest.approx(-math.log(3))
    assert nce(useless, Y) == pytest.approx(-math.log(3))


def test_source_classes_that_no_image_has_do_not_matter() -> None:
    assert leep(np.pad(PSEUDO, ((0, 0), (0, 3))), Y) == leep(PSEUDO, Y)


def test_nleep_is_leep_of_clusters() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 30)) + 2 * rng.normal(size=(3, 30))[labels]
    centred = features / np.abs(features).max()
    scores = PCA(0.8, svd_solver="full").fit_transform(centred)
    scores /= np.abs(scores).max()
    mixture = GaussianMixture(15, covariance_type="diag", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = leep_by_definition(mixture.fit(scores).predict_proba(scores), labels)
    assert nleep(features, labels) == pytest.approx(expected, abs=1e-6)
    assert nleep(features, labels) > nleep(rng.normal(size=(90, 30)), labels)


def test_nleep_needs_images_that_differ() -> None:
    with pytest.raises(BadDataError, match="9 clusters are wanted of 2 images that differ"):
        nleep(np.repeat([[0.0, 1], [1, 0]], 6, axis=0), Y)


@pytest.mark.parametrize("metric", [leep, nce])
def test_what_is_no_probability_is_refused(metric: Any) -> None:
    with pytest.raises(BadDataError, match="row 0 holds no probabilities: they sum to"):
        metric(Z, Y)
    negative = PSEUDO.copy()
    negative[5] = [1.5, -0.5, 0, 0]
    with pytest.raises(BadDataError, match="row 5 holds no probabilities"):
        metric(negative, Y)
