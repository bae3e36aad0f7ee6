"""Statistics over draws, against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from kdcli.probing.stats import compare, summarise, tally


def test_equals_scipy_on_fifty_draws() -> None:
    values = np.random.default_rng(0).uniform(0.6, 0.8, 50)
    summary = summarise(values)
    low, high = stats.t.interval(0.95, 49, loc=values.mean(), scale=stats.sem(values))
    assert summary.mean == pytest.approx(values.mean())
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    assert summary.ci95 == pytest.approx((high - low) / 2)


def test_one_draw_has_no_spread() -> None:
    assert summarise(np.array([0.5])).document() == {"mean": 0.5, "std": None, "ci95": None}


def test_equal_draws_have_a_spread_of_zero() -> None:
    assert summarise(np.full(5, 0.25)).document() == {"mean": 0.25, "std": 0.0, "ci95": 0.0}


# --- two representations on the same draws ----------------------------------------------------


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.1])
def test_a_comparison_equals_scipys_paired_tests(margin: float) -> None:
    rng = np.random.default_rng(3)
    ours, baseline = rng.normal(0.7, 0.03, 20), rng.normal(0.69, 0.03, 20)
    found = compare(ours, baseline, margin)
    assert found.p == pytest.approx(stats.ttest_rel(ours, baseline).pvalue)
    interval = stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    assert (found.mean - (found.ci95 or 0), found.mean + (found.ci95 or 0)) == pytest.approx(tuple(interval))
    above = stats.ttest_1samp(ours - baseline, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(ours - baseline, margin, alternative="less").pvalue
    assert (found.p_not_worse, found.p_not_better) == pytest.approx((above, below))
    assert found.p_equivalent == pytest.approx(max(above, below))


def test_tost_by_hand() -> None:
    # Differences 0, 1, 2 points: mean 1, standard error 1 / sqrt(3). Margin 2: t = 3 sqrt(3) with 2 degrees of
    # freedom, of which P(T > t) = (1 - t / sqrt(2 + t^2)) / 2.
    found = compare(np.array([0.0, 1.0, 2.0]), np.zeros(3), 2.0)
    t = 3 * math.sqrt(3)
    assert found.p_not_worse == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2)


def test_equal_scores_are_certainly_no_worse_and_one_score_says_nothing() -> None:
    same = compare(np.full(4, 0.5), np.full(4, 0.5), 0.01)
    assert (same.mean, same.p, same.p_not_worse, same.p_equivalent) == (0, 1, 0, 0)
    worse = compare(np.full(4, 0.25), np.full(4, 0.5), 0.125)
    assert (worse.p, worse.p_not_worse) == (0, 1)
    alone = compare(np.array([0.5]), np.array([0.25]), 0.01).document()
    assert (alone["mean"], alone["p"], alone["tost"]["not_worse"]) == (0.25, None, None)


def test_the_verdict_is_by_the_threshold_and_the_tally_by_relatedness() -> None:
    def verdict(difference: float) -> str:
        return compare(np.array([0.5 + difference, 0.5 + difference]), np.array([0.5, 0.5]), 0.01).verdict(
            0.01
        )

    assert [verdict(each) for each in (0.02, 0.01, 0.0, -0.01, -0.02)] == [
        "better", "equal", "equal", "equal", "worse",
    ]  # fmt: skip
    found = tally(
        {"cars": "better", "food": "worse", "birds": "better"},
        {"cars": "related", "food": "unrelated", "birds": "related"},
    )
    assert found == {
        "related": {"better": ["cars", "birds"], "equal": [], "worse": []},
        "unrelated": {"better": [], "equal": [], "worse": ["food"]},
    }
