"""P4: "Multi-Level Feature Distillation of Joint Teachers Trained on Distinct Image Datasets" (the student).

    L = CE(y, s) + alpha softCE(s, t; T) T^2 + sum_c beta_c MSE(e_c of the teacher, e_c of the student)     (Eq. 3)

* Weights. The paper prints alpha = 0.6 and beta_c = 0.2 beside a CE of weight 1 (``--loss-convention paper``). The
  released code computes 0.6 softCE T^2 + 0.2 MSE + 0.2 CE (``code``); without maps it leaves the MSE out and
  keeps 0.2 CE. So the labels weigh five times less there. Which of them made the paper's numbers is not known.
* Levels. ``paper``: the embedding (pooled features, the level of L1) and every map that is named (L2: one). ``code``:
  the maps alone; its hook for the embedding is never read. ``--levels`` says otherwise.
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from kdcli.console import console
from kdcli.errors import UsageError
from kdcli.methods.adaptors import Adaptor, Resize, mean_squared_error
from kdcli.methods.base import Choice, Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.columns import choose_columns
from kdcli.methods.comparison import compared
from kdcli.methods.levels import (
    EMBEDDING,
    KINDS,
    Level,
    LevelOptions,
    choose_levels,
    fit_levels,
    require_correspondence,
    taps_of,
)
from kdcli.methods.logits import standardised, warn_of_scale
from kdcli.methods.losses import label_loss, soft_cross_entropy, teacher_divergence, weighted_sum
from kdcli.methods.options import StandardiseOptions, label_weight_option, method_option, temperature_option
from kdcli.models.student import LABEL_HEAD, StudentOutput

Side = Literal["student", "teacher", "none"]
PAPER = "P4, Multi-Level Feature Distillation"


CONVENTIONS: dict[object, dict[str, Any]] = {
    "paper": {"label_weight": 1.0, "distill_weight": 0.6, "level_weight": (0.2,), "levels": "all"},
    "code": {"label_weight": 0.2, "distill_weight": 0.6, "level_weight": (0.2,), "levels": "maps"},
}
"""Weights and levels of the two readings of Eq. 3."""


@final
@dataclass(frozen=True, slots=True)
class Matching:
    """How the student's loss is put together.

    Attributes:
        levels: what is matched, the embedding first; empty: logits alone.
        adaptor: on which side shapes are made equal.
        resize: how maps of unequal height and width are; None: they are refused.
        columns: of the teacher's logits, in the order of the student's classes; None: they are in that order.
    """

    levels: tuple[Level, ...] = ()
    adaptor: Side = "student"
    resize: Resize | None = None
    columns: tuple[int, ...] | None = None


class MlfdOptions(LevelOptions, StandardiseOptions):
    """What the multi-level student can be told. What is not given follows the convention."""

    adaptor: Side = method_option(
        "student",
        "Side on which a trained layer makes unequal channels equal: student, teacher or none.",
    )
    map_resize: Resize | None = method_option(
        None, "pool or bilinear: make maps of unequal height and width equal; default: they are refused."
    )

    loss_convention: Literal["paper", "code"] = method_option(
        "paper",
        "Weights as P4 prints them (CE 1, KD 0.6, MSE 0.2), or as its code computes (CE 0.2).",
    )
    temperature: float = temperature_option(2.0)
    label_weight: float = label_weight_option(CONVENTIONS["paper"]["label_weight"])
    distill_weight: float = method_option(
        CONVENTIONS["paper"]["distill_weight"],
        "Weight alpha of the softened cross-entropy.",
        ge=0,
        le=1e4,
        silent=0,
    )

    @property
    def reads_logits(self) -> bool:
        """Whether any term is of the teacher's logits."""
        return self.distill_weight > 0

    def taught(self) -> Mapping[str, bool]:
        """Without levels to match their weight says nothing."""
        found = super().taught()
        if self.levels != "none":
            return found
        return {
            **{flag: weighs for flag, weighs in found.items() if "--level" not in flag},
            "--levels none": False,
        }

    @model_validator(mode="before")
    @classmethod
    def _by_convention(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {**CONVENTIONS.get(given.get("loss_convention"), {}), **given}


def make_adaptor(level: Level, side: Side, resize: Resize | None) -> Adaptor:
    """What makes a level comparable.

    Args:
        level: with both shapes.
        side: which side is changed.
        resize: how maps of unequal sides are made equal.

    Raises:
        UsageError: the shapes differ in a way that was not allowed to be evened out.
    """
    student, teacher = level.student_shape, level.teacher_shape
    both = f"the student's {_named(level.tap, student)} and the teacher's {_named(level.array, teacher)}"
    if student[1:] != teacher[1:] and resize is None:
        raise UsageError(
            f"{both} differ in {'frames, ' if len(student) == 4 else ''}height and width",
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
        """The classifier, where labels and teacher meet; none where neither has a weight."""
        return (LABEL_HEAD,) if self._options.label_weight or self._options.reads_logits else ()

    def reads(self) -> dict[str, tuple[str, ...]]:
        """The teacher's logits and what is matched."""
        return {self._teacher: read_of(self._options, self._matching)}

    def taps(self) -> tuple[str, ...]:
        """The student's side of the maps."""
        return taps_of(self._matching.levels)

    def notes(self) -> tuple[str, ...]:
        """One line a level: its shapes, and its adaptor."""
        return tuple(
            f"{level}: weight {level.weight:g}, {self._adapted(level, adaptor)}"
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
        """P4 Eq. 3; parts ``label``, ``distill`` (softened cross-entropy times T^2), ``kl`` and ``mse/LEVEL``.

        Labels and logits of weight 0 are not looked at: they need not be there.
        """
        theirs, images, options = teacher[self._teacher], batch.count("images"), self._options
        weights = {"label": options.label_weight, "distill": options.distill_weight}
        parts: dict[str, Tensor] = {}
        kl: dict[str, Tensor] = {}
        if options.label_weight:
            parts["label"] = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
        if options.reads_logits:
            logits = student.logits[LABEL_HEAD], self._ordered(theirs["logits"])
            ours, said = (compared(options, each) for each in logits)
            pair = ours, said, options.temperature
            parts["distill"] = options.temperature**2 * soft_cross_entropy(*pair, count=images)
            kl["kl"] = teacher_divergence(*pair, count=images)
        for level, adaptor in zip(self._matching.levels, self.adaptors, strict=True):
            own = student.features if level.tap is None else student.maps[level.tap]
            target = theirs[level.array].detach().float()
            if self._matching.adaptor == "teacher":
                target = adaptor(target)
            else:
                own = adaptor(own.float())
            parts[f"mse/{level.place}"] = mean_squared_error(own, target, images)
            weights[f"mse/{level.place}"] = level.weight
        loss = weighted_sum(parts, weights, list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, **kl}

    def _ordered(self, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        columns = self.get_buffer("_columns")
        return logits[:, columns] if len(columns) else logits


def read_of(options: MlfdOptions, matching: Matching) -> tuple[str, ...]:
    """Arrays that are read of the teacher."""
    return (*(("logits",) if options.reads_logits else ()), *(level.array for level in matching.levels))


@final
class Mlfd(Method):
    """P4's student; :attr:`Setup.own` is a :class:`~kdcli.methods.levels.Matching`."""

    def needs_of(self, options: MlfdOptions) -> Needs:
        """No labels, and no logits, where they have no weight; what is matched besides."""
        logits = options.reads_logits
        kinds = KINDS[options.matched] | (self.needs.kinds if logits else frozenset())
        return replace(self.needs, kinds=kinds, labels=options.label_weight > 0, same=logits)

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
        options: MlfdOptions = setup.options
        warn_of_scale(options, options.label_weight)
        (teacher,) = setup.weights
        levels = choose_levels(setup, self.name, teacher, options.matched, options.level_weight)
        if options.adaptor == "teacher" and levels:
            console.warn(
                "--adaptor teacher trains a layer on the teacher's side: the squared error also falls when that "
                "layer shrinks what the student is to match"
            )
        columns, needs = None, self.needs_of(options)
        if needs.same and setup.data is not None:
            columns = choose_columns(setup.teachers[teacher], setup.data, self.name, needs.labels)
        return replace(setup, own=Matching(levels, options.adaptor, options.map_resize, columns))

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """Logits that have a weight, and what is matched."""
        return dict.fromkeys(setup.weights, read_of(setup.options, setup.own))

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the levels."""
        return {
            **Method.identity(self, setup),
            "levels": {level.array: level.document() for level in setup.own.levels},
        }

    def describe(self, setup: Setup) -> list[str]:
        """P4's Eq. 3 with its numbers."""
        options: MlfdOptions = setup.options
        soft = f"{options.temperature**2:g} soft cross-entropy at T = {options.temperature:g}"
        terms = [
            *([f"{options.label_weight:g} CE"] if options.label_weight else []),
            *([f"{options.distill_weight:g} x {soft}"] if options.reads_logits else []),
            *(f"{level.weight:g} MSE of {level.array}" for level in setup.own.levels),
        ]
        return [
            f"loss ({options.loss_convention}): {' + '.join(terms)}; teacher '{next(iter(setup.weights))}', "
            f"{setup.teacher_view} view",
            *standardised(options),
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`MultiLevelDistillation`."""
        (teacher,) = setup.weights
        matching: Matching = replace(setup.own, levels=fit_levels(setup.own.levels, setup.opened()))
        maps = [level for level in matching.levels if level.is_map]
        sides = (
            level.student_shape if matching.adaptor == "teacher" else level.teacher_shape for level in maps
        )
        require_correspondence(setup, teacher, [side[1:] for side in sides])
        return MultiLevelDistillation(teacher, matching, setup.options, setup.settings.label_smoothing)


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
    spares={"labels": "--label-weight 0", "logits": "--distill-weight 0"},
)
