"""Regression on a teacher's representation: of several teachers without labels, or FitNets' hint beside them.

    L = w CE(labels) + sum_k w_k sum_l beta_l MSE(A_kl x_l, t_kl) / phi_kl^2

* x_l is the student's pooled features or a map of its, t_kl those of teacher k, A_kl a trained layer on the student's
  side: linear for features, a 1x1 convolution for maps. It is there also where shapes agree: the student has one
  representation, the teachers one each. Saved in checkpoints, not exported.
* Maps meet at the smaller grid, axis by axis; the larger one is averaged to it (as RepDistiller and mdistiller do).
* phi_kl^2 is the teacher's variance, the mean over channels, from the cached rows that the run reads (--standardise
  global). Without it the squared error of a teacher is as large as its numbers happen to be, and so is its say among
  several. With it a term is the share of the teacher's variance that is left unexplained: 1 - R^2. A rotation to equal
  variances (PHI-S, arXiv 2410.01680) has the same squared error. What a layer adds or scales it learns itself. A column
  that is constant adds no variance and is learnt by the layer's bias; a teacher that is constant is refused.
* ``feature``: no labels, pooled features (--levels), beta 1. ``hint``: labels, one map at the student's middle tap,
  beta 100, raw (FitNets, arXiv 1412.6550, at the numbers of RepDistiller, trained jointly; the paper trains the
  lower half first). Its regressor there is a convolution with BatchNorm and ReLU, which no negative target is reached
  by: here it is linear.
* lr, schedule, batch: OURS, those of P2's methods here.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.methods.adaptors import mean_squared_error, pointwise
from kdcli.methods.base import Needs, Objective, Setup
from kdcli.methods.batch import TeacherOutputs
from kdcli.methods.cached_rows import mean_variance, some_rows
from kdcli.methods.levels import Levels, LevelWeights, level_weight_option
from kdcli.methods.matching import LevelMethod, LevelObjective, LevelsOf, MatchOptions
from kdcli.methods.options import label_weight_option, method_option
from kdcli.methods.weighted import OURS
from kdcli.models.student import StudentOutput

Standard = Literal["global", "none"]


def _standardise_option(default: Standard) -> Standard:
    option: Standard = method_option(
        default, "Scale of the targets: global (divided by their standard deviation, from the cache), none."
    )
    return option


class FeatureOptions(MatchOptions):
    """What regression on features can be told."""

    levels: Literal["all", "maps", "features"] = method_option(
        "features", "What of the teachers is learnt: features, maps, or all (both)."
    )
    standardise: Standard = _standardise_option("global")
    label_weight: float = label_weight_option(0.0)


class HintOptions(MatchOptions):
    """What a hint can be told."""

    level_weight: LevelWeights = level_weight_option(100.0)
    standardise: Standard = _standardise_option("none")


@final
class FeatureRegression(LevelObjective):
    """Squared errors of what trained layers make of the student.

    Args:
        levels: of each teacher, with the shapes of both sides.
        statistics: of each level of each teacher: phi^2, > 0, and the mean of each channel.
        weights: of each teacher, > 0.
        label_weight: of the labels, >= 0.
        smoothing: of the labels, in [0, 1).
    """

    part = "mse"
    scales: Tensor

    def __init__(
        self,
        levels: LevelsOf,
        statistics: Mapping[str, Sequence[tuple[float, Float[np.ndarray, " c"]]]],
        weights: Mapping[str, float],
        label_weight: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(levels, weights, label_weight, smoothing)
        self.adaptors = nn.ModuleList(
            (pointwise(level.student_shape)(level.student_shape[0], level.teacher_shape[0], 1) if level.is_map else
             nn.Linear(level.student_shape[0], level.teacher_shape[0]))
            for _, level in self.terms
        )  # fmt: skip
        found = [each for name in levels for each in statistics[name]]
        self.register_buffer("scales", torch.tensor([scale for scale, _ in found]))
        for number, (_, mean) in enumerate(found):
            self.register_buffer(f"mean{number}", torch.tensor(mean, dtype=torch.float32))

    def term(self, number: int, own: Tensor, target: Tensor, count: float | None) -> Tensor:
        """The mean squared error over all elements of all images, divided by phi^2."""
        return mean_squared_error(self.adaptors[number](own), target, count) / self.scales[number]

    def compare(
        self, student: StudentOutput, teacher: TeacherOutputs
    ) -> dict[str, tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]]:
        """Of each level ``TEACHER/ARRAY``: predictions and the teacher's outputs, both less their mean."""
        found = {}
        for number, (name, level) in enumerate(self.terms):
            own, target = self.pair(level, student, teacher[name])
            both = (self.adaptors[number](own), target.float())
            mean = self.get_buffer(f"mean{number}")
            ours, theirs = (
                each.flatten(2).transpose(1, 2) if level.is_map else each[:, None] for each in both
            )
            found[f"{name}/{level.array}"] = ours - mean, theirs - mean
        return found

    def pooled(self) -> bool:
        """Whether labels are learnt from, or any features predicted."""
        return bool(self._label_weight) or any(not level.is_map for _, level in self.terms)


@final
class Regression(LevelMethod):
    """``feature`` and ``hint``."""

    def levels(self, options: MatchOptions) -> Levels:
        """Those asked for; of a hint maps."""
        return options.levels if isinstance(options, FeatureOptions) else "maps"

    def build(self, setup: Setup) -> Objective:
        """See :class:`FeatureRegression`."""
        options: FeatureOptions | HintOptions = setup.options
        levels = self.fitted(setup)
        statistics = {
            name: [statistics_of(setup, name, level.array) for level in own] for name, own in levels.items()
        }
        if options.standardise == "none":
            statistics = {name: [(1.0, mean) for _, mean in own] for name, own in statistics.items()}
        return FeatureRegression(
            levels, statistics, setup.weights, options.label_weight, setup.settings.label_smoothing
        )

    def predicts(self, options: FeatureOptions | HintOptions) -> bool:
        """Features are all that is learnt, where labels have no weight."""
        return not options.label_weight


def statistics_of(setup: Setup, teacher: str, array: str) -> tuple[float, Float[np.ndarray, " c"]]:
    """Variance (n - 1) of a teacher's output over images and cells, the mean over its channels, > 0; and their means.

    Raises:
        BadDataError: it is the same for all images.
    """
    values = some_rows(setup, teacher, array).astype(np.float64)
    channels = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    return mean_variance(channels, teacher, array), channels.mean(axis=0)


FEATURE = Regression(
    name="feature", paper="FitNets, Romero et al. 2015", equation="Eq. 3, without labels",
    summary="Features, maps or both of one or several teachers; no labels.", Options=FeatureOptions,
    needs=Needs(frozenset({"features"}), several_labels=True), defaults=OURS,
)  # fmt: skip
HINT = Regression(
    name="hint", paper="FitNets, Romero et al. 2015", equation="Eq. 3, beside the labels",
    summary="Labels, and a map in the middle of the student that predicts one of the teacher.", Options=HintOptions,
    needs=Needs(frozenset({"maps"}), labels=True, several_labels=True), defaults=OURS,
    spares={"labels": "--label-weight 0"}, tap="middle",
)  # fmt: skip
