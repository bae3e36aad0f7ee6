"""Intervals and tests of values by seed: a seed is one observation, all that is averaged within it is one number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import final

from scipy.stats import t

BySeed = Mapping[int, float]
"""A number a seed."""


@final
@dataclass(frozen=True, slots=True)
class Effect:
    """What was found.

    Attributes:
        mean: over seeds.
        low, high: 95 % interval, by Student's t; infinite where there are fewer than two seeds.
        seeds: how many.
        spread: standard error of the mean.
    """

    mean: float
    low: float
    high: float
    seeds: int
    spread: float

    def above(self, bound: float) -> float:
        """Of "the mean is ``bound`` or less" the p-value, one-sided; 1 where there are fewer than two seeds."""
        return self._tail(self.mean - bound)

    def below(self, bound: float) -> float:
        """Of "the mean is ``bound`` or more" the p-value, one-sided."""
        return self._tail(bound - self.mean)

    def _tail(self, distance: float) -> float:
        if self.seeds < 2:
            return 1.0
        if self.spread == 0:
            return 0.0 if distance > 0 else 1.0
        return float(t.sf(distance / self.spread, self.seeds - 1))


def effect(values: Sequence[float]) -> Effect:
    """Mean and 95 % interval.

    Raises:
        ValueError: there is no value.
    """
    if len(values) < 2:
        return Effect(fmean(values), float("-inf"), float("inf"), len(values), float("inf"))
    spread = stdev(values) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * spread
    return Effect(fmean(values), fmean(values) - half, fmean(values) + half, len(values), spread)


def paired(first: BySeed, second: BySeed) -> list[float]:
    """Differences of the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values for several tests at once (Holm, 1979): the chance of one false "holds" among them stays 5 %."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
