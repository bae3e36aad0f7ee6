"""Do scores predict accuracies? Correlations and relative accuracies, with what chance alone would give (P2 §5.2.1).

Everything works on rows of resamples at once: ``x`` holds scores, ``y`` accuracies, both [b n], one column a source.
scipy.stats has the same statistics, but its ``bootstrap`` and ``permutation_test`` draw anew for each: here all metrics
and statistics are compared on the same resamples. Of rows at once it has only Pearson's, which warns of each constant
row that a resample of few sources gives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

RESAMPLES = 2000
"""Bootstrap resamples, and permutations."""

Rows = Float64[np.ndarray, "b n"]
Values = Float64[np.ndarray, " b"]

_RESAMPLING_STREAM = 0x7265
_AT_ONCE = 250  # resamples whose pairs of sources are in memory at the same time


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic; what is undefined is None.

    Attributes:
        value: over the sources as they are.
        low: 2.5 % quantile over bootstrap resamples of the sources.
        high: 97.5 % quantile.
        p: share of random pairings of scores and accuracies that give at least this value (one-sided).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def pearson(x: Rows, y: Rows) -> Values:
    """Pearson correlation of each row; NaN where a row is constant."""
    a = x - x.mean(axis=1, keepdims=True)
    b = y - y.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    constant = (x == x[:, :1]).all(axis=1) | (y == y[:, :1]).all(axis=1)
    return np.where(constant, np.nan, (a * b).sum(axis=1) / np.where(constant, 1.0, norms)).clip(-1, 1)


def spearman(x: Rows, y: Rows) -> Values:
    """Spearman correlation of each row, with mid-ranks for ties (P2 Table 2)."""
    return pearson(rankdata(x, axis=1), rankdata(y, axis=1))


def kendall(x: Rows, y: Rows) -> Values:
    """Kendall's tau-b of each row."""
    first, second = np.triu_indices(x.shape[1], 1)
    parts = []
    for start in range(0, len(x), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        a = np.sign(x[part, first] - x[part, second])
        b = np.sign(y[part, first] - y[part, second])
        untied = np.abs(a).sum(axis=1) * np.abs(b).sum(axis=1)
        parts.append(np.where(untied > 0, (a * b).sum(axis=1) / np.sqrt(np.maximum(untied, 1)), np.nan))
    return np.concatenate(parts)


def top_mean(x: Rows, y: Rows, k: int) -> Values:
    """Mean accuracy of the k sources of highest score over the mean of the k best accuracies (P2 Table 3)."""
    return _ratio(_of_top(x, y, k).mean(axis=1), np.sort(y, axis=1)[:, -k:].mean(axis=1), y.shape[1] > k)


def top_best(x: Rows, y: Rows, k: int) -> Values:
    """Accuracy of the best among the k sources of highest score over the best accuracy of all."""
    return _ratio(_of_top(x, y, k).max(axis=1), y.max(axis=1), y.shape[1] > k)


def statistics(k: int) -> dict[str, Callable[[Rows, Rows], Values]]:
    """Every statistic by its name in a document."""
    return {
        "spearman": spearman,
        "pearson": pearson,
        "kendall": kendall,
        f"top{k}_mean": lambda x, y: top_mean(x, y, k),
        f"top{k}_best": lambda x, y: top_best(x, y, k),
    }


def estimate_all(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], k: int, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Every statistic for each target, and under ``mean`` for their mean (the last column of P2's tables).

    The interval and p of the mean resample within each target, the targets themselves are given.

    Args:
        pairs: target -> scores and accuracies of the same sources.
        k: of the top-k statistics.
        seed: of resampling; the same for every metric, so that metrics are compared on the same resamples.
    """
    found: dict[str, dict[str, Estimate]] = {target: {} for target in pairs}
    samples = {
        target: _samples(np.array(x), np.array(y), seed, number)
        for number, (target, (x, y)) in enumerate(pairs.items())
    }
    if len(pairs) > 1:
        found["mean"] = {}
    for name, statistic in statistics(k).items():
        drawn = {target: tuple(statistic(*rows) for rows in three) for target, three in samples.items()}
        for target, (own, boot, shuffled) in drawn.items():
            found[target][name] = _estimate(own, boot, shuffled)
        if len(pairs) > 1:
            defined = [three for three in drawn.values() if np.isfinite(three[0]).all()]
            means = [_mean(rows) for rows in zip(*defined, strict=True)]
            found["mean"][name] = _estimate(*means) if means else Estimate(None)
    return found


def _samples(
    x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], seed: int, number: int
) -> tuple[tuple[Rows, Rows], tuple[Rows, Rows], tuple[Rows, Rows]]:
    """The pairs as they are, resampled with replacement, and paired at random."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, _RESAMPLING_STREAM, number))))
    places = rng.integers(len(x), size=(RESAMPLES, len(x)))
    shuffled = rng.permuted(np.tile(np.arange(len(x)), (RESAMPLES, 1)), axis=1)
    return (x[None], y[None]), (x[places], y[places]), (np.tile(x, (RESAMPLES, 1)), y[shuffled])


def _estimate(own: Values, boot: Values, shuffled: Values) -> Estimate:
    value = float(own[0])
    if not math.isfinite(value):
        return Estimate(None)
    known = boot[np.isfinite(boot)]
    low, high = (float(end) for end in np.quantile(known, (0.025, 0.975))) if len(known) else (None, None)
    as_good = int((shuffled >= value - 1e-12).sum())
    return Estimate(value, low, high, (as_good + 1) / (len(shuffled) + 1))


def _mean(rows: Sequence[Values]) -> Values:
    mean: Values = np.stack(rows).mean(axis=0)
    return mean


def _of_top(x: Rows, y: Rows, k: int) -> Rows:
    """Accuracies of the k sources of highest score; of equal ones the first."""
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(y, order, axis=1)


def _ratio(part: Values, whole: Values, defined: bool) -> Values:
    """NaN where k leaves no choice or nothing is right."""
    if not defined:
        return np.full(len(part), np.nan)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)
