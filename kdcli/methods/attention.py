"""Attention transfer: Zagoruyko and Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928), section 3.1.

    L = w CE(labels) + sum_k w_k sum_l beta_l AT_l,   Q = mean over channels of F^2, flattened, divided by its L2 norm
    AT = mean over images and cells of (Q_s - Q_t)^2        (code: the authors', RepDistiller's, mdistiller's)
    AT = mean over images of ||Q_s - Q_t||_2                (paper: Eq. 2, without its factor 1/2)

* No layer is trained: channels are averaged away. Maps meet at the smaller grid, where the larger one is averaged to it
  before it is squared. beta 1000 belongs to ``code`` (x RepDistiller's and torchdistill's numbers); the paper's form is
  about 20 times as large on 4 x 4 maps.
* Squares in fp32: those of fp16 end at 256. Maps of one cell have the same attention whatever they hold: refused.
* Tokens of a ViT whose norms are outliers own Q.
* Every map that is named, each with the student's layer: --teacher-tap, --student-tap.
"""

from collections.abc import Mapping
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional

from kdcli.errors import UsageError
from kdcli.methods.base import Needs, Objective, Setup
from kdcli.methods.levels import LevelWeights, level_weight_option
from kdcli.methods.matching import LevelMethod, LevelObjective, LevelsOf, MatchOptions
from kdcli.methods.options import method_option
from kdcli.methods.weighted import OURS

Form = Literal["code", "paper"]


class AttentionOptions(MatchOptions):
    """What attention transfer can be told."""

    level_weight: LevelWeights = level_weight_option(1000.0)
    at_form: Form = method_option(
        "code",
        "code: mean squared difference of attention maps (what all code computes); paper: its L2 norm.",
    )


def attention(values: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "b n"]:
    """Where a map is large: the mean of squares over its channels, of L2 norm 1 over its cells, of clips those of all
    frames, >= 0, in fp32."""
    return functional.normalize(values.float().square().mean(1).flatten(1), dim=1)


def attention_distance(
    own: Float[Tensor, "b c *t h w"],
    target: Float[Tensor, "b k *t h w"],
    form: Form = "code",
    count: float | None = None,
) -> Float[Tensor, ""]:
    """How far apart two maps of attention are, mean over the images.

    Args:
        own: the student's.
        target: the teacher's, at the same grid.
        form: mean of squares over the cells, in [0, 2 / hw], or their L2 norm, in [0, sqrt 2].
        count: what the sum over the images is divided by (see :class:`~kdcli.methods.batch.Counts`); default: their
            number.
    """
    apart = attention(own) - attention(target)
    rows = apart.square().mean(1) if form == "code" else vector_norm(apart, dim=1)
    return rows.mean() if count is None else rows.sum() / (count or 1.0)


@final
class AttentionTransfer(LevelObjective):
    """See the module.

    Args:
        levels: of each teacher, with the shapes of both sides: maps.
        weights: of each teacher, > 0.
        label_weight: of the labels, >= 0.
        smoothing: of the labels, in [0, 1).
        form: of the distance.

    Raises:
        UsageError: a grid of one cell.
    """

    part = "at"

    def __init__(
        self,
        levels: LevelsOf,
        weights: Mapping[str, float],
        label_weight: float = 1.0,
        smoothing: float = 0.0,
        form: Form = "code",
    ) -> None:
        super().__init__(levels, weights, label_weight, smoothing)
        self._form: Form = form
        for name, level in self.terms:
            if set(level.grid or ()) == {1}:
                raise UsageError(
                    f"'{name}' {level}: where a map has one cell, all attention is there, and nothing can be learnt",
                    "Match larger maps: --student-tap TAP, --teacher-tap TAP, or --image-size.",
                )

    def term(self, number: int, own: Tensor, target: Tensor, count: float | None) -> Tensor:
        """See :func:`attention_distance`."""
        return attention_distance(own, target, self._form, count)


@final
class Attention(LevelMethod):
    """``at``."""

    def build(self, setup: Setup) -> Objective:
        """See :class:`AttentionTransfer`."""
        options: AttentionOptions = setup.options
        return AttentionTransfer(
            self.fitted(setup),
            setup.weights,
            options.label_weight,
            setup.settings.label_smoothing,
            options.at_form,
        )


AT = Attention(
    name="at", paper="AT, Zagoruyko and Komodakis 2017", equation="Eq. 2",
    summary="Labels, and where the maps of a teacher are large.", Options=AttentionOptions,
    needs=Needs(frozenset({"maps"}), labels=True, several_labels=True), defaults=OURS,
    spares={"labels": "--label-weight 0"},
)  # fmt: skip
