"""Statistics over draws, against scipy."""

import numpy as np
import pytest
from scipy import stats

from kdcli.probing.stats import summarise


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
