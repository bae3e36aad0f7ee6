"""What a metric is: one object, in the file of its function. kdcli/registry.py lists kd's own by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from jaxtyping import Float

from kdcli.errors import BadDataError
from kdcli.metrics.targets import Labels, Targets

On = Literal["features", "pseudo"]
"""What of a source is compared with the labels: its features, or the softmax of its logits."""

BOTH: Final[tuple[On, ...]] = ("features", "pseudo")


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A similarity of a source and a labelled probe set; higher is better.

    The traits say what does not change the score; ``False`` claims nothing.

    Attributes:
        name: as given to ``--metric``; ``NAME-VARIANT`` is ``--metric NAME --variant VARIANT``, too.
        score: takes finite values [n, d] and checked labels of the same n images; raises BadDataError
            where the score would be undefined.
        source: paper and equation.
        settings: the choices that decide the score, to be recorded with it.
        on: what it can be computed on; the first is the default.
        multi_label: whether labels may be 0/1 rows.
        scale_free: features times a constant.
        rotation_free: features turned by an orthogonal matrix.
        order_free: images, with their labels, in another order.
        renaming_free: other numbers for the classes.
        stepped: gives the same metric with at most so many steps, where it is found by iteration.
    """

    name: str
    score: Callable[[Float[np.ndarray, "n d"], Targets], float]
    source: str
    settings: str = ""
    on: tuple[On, ...] = BOTH
    multi_label: bool = False
    scale_free: bool = False
    rotation_free: bool = False
    order_free: bool = False
    renaming_free: bool = False
    stepped: "Callable[[int], Metric] | None" = None

    def __call__(self, values: Float[np.ndarray, "n d"], labels: Labels) -> float:
        """The score of one source.

        Args:
            values: features, or rows of probabilities, any float type.
            labels: of the same images; ``Targets`` shares work between sources.

        Raises:
            BadDataError: labels that it cannot compare with, or a score that is undefined.
        """
        targets = Targets.of(labels).beside(values)
        score = float(self.score(values, targets if self.multi_label else targets.single(self.name)))
        if not math.isfinite(score):
            raise BadDataError(
                f"{self.name} is {score} here", "Leave this source out, or use another metric."
            )
        return score
