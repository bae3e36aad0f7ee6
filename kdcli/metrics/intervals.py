"""95 % intervals of accuracies, and of differences between two: over test images, and over seeds.

An interval over test images says how far another draw of test images would move the number; it says nothing about
another seed. One over seeds says the reverse.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
from jaxtyping import Bool

LEVEL = 0.95
_Z = 1.959963984540054  # of the standard normal, 97.5 %

Interval = tuple[float, float]
"""Low and high end, as fractions."""


def of_share(right: int, images: int) -> Interval:
    """Wilson's score interval of a share (JASA 1927).

    Args:
        right: how many, 0 to ``images``.
        images: of how many, at least 1.
    """
    from scipy.stats import binomtest

    found = binomtest(right, images).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def of_difference(first: tuple[int, int], second: tuple[int, int]) -> Interval:
    """Interval of a difference of shares from their counts alone: Newcombe's, of two Wilson intervals.

    Newcombe, Statistics in Medicine 17 (1998) 873, method 10: for two independent draws. Of two models on the same
    images it is wider than need be, as both tend to fail on the same ones.

    Args:
        first: how many right, of how many.
        second: likewise.
    """
    (p, (low_p, high_p)), (q, (low_q, high_q)) = (
        (right / images, of_share(right, images)) for right, images in (first, second)
    )
    return p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q)


def of_paired(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> Interval:
    """Interval of the difference of two models' accuracies on the same images: Bonett and Price's.

    Bonett and Price, JEBS 37 (2012) 479, eq. 8: Wald's, with one image added to either kind of disagreement, which
    holds its level in small samples; of two models that never disagree it is not empty.

    Args:
        first: on which images the one is right.
        second: on which the other is.
    """
    images = len(first)
    gained = (int((first & ~second).sum()) + 1) / (images + 2)
    lost = (int((~first & second).sum()) + 1) / (images + 2)
    half = _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (images + 2))
    return max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)


def of_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of two or more independent runs; empty where all are equal."""
    from scipy.stats import t

    count = len(values)
    half = float(t.ppf(0.5 + LEVEL / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return fmean(values) - half, fmean(values) + half


def of_seed_difference(first: Sequence[float], second: Sequence[float], paired: bool) -> Interval:
    """T interval of the difference of the means of two sets of two or more runs each.

    Args:
        first: of the one, a value a run.
        second: of the other.
        paired: whether the runs belong together one by one, as those of one seed do; else Welch's interval.
    """
    from scipy.stats import t

    if paired:
        return of_seeds([a - b for a, b in zip(first, second, strict=True)])
    parts = [(stdev(each) ** 2 / len(each), len(each) - 1) for each in (first, second)]
    error = sum(part for part, _ in parts)
    gap = fmean(first) - fmean(second)
    if error == 0:
        return gap, gap
    freedom = error**2 / sum(part**2 / count for part, count in parts)
    half = float(t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(error)
    return gap - half, gap + half
