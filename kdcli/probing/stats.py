"""Statistics of repeated draws."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of an accuracy over draws.

    Attributes:
        mean: fraction in [0, 1].
        std: sample standard deviation (ddof = 1) over draws; None for a single draw.
        ci95: half-width of the 95 % interval of the mean (Student t); None for a single draw.
            It covers the choice of the shots, not that of the test images, which stay the same.
    """

    mean: float
    std: float | None
    ci95: float | None

    def document(self) -> dict[str, float | None]:
        """As JSON."""
        return {"mean": self.mean, "std": self.std, "ci95": self.ci95}


def summarise(values: Float64[np.ndarray, " draws"]) -> Summary:
    """Mean, sample standard deviation and 95 % interval of the mean.

    Args:
        values: one accuracy per draw, at least one.
    """
    from scipy.stats import t

    draws = len(values)
    if draws == 1:
        return Summary(float(values[0]), None, None)
    std = float(values.std(ddof=1))
    return Summary(float(values.mean()), std, float(t.ppf(0.975, draws - 1)) * std / math.sqrt(draws))
