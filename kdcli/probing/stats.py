"""Statistics of repeated draws, and of two representations on the same ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
from jaxtyping import Float64

ALPHA: Final = 0.05
"""Level of every test here; none is corrected for how many are made."""
Verdict = Literal["better", "equal", "worse"]
VERDICTS: Final[tuple[Verdict, ...]] = ("better", "equal", "worse")


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


@final
@dataclass(frozen=True, slots=True)
class Paired:
    """A difference between two representations on the same draws, or on the same test images.

    Attributes:
        mean: of the differences, as a fraction: above 0 the first is better.
        std: sample standard deviation (ddof = 1) of the differences; None for a single one.
        ci95: half-width of the 95 % interval of the mean (Student t).
        n: how many differences.
        p: of a two-sided paired t-test of no difference.
        margin: what "no worse than" tolerates.
        p_not_worse: of the one-sided test that the mean is above -margin.
        p_not_better: of the one-sided test that it is below +margin.
    """

    mean: float
    std: float | None
    ci95: float | None
    n: int
    p: float | None
    margin: float
    p_not_worse: float | None
    p_not_better: float | None

    @property
    def p_equivalent(self) -> float | None:
        """Of Schuirmann's two one-sided tests together (TOST): the larger of the two."""
        if self.p_not_worse is None or self.p_not_better is None:
            return None
        return max(self.p_not_worse, self.p_not_better)

    def verdict(self, equal_within: float) -> Verdict:
        """For a tally: better or worse by more than ``equal_within``, else equal. No significance is asked for."""
        if abs(self.mean) <= equal_within + 1e-12:  # 0.01 is no binary fraction
            return "equal"
        return "better" if self.mean > 0 else "worse"

    def document(self) -> dict[str, Any]:
        """As JSON; null where a single difference has no spread."""
        return {
            "mean": self.mean,
            "std": self.std,
            "ci95": self.ci95,
            "n": self.n,
            "p": self.p,
            "tost": {
                "margin": self.margin,
                "alpha": ALPHA,
                "p_not_worse": self.p_not_worse,
                "p_not_better": self.p_not_better,
                "p_equivalent": self.p_equivalent,
                "not_worse": None if self.p_not_worse is None else self.p_not_worse < ALPHA,
                "equivalent": None if self.p_equivalent is None else self.p_equivalent < ALPHA,
            },
        }


def compare(ours: Float64[np.ndarray, " n"], baseline: Float64[np.ndarray, " n"], margin: float) -> Paired:
    """Paired statistics of ``ours - baseline``.

    "No worse than the baseline" is Schuirmann's (1987) lower one-sided test; both of his tests together say
    "equal but for the margin".

    Args:
        ours: a score per draw, or 1 and 0 per test image.
        baseline: of the same draws, or images, in the same order.
        margin: > 0, in the scores' unit.
    """
    from scipy.stats import t

    differences = ours - baseline
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        return Paired(mean, None, None, 1, None, margin, None, None)
    std = float(differences.std(ddof=1))
    error = std / math.sqrt(n)

    def above(value: float) -> float:
        """P(T > value / error): without spread, certain, where scipy's ttest_1samp warns and gives NaN."""
        if error == 0:
            return 0.5 if value == 0 else float(value < 0)
        return float(t.sf(value / error, n - 1))

    return Paired(
        mean=mean,
        std=std,
        ci95=float(t.ppf(0.975, n - 1)) * error,
        n=n,
        p=min(1.0, 2 * above(abs(mean))),
        margin=margin,
        p_not_worse=above(mean + margin),
        p_not_better=above(margin - mean),
    )


def tally(
    verdicts: Mapping[str, Verdict], relatedness: Mapping[str, str]
) -> dict[str, dict[Verdict, list[str]]]:
    """P1's Table 3: on which targets a representation is better, equal or worse, by relatedness.

    Args:
        verdicts: by target.
        relatedness: of each target: ``related``, ``unrelated`` or ``unmarked``.

    Returns:
        Targets by relatedness and verdict; a relatedness that no target has is left out.
    """
    found: dict[str, dict[Verdict, list[str]]] = {}
    for kind in ("related", "unrelated", "unmarked"):
        mine = [target for target in verdicts if relatedness[target] == kind]
        if mine:
            found[kind] = {each: [target for target in mine if verdicts[target] == each] for each in VERDICTS}
    return found
