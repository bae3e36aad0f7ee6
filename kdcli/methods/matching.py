"""What methods share that compare levels of one teacher or several with the student's, with labels or without."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from kdcli.methods.adaptors import at_one_grid
from kdcli.methods.base import Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.levels import (
    KINDS,
    Default,
    Level,
    Levels,
    LevelWeights,
    TapOptions,
    choose_levels,
    fit_levels,
    level_weight_option,
    require_correspondence,
    taps_of,
)
from kdcli.methods.losses import label_loss, weighted_sum
from kdcli.methods.options import label_weight_option
from kdcli.models.student import LABEL_HEAD, StudentOutput

LevelsOf = Mapping[str, tuple[Level, ...]]
"""What is matched of each teacher."""


class MatchOptions(TapOptions):
    """Of methods that compare levels; theirs are the defaults."""

    level_weight: LevelWeights = level_weight_option(1.0)
    label_weight: float = label_weight_option()


class LevelObjective(Objective):
    """A term for each level of each teacher, weighted, and maybe the labels.

    Args:
        levels: of each teacher, with the shapes of both sides.
        weights: of each teacher, > 0; they multiply the levels' own.
        label_weight: of the labels, >= 0; 0 looks at none.
        smoothing: of the labels, in [0, 1).
    """

    part: ClassVar[str]
    """What logs call a term, before its teacher and place."""

    def __init__(
        self,
        levels: LevelsOf,
        weights: Mapping[str, float],
        label_weight: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._weights, self._label_weight, self._smoothing = dict(weights), label_weight, smoothing
        self.terms = tuple((teacher, level) for teacher, own in levels.items() for level in own)

    def active(self) -> tuple[str, ...]:
        """The classifier, where labels have a weight."""
        return (LABEL_HEAD,) if self._label_weight else ()

    def reads(self) -> dict[str, tuple[str, ...]]:
        """What is matched."""
        return {
            name: tuple(level.array for teacher, level in self.terms if teacher == name)
            for name in self._weights
        }

    def taps(self) -> tuple[str, ...]:
        """The student's side of the maps."""
        return taps_of(level for _, level in self.terms)

    def notes(self) -> tuple[str, ...]:
        """A line a level: its shapes, and where they meet."""
        return tuple(
            f"'{teacher}' {level}: weight {level.weight * self._weights[teacher]:.4g}{_met(level)}"
            for teacher, level in self.terms
        )

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum; a part a level, called PART/TEACHER/PLACE (PART/PLACE of one teacher), and ``label``."""
        images, parts, weights = batch.count("images"), {}, {}
        if self._label_weight:
            parts["label"] = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
            weights["label"] = self._label_weight
        for number, (name, level) in enumerate(self.terms):
            part = "/".join([self.part, *([name] if len(self._weights) > 1 else []), level.place])
            parts[part] = self.term(number, *self.pair(level, student, teacher[name]), images)
            weights[part] = level.weight * self._weights[name]
        loss = weighted_sum(parts, weights, list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def pair(
        self, level: Level, student: StudentOutput, outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The student's side of a level, in fp32, and the teacher's, maps on one grid."""
        own = student.features if level.tap is None else student.maps[level.tap]
        return at_one_grid(own, outputs[level.array].detach())

    @abstractmethod
    def term(self, number: int, own: Tensor, target: Tensor, count: float | None) -> Tensor:
        """How far a level is from the student's.

        Args:
            number: of the level, in :attr:`terms`.
            own: the student's, [b, D] or [b, C, h, w], in fp32.
            target: the teacher's, [b, D'] or [b, C', h, w].
            count: what a sum over the images is divided by; None: their number.
        """


def _met(level: Level) -> str:
    if level.grid is None or level.student_shape[1:] == level.teacher_shape[1:]:
        return ""
    return f", averaged to {level.grid[0]} x {level.grid[1]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelMethod(Method):
    """Compares levels; :attr:`Setup.own` is a :data:`LevelsOf`.

    Attributes:
        tap: which of the student's taps a map is compared with unless one is named.
    """

    tap: Default = "last"

    def levels(self, options: MatchOptions) -> Levels:
        """What is matched: maps, unless an option says otherwise."""
        return "maps"

    def needs_of(self, options: MatchOptions) -> Needs:
        """What is matched, and labels where they have a weight."""
        return replace(self.needs, kinds=KINDS[self.levels(options)], labels=options.label_weight > 0)

    def check(self, setup: Setup) -> Setup:
        """Decides which levels are matched."""
        options: MatchOptions = setup.options
        own = {
            name: choose_levels(setup, self.name, name, self.levels(options), options.level_weight)
            for name in setup.weights
        }
        return replace(setup, own=own)

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """What is matched."""
        return {name: tuple(level.array for level in setup.own[name]) for name in setup.weights}

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the levels of each teacher."""
        levels = {
            name: {level.array: level.document() for level in own} for name, own in sorted(setup.own.items())
        }
        return {**Method.identity(self, setup), "levels": levels}

    def describe(self, setup: Setup) -> list[str]:
        """The weight of the labels, and the teachers'."""
        weight = setup.options.label_weight
        return [f"{f'{weight:g} CE' if weight else 'no labels'}; teachers: {setup.shares}"]

    def fitted(self, setup: Setup) -> LevelsOf:
        """The levels with the student's taps and shapes.

        Raises:
            UsageError: a tap that it does not have, or maps whose cells are not of the same places.
        """
        found = {name: fit_levels(setup.own[name], setup.opened(), self.tap) for name in setup.weights}
        for name, levels in found.items():
            require_correspondence(setup, name, [level.grid for level in levels if level.grid is not None])
        return found
