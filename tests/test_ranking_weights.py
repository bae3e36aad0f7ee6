"""Schemes of P2's Fig. 1 as weights: hand-computed values and properties."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.errors import BadDataError
from kdcli.ranking.weights import (
    inverse_weights,
    random_weights,
    scheme_weights,
    source_weights,
    weighting_document,
)

SCHEMES = ("weighted", "nearest", "equal", "random-weights", "inverse")
SCORES = st.lists(st.floats(-1, 1), min_size=1, max_size=20)


def weights_of(scores: list[float], scheme: Any = "weighted", **options: Any) -> Any:
    return scheme_weights(np.array(scores), [f"s{i:02d}" for i in range(len(scores))], scheme, **options)


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("weighted", {"power": 1}, [0.4, 0.1, 0.5, 0]),
        ("weighted", {"power": 2}, [16 / 42, 1 / 42, 25 / 42, 0]),
        ("weighted", {"power": 2, "sources": 2}, [16 / 41, 0, 25 / 41, 0]),
        ("nearest", {}, [0, 0, 1, 0]),
        ("equal", {}, [0.25] * 4),
        ("equal", {"sources": 3}, [1 / 3, 1 / 3, 1 / 3, 0]),
        ("inverse", {}, [0, 0, 0, 1]),
        ("inverse", {"sources": 3}, [5 / 29, 20 / 29, 4 / 29, 0]),
    ],
)
def test_schemes_by_hand(scheme: str, options: dict[str, Any], expected: list[float]) -> None:
    assert weights_of([0.4, 0.1, 0.5, -0.2], scheme, **options) == pytest.approx(expected, abs=1e-15)


@given(SCORES, st.sampled_from(SCHEMES), st.integers(1, 25), st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_every_scheme_gives_a_point_of_the_simplex(
    scores: list[float], scheme: str, sources: int, seed: int
) -> None:
    weights = weights_of(scores, scheme, sources=sources, seed=seed)
    assert weights.dtype == np.float64
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) < 1e-14
    assert (weights > 0).sum() <= sources
    dropped = np.array(scores)[weights == 0] if scheme in ("equal", "random-weights") else np.array([])
    assert (dropped <= np.array(scores)[weights > 0].min()).all()


@given(SCORES, st.integers(1, 25))
@settings(deadline=None)
def test_infinite_power_is_nearest_and_power_zero_is_equal(scores: list[float], sources: int) -> None:
    for scheme, power in (("nearest", float("inf")), ("equal", 0.0)):
        ours = weights_of(scores, scheme, sources=sources)
        assert np.array_equal(ours, weights_of(scores, power=power, sources=sources))
    assert np.array_equal(weights_of(scores, power=3.0), source_weights(np.array(scores), 3.0))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_inverse_is_proportional_to_one_over_the_score(scores: list[float]) -> None:
    expected = 1 / np.array(scores)
    assert inverse_weights(np.array(scores)) == pytest.approx(expected / expected.sum(), rel=1e-12)


def test_inverse_of_scores_without_a_finite_inverse_is_the_limit() -> None:
    assert weights_of([0.5, 0.0, -0.3], "inverse").tolist() == [0, 0.5, 0.5]
    assert weights_of([0.5, 5e-324], "inverse") == pytest.approx([0, 1])


def test_preselection_breaks_ties_by_name() -> None:
    names = ["b", "c", "a"]
    weights = scheme_weights(np.array([0.2, 0.2, 0.2]), names, "equal", sources=2)
    assert dict(zip(names, weights, strict=True)) == {"a": 0.5, "b": 0.5, "c": 0}


def test_random_weights_are_uniform_on_the_simplex_and_look_at_no_score() -> None:
    draws = np.array([random_weights(4, seed) for seed in range(4000)])
    # Dirichlet(1) over 4: mean 1/4, variance 3/80, P(w_1 > 1/2) = (1/2)^3.
    assert draws.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.012)
    assert draws.var(axis=0) == pytest.approx([3 / 80] * 4, rel=0.08)
    assert (draws[:, 0] > 0.5).mean() == pytest.approx(0.125, abs=0.02)
    assert random_weights(3, 0).tolist() == pytest.approx([0.2578250, 0.4684706, 0.2737044], abs=1e-7)
    a = scheme_weights(np.array([0.1, 0.9]), ["x", "y"], "random-weights", seed=7)
    b = scheme_weights(np.array([0.1, 0.2]), ["y", "x"], "random-weights", seed=7)
    assert a.tolist() == b[::-1].tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_is_refused_in_every_scheme(scheme: str) -> None:
    with pytest.raises(BadDataError, match="score of source 's01' is nan"):
        weights_of([0.1, float("nan")], scheme)


def test_the_default_needs_no_words() -> None:
    assert weighting_document("weighted", 12.0, None, 3) == {}
    assert weighting_document("weighted", 1.0, 2, 3) == {"scheme": "weighted", "power": 1.0, "sources": 2}
    assert weighting_document("weighted", float("inf"), None, 3) == {"scheme": "weighted", "power": "inf"}
    assert weighting_document("random-weights", 12.0, None, 3) == {"scheme": "random-weights", "seed": 3}
    assert weighting_document("nearest", 12.0, None, 3) == {"scheme": "nearest"}
