"""Intervals for shares of test images."""

from math import sqrt
from typing import Final

Z95: Final = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


def paired_difference(won: int, lost: int, images: int) -> tuple[float, float]:
    """95 % interval of the difference in accuracy of two models on the same images.

    Agresti and Min, "Simple improved confidence intervals for comparing matched proportions" (Statistics in Medicine
    2005): Wald's interval after half an image is added to each of the four cells.

    Args:
        won: images that only the first model gets right.
        lost: images that only the second one does.
        images: tested, >= 1.

    Returns:
        The least and the largest difference, in [-1, 1].
    """
    first, second, total = won + 0.5, lost + 0.5, images + 2
    difference = (first - second) / total
    spread = Z95 * sqrt((first + second) - (first - second) ** 2 / total) / total
    return max(-1.0, difference - spread), min(1.0, difference + spread)
