"""Statistics of scores and accuracies against scipy; intervals and p against their definitions."""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdcli.ranking.agreement import RESAMPLES, estimate_all, kendall, pearson, spearman, top_best, top_mean

VALUES = st.integers(3, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from(np.linspace(-1, 1, 9)), min_size=n, max_size=n)] * 2)
)


@given(VALUES)
@settings(deadline=None, max_examples=150)
def test_correlations_are_those_of_scipy_also_with_ties(pair: tuple[list[float], list[float]]) -> None:
    x, y = np.array(pair)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        for ours in (pearson, spearman, kendall):
            assert math.isnan(ours(x[None], y[None])[0])
        return
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        assert ours(x[None], y[None])[0] == pytest.approx(theirs(x, y).statistic, abs=1e-12)


def test_rows_are_independent_of_each_other() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 600, 9))
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert kendall(x, y) == pytest.approx(expected, abs=1e-12)


def test_relative_accuracy_by_hand() -> None:
    x = np.array([[0.9, 0.1, 0.8, 0.2, 0.3]])
    y = np.array([[0.6, 0.8, 0.5, 0.7, 0.1]])
    # By score: 0.6, 0.5, 0.1 against the best 0.8, 0.7, 0.6.
    assert top_mean(x, y, 3) == pytest.approx([(1.2 / 3) / (2.1 / 3)])
    assert top_best(x, y, 3) == pytest.approx([0.6 / 0.8])
    assert top_best(x, y, 1) == pytest.approx(top_mean(x, y, 1))
    assert np.isnan(top_mean(x, y, 5)).all()
    assert np.isnan(top_best(x, np.zeros((1, 5)), 2)).all()


def test_p_is_the_share_of_pairings_that_are_as_good() -> None:
    x, y = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.1, 0.4, 0.3, 0.6, 0.5]
    found = estimate_all({"t": (x, y)}, 3, 0)["t"]["spearman"]
    own = stats.spearmanr(x, y).statistic
    exact = np.mean([stats.spearmanr(x, z).statistic >= own - 1e-12 for z in itertools.permutations(y)])
    assert found.value == pytest.approx(own)
    assert found.p == pytest.approx(exact, abs=0.01)


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=28)
    y = x + rng.normal(size=28)
    found = estimate_all({"t": (x.tolist(), y.tolist())}, 3, 0)["t"]
    for name, theirs in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        span = stats.bootstrap(
            (x, y), lambda a, b, theirs=theirs: theirs(a, b).statistic, paired=True, vectorized=False,
            n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(2),
        ).confidence_interval  # fmt: skip
        assert found[name].low == pytest.approx(span.low, abs=0.04)
        assert found[name].high == pytest.approx(span.high, abs=0.04)


def test_no_relation_has_no_small_p_and_a_wide_interval() -> None:
    rng = np.random.default_rng(3)
    ps = []
    for seed in range(20):
        x, y = rng.normal(size=(2, 12))
        found = estimate_all({"t": (x.tolist(), y.tolist())}, 3, seed)["t"]["kendall"]
        ps.append(found.p)
        assert found.high is not None
        assert found.low is not None
        assert found.high - found.low > 0.3
    assert 0.3 < np.mean(ps) < 0.7


def test_mean_over_targets() -> None:
    rng = np.random.default_rng(4)
    pairs = {name: tuple(rng.normal(size=(2, 9)).tolist()) for name in "abc"}
    found = estimate_all(pairs, 3, 0)
    assert list(found) == ["a", "b", "c", "mean"]
    values = [found[name]["spearman"].value for name in "abc"]
    assert found["mean"]["spearman"].value == pytest.approx(np.mean(values))
    assert found["mean"]["spearman"].low < np.mean(values) < found["mean"]["spearman"].high
    assert estimate_all(pairs, 3, 0) == found
    assert estimate_all(pairs, 3, 1) != found


def test_a_target_without_a_value_is_left_out_of_the_mean() -> None:
    found = estimate_all({"flat": ([1, 2, 3], [5, 5, 5]), "b": ([1, 2, 3], [1, 3, 2])}, 3, 0)
    assert asdict(found["flat"]["spearman"]) == {"value": None, "low": None, "high": None, "p": None}
    assert found["mean"]["spearman"].value == pytest.approx(0.5)
    assert found["mean"]["top3_mean"].value is None
