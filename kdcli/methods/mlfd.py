"""P4: "Multi-Level Feature Distillation of Joint Teachers Trained on Distinct Image Datasets" (the student).

    L = CE(y, s) + alpha softCE(s, t; T) T^2 + sum_c beta_c MSE(e_c of the teacher, e_c of the student)     (Eq. 3)

* Weights. The paper prints alpha = 0.6 and beta_c = 0.2 beside a CE of weight 1 (``--loss-convention paper``). The
  released code computes 0.6 softCE T^2 + 0.2 MSE + 0.2 CE (``code``); without maps it leaves the MSE out and
  keeps 0.2 CE. So the labels weigh five times less there. Which of them made the paper's numbers is not known.
* Levels. ``paper``: the embedding (pooled features, the level of L1) and every map that is named (L2: one). ``code``:
  the maps alone; its hook for the embedding is never read. ``--mlfd-levels`` says otherwise.
* softCE: the cross-entropy of softened outputs, mean over the images, T = 2 on both sides, times T^2 [code].
* MSE: a mean over all elements, B C H W or B D [code]: the larger a map, the smaller its gradient at a pixel.
* Adaptors [paper section 3: "an adaptor layer can be inserted"; which layer is ours]: a 1x1 convolution where channels
  differ (a linear layer for embeddings), on the STUDENT's side. The paper brings the teacher's embedding to the size of
  the student's; trained by the same MSE, such an adaptor lowers the loss by shrinking its own target. The released
  code needs none: its joint teacher is built with the student's channels.
* Teachers are the frozen joint teacher, or any cached teacher that keeps a map. What is read was computed in eval mode:
  the joint teacher's dropout of 0.8 to 0.9 is off (the oldest released script left it on for L1).
* Adam, learning rate 1e-4, constant, weight decay 1e-3 of all parameters, 200 epochs, AutoAugment's ImageNet policy
  without crop or flip [paper section 4.4; code]. Batch 768, 240 or 192 by architecture: 240 here.
* The teacher's outputs are of the clean image, the student's view is augmented (``--teacher-view eval``) [code].
* Out of scope: the action recognition of P4's supplement.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from kdcli.errors import UsageError
from kdcli.methods.base import Choice, Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.comparison import compared
from kdcli.methods.levels import (
    EMBEDDING,
    Level,
    LevelOptions,
    Matching,
    Resize,
    Side,
    choose_matching,
    fit_matching,
    require_correspondence,
)
from kdcli.methods.logits import standardised, warn_of_scale
from kdcli.methods.losses import label_loss, soft_cross_entropy, weighted_sum
from kdcli.methods.options import StandardiseOptions, method_option, temperature_option
from kdcli.models.student import LABEL_HEAD, StudentOutput

PAPER = "P4, Multi-Level Feature Distillation"


CONVENTIONS: dict[object, dict[str, Any]] = {
    "paper": {"label_weight": 1.0, "distill_weight": 0.6, "level_weight": (0.2,), "mlfd_levels": "all"},
    "code": {"label_weight": 0.2, "distill_weight": 0.6, "level_weight": (0.2,), "mlfd_levels": "maps"},
}
"""Weights and levels of the two readings of Eq. 3."""


class MlfdOptions(LevelOptions, StandardiseOptions):
    """What the multi-level student can be told. What is not given follows the convention."""

    loss_convention: Literal["paper", "code"] = method_option(
        "paper",
        "Weights as P4 prints them (CE 1, KD 0.6, MSE 0.2), or as its code computes (CE 0.2).",
    )
    temperature: float = temperature_option(2.0)
    label_weight: float = method_option(
        CONVENTIONS["paper"]["label_weight"], "Weight of the labels' cross-entropy.", ge=0, le=1
    )
    distill_weight: float = method_option(
        CONVENTIONS["paper"]["distill_weight"], "Weight alpha of the softened cross-entropy.", ge=0, le=1e4
    )

    @model_validator(mode="before")
    @classmethod
    def _by_convention(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**CONVENTIONS.get(given.get("loss_convention"), {}), **given}


def mean_squared_error(
    one: Float[Tensor, "b ..."], other: Float[Tensor, "b ..."], count: float | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference over all elements of all images (P4 Eq. 3), in fp32.

    Args:
        one: the student's.
        other: the teacher's; whether a gradient flows into it is the caller's.
        count: what the sum of the images' means is divided by (see :class:`~kdcli.methods.batch.Counts`);
            default: their number.

    Returns:
        The mean, in squared units of the representation, >= 0.
    """
    rows = (one.float() - other.float()).square().flatten(1).mean(1)
    return rows.mean() if count is None else rows.sum() / (count or 1.0)


@final
class Adaptor(nn.Module):
    """Brings one side's representation to the shape of the other's.

    Args:
        own: shape of what is changed: [D] or [C, H, W].
        wanted: shape of the other side.
        resize: how height and width are changed; None where they are equal.
    """

    def __init__(self, own: Sequence[int], wanted: Sequence[int], resize: Resize | None = None) -> None:
        super().__init__()
        self._size = (wanted[1], wanted[2]) if tuple(own[1:]) != tuple(wanted[1:]) else None
        self._resize = resize
        self.layer: nn.Module = nn.Identity()
        if own[0] != wanted[0]:
            flat = len(own) == 1
            self.layer = nn.Linear(own[0], wanted[0]) if flat else nn.Conv2d(own[0], wanted[0], 1)

    def forward(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Resize, then the layer: both are linear, and the smaller map is cheaper to convolve."""
        if self._size is not None and self._resize == "pool":
            values = functional.adaptive_avg_pool2d(values, self._size)
        elif self._size is not None:
            values = functional.interpolate(values, self._size, mode="bilinear", antialias=True)
        adapted: Tensor = self.layer(values)
        return adapted


def make_adaptor(level: Level, side: Side, resize: Resize | None) -> Adaptor:
    """What makes a level comparable.

    Args:
        level: with both shapes.
        side: which side is changed.
        resize: how maps of unequal height and width are made equal.

    Raises:
        UsageError: the shapes differ in a way that was not allowed to be evened out.
    """
    student, teacher = level.student_shape, level.teacher_shape
    both = f"the student's {_named(level.tap, student)} and the teacher's {_named(level.array, teacher)}"
    if student[1:] != teacher[1:] and resize is None:
        raise UsageError(
            f"{both} differ in height and width",
            "Add --map-resize pool (or bilinear), or choose taps of equal size: --student-tap, --teacher-tap.",
        )
    if student[0] != teacher[0] and side == "none":
        raise UsageError(
            f"{both} differ in {'channels' if level.is_map else 'width'}, and --adaptor none inserts no adaptor",
            "Use --adaptor student, or a joint teacher of the student's channels: kd fuse-teachers --map-channels N.",
        )
    own, wanted = (teacher, student) if side == "teacher" else (student, teacher)
    return Adaptor(own, wanted, resize)


def _named(name: str | None, shape: Sequence[int]) -> str:
    return f"{name or EMBEDDING} ({' x '.join(map(str, shape))})"


@final
class MultiLevelDistillation(Objective):
    """Labels, a teacher's softened outputs and its representation at some levels (P4 Eq. 3).

    Args:
        teacher: its name.
        matching: levels (with the shapes of both sides), and how they are made comparable.
        options: weights of labels and outputs, and T.
        smoothing: of the labels, in [0, 1).

    Raises:
        UsageError: a level has unequal shapes, see :func:`make_adaptor`.
    """

    def __init__(
        self, teacher: str, matching: Matching, options: MlfdOptions, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self._teacher, self._matching = teacher, matching
        self._options, self._smoothing = options, smoothing
        # A list, not a dict: names of taps hold dots and slashes, which module names may not.
        self.adaptors = nn.ModuleList(
            make_adaptor(level, matching.adaptor, matching.resize) for level in matching.levels
        )
        columns = torch.tensor(matching.columns or (), dtype=torch.int64)
        self.register_buffer("_columns", columns, persistent=False)

    def active(self) -> tuple[str, ...]:
        """The classifier, where labels and teacher meet."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """The teacher's logits and what is matched."""
        return {self._teacher: ("logits", *self._matching.arrays)}

    def taps(self) -> tuple[str, ...]:
        """The student's side of the maps."""
        return self._matching.taps

    def notes(self) -> tuple[str, ...]:
        """One line a level: its shapes, and its adaptor."""
        return tuple(
            f"level {level.array} {_shape(level.teacher_shape)}, of the student {level.tap or EMBEDDING} "
            f"{_shape(level.student_shape)}: weight {level.weight:g}, {self._adapted(level, adaptor)}"
            for level, adaptor in zip(self._matching.levels, self.adaptors, strict=True)
        )

    def _adapted(self, level: Level, adaptor: nn.Module) -> str:
        parameters = sum(parameter.numel() for parameter in adaptor.parameters())
        layer = (
            f"an adaptor of {parameters} parameters on the {self._matching.adaptor}'s side"
            if parameters
            else "no adaptor"
        )
        resized = level.student_shape[1:] != level.teacher_shape[1:]
        return layer + (f", resized by --map-resize {self._matching.resize}" if resized else "")

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P4 Eq. 3; parts ``label``, ``distill`` (softened cross-entropy times T^2) and ``mse/LEVEL``."""
        theirs, logits = teacher[self._teacher], student.logits[LABEL_HEAD]
        images, temperature = batch.count("images"), self._options.temperature
        parts = {
            "label": label_loss(logits, batch, self._smoothing),
            "distill": temperature**2
            * soft_cross_entropy(
                compared(self._options, logits),
                compared(self._options, self._ordered(theirs["logits"])),
                temperature,
                count=images,
            ),
        }
        weights = {"label": self._options.label_weight, "distill": self._options.distill_weight}
        for level, adaptor in zip(self._matching.levels, self.adaptors, strict=True):
            own = student.features if level.tap is None else student.maps[level.tap]
            target = theirs[level.array].detach().float()
            if self._matching.adaptor == "teacher":
                target = adaptor(target)
            else:
                own = adaptor(own.float())
            parts[level.name] = mean_squared_error(own, target, images)
            weights[level.name] = level.weight
        loss = weighted_sum(parts, weights, list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _ordered(self, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        columns = self.get_buffer("_columns")
        return logits[:, columns] if len(columns) else logits


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@final
class Mlfd(Method):
    """P4's student; :attr:`Setup.own` is a :class:`~kdcli.methods.levels.Matching`."""

    def weigh(self, choice: Choice) -> dict[str, float]:
        """All weight on the one teacher.

        Raises:
            UsageError: there are several.
        """
        if len(choice.teachers) > 1:
            raise UsageError(
                f"{self.name} learns from one teacher, and {len(choice.teachers)} are cached or named: "
                f"{', '.join(choice.teachers)}",
                "Name it: --teacher NAME. Several are fused into one first: kd fuse-teachers.",
            )
        return dict.fromkeys(choice.teachers, 1.0)

    def check(self, setup: Setup) -> Setup:
        """Decides which levels are matched."""
        warn_of_scale(setup.options, setup.options.label_weight)
        return replace(setup, own=choose_matching(setup, self.name))

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """Logits, and what is matched."""
        return dict.fromkeys(setup.weights, ("logits", *(setup.own.arrays if setup.own else ())))

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the levels."""
        return {**Method.identity(self, setup), **setup.own.document()}

    def describe(self, setup: Setup) -> list[str]:
        """P4's Eq. 3 with its numbers."""
        options: MlfdOptions = setup.options
        terms = [
            f"{options.label_weight:g} CE",
            f"{options.distill_weight:g} x {options.temperature**2:g} soft cross-entropy at T = "
            f"{options.temperature:g}",
            *(f"{level.weight:g} MSE of {level.array}" for level in setup.own.levels),
        ]
        return [
            f"loss ({options.loss_convention}): {' + '.join(terms)}; teacher '{next(iter(setup.weights))}', "
            f"{setup.teacher_view} view",
            *standardised(options),
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`MultiLevelDistillation`."""
        matching = fit_matching(setup.own, setup.opened())
        require_correspondence(setup, matching)
        return MultiLevelDistillation(
            next(iter(setup.weights)), matching, setup.options, setup.settings.label_smoothing
        )


MLFD = Mlfd(
    name="mlfd",
    paper=PAPER,
    equation="Eq. 3",
    summary="Labels, one (joint) teacher's softened outputs, and its embedding and maps.",
    Options=MlfdOptions,
    needs=Needs(frozenset({"logits"}), labels=True, same=True),
    defaults=Settings(
        optimizer="adam",
        lr=1e-4,
        weight_decay=1e-3,
        decay_all=True,
        schedule="constant",
        epochs=200,
        batch_size=240,
    ),
    recipe="autoaugment",
    teacher_view="eval",
)
