"""VID: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (arXiv 1904.05835).

    L = w CE(labels) + sum_k w_k sum_l beta_l VID_l
    VID = mean over images, channels and cells of  ((mu(F_s) - F_t)^2 / v_c + log v_c) / 2,   v_c = softplus(a_c) + 1e-5

* A lower bound on the mutual information of both maps, for a Gaussian of mean mu(F_s) and a variance a channel: one
  that cannot be predicted gets a large variance, and a small say. log(2 pi) / 2 is left out: the value may be below 0.
* mu: three 1x1 convolutions without bias, ReLU between them, as wide as the teacher [code: RepDistiller,
  torchdistill]. a_c is trained with them (mdistiller keeps it in a plain list, where no optimiser finds it); v starts
  at 5. Both are in checkpoints, not in the export.
* Maps meet at the smaller grid, where the larger one is averaged to it. beta 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kdcli.methods.adaptors import pointwise
from kdcli.methods.base import Needs, Objective, Setup
from kdcli.methods.matching import LevelMethod, LevelObjective, LevelsOf, MatchOptions
from kdcli.methods.weighted import OURS

_LEAST = 1e-5
_START = 5.0


def gaussian_error(
    mean: Float[Tensor, "b c *t h w"],
    target: Float[Tensor, "b c *t h w"],
    variance: Float[Tensor, " c"],
    count: float | None = None,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of a Gaussian without its constant, mean over all elements (VID), in fp32.

    Args:
        mean: what the student predicts.
        target: the teacher's map.
        variance: of each channel, > 0.
        count: what the sum over the images is divided by (see :class:`~kdcli.methods.batch.Counts`); default: their
            number.

    Returns:
        In nats an element; below 0 where a variance below 1 fits.
    """
    spread = variance.float().reshape(-1, *[1] * (mean.ndim - 2))
    rows = ((mean.float() - target.float()).square() / spread + spread.log()).flatten(1).mean(1) / 2
    return rows.mean() if count is None else rows.sum() / (count or 1.0)


@final
class VariationalPart(nn.Module):
    """mu and v of one level.

    Args:
        own: shape of the student's map: [C, H, W], of clips [C, T, H, W].
        wanted: channels of the teacher's.
    """

    def __init__(self, own: Sequence[int], wanted: int) -> None:
        super().__init__()
        widths, layer = [own[0], wanted, wanted], pointwise(own)
        first, second, third = (layer(width, wanted, 1, bias=False) for width in widths)
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.spread = nn.Parameter(torch.full((wanted,), math.log(math.expm1(_START - _LEAST))))

    @property
    def variance(self) -> Float[Tensor, " c"]:
        """V of each channel, > 0."""
        return functional.softplus(self.spread) + _LEAST


@final
class VariationalTransfer(LevelObjective):
    """See the module.

    Args:
        levels: of each teacher, with the shapes of both sides: maps.
        weights: of each teacher, > 0.
        label_weight: of the labels, >= 0.
        smoothing: of the labels, in [0, 1).
    """

    part = "vid"

    def __init__(
        self,
        levels: LevelsOf,
        weights: Mapping[str, float],
        label_weight: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(levels, weights, label_weight, smoothing)
        self.parts = nn.ModuleList(
            VariationalPart(level.student_shape, level.teacher_shape[0]) for _, level in self.terms
        )

    def term(self, number: int, own: Tensor, target: Tensor, count: float | None) -> Tensor:
        """See :func:`gaussian_error`."""
        part = self.parts[number]
        assert isinstance(part, VariationalPart)
        return gaussian_error(part.mean(own), target, part.variance, count)


@final
class Variational(LevelMethod):
    """``vid``."""

    def build(self, setup: Setup) -> Objective:
        """See :class:`VariationalTransfer`."""
        return VariationalTransfer(
            self.fitted(setup), setup.weights, setup.options.label_weight, setup.settings.label_smoothing
        )


VID = Variational(
    name="vid", paper="VID, Ahn et al. 2019", equation="Gaussian, a variance a channel",
    summary="Labels, and maps of a teacher predicted with a variance of each channel.", Options=MatchOptions,
    needs=Needs(frozenset({"maps"}), labels=True, several_labels=True), defaults=OURS,
    spares={"labels": "--label-weight 0"},
)  # fmt: skip
