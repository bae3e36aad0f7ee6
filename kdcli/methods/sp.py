"""SP: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019).

    L_SP = 1/b^2 sum_ij (G_s - G_t)_ij^2,   G: the rows of F F^T, each of length 1                        (Eq. 2 to 4)

* F: [b, D] the pooled features (ours), or with ``--levels maps`` a map, flattened [paper: the last one]. The diagonal
  counts. Grids and channels may differ.
* Default beta (``--relation-weight``) 3000 for 64 images a step [RepDistiller]; see :mod:`~kdcli.methods.relations`.
"""

from dataclasses import replace
from typing import Any, Literal, final

from jaxtyping import Float
from torch import Tensor

from kdcli.methods.base import Method, Needs, Setup
from kdcli.methods.levels import KINDS, TapOptions, choose_levels, fit_levels
from kdcli.methods.options import method_option
from kdcli.methods.relations import (
    NEEDS,
    SPARES,
    RelationalMethod,
    RelationOptions,
    Term,
    directions,
    relation_weight_option,
    wide,
)
from kdcli.methods.transfer import PRINTED


def similarity_loss(student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """SP: mean squared difference of row-normalised Gram matrices (Tung, Mori 2019, Eq. 2 to 4).

    Args:
        student: features or maps, which are flattened.
        teacher: likewise, of any shape.

    Returns:
        At least 0, at most 4/b.
    """
    grams = (each @ each.T for each in (wide(student.flatten(1)), wide(teacher.flatten(1))))
    ours, theirs = (directions(gram, 0.0) for gram in grams)
    return (ours - theirs).square().mean()


class SpOptions(RelationOptions, TapOptions):
    """What SP can be told."""

    one_map = True
    relation_weight: float = relation_weight_option(3000.0, rows=True)
    levels: Literal["features", "maps"] = method_option(
        "features", "What is compared: the pooled features, or a map (the paper: the last)."
    )


@final
class Sp(RelationalMethod):
    """SP; :attr:`Setup.own` has the map of each teacher, if maps are compared."""

    def terms(self, options: SpOptions) -> tuple[Term, ...]:
        """See :func:`similarity_loss`."""
        return (Term("sp", options.relation_weight, similarity_loss, falls=True),)

    def needs_of(self, options: RelationOptions) -> Needs:
        """Maps instead of features, where these are compared."""
        levels = options.levels if isinstance(options, SpOptions) else "features"
        return replace(RelationalMethod.needs_of(self, options), kinds=KINDS[levels])

    def check(self, setup: Setup) -> Setup:
        """Decides which level is compared."""
        levels = {name: choose_levels(setup, self.name, name, setup.options.levels) for name in setup.weights}
        own = {name: found[0] for name, found in levels.items()}
        return RelationalMethod.check(self, replace(setup, own=own))

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the level of each teacher."""
        levels = {f"{name}/{level.array}": level.document() for name, level in setup.own.items()}
        return {
            **Method.identity(self, setup),
            **({"maps": levels} if setup.options.levels == "maps" else {}),
        }

    def read_of(self, setup: Setup) -> dict[str, str]:
        """The array of its level."""
        return {name: level.array for name, level in setup.own.items()}

    def tap(self, setup: Setup) -> str | None:
        """The one that is named, or the last.

        Raises:
            UsageError: the student has no such layer.
        """
        return fit_levels(tuple(setup.own.values()), setup.opened())[0].tap


SP = Sp(
    name="sp", paper="SP, Tung and Mori 2019", equation="Eq. 4",
    summary="Similarities between a step's images, and labels.", Options=SpOptions, needs=NEEDS, defaults=PRINTED,
    spares=SPARES,
)  # fmt: skip
