"""Learning from logits of teachers that tell apart the student's classes, and from labels: one loss, many terms.

    L = lambda sum_k w_k term(student, teacher_k) + (1 - lambda) CE

What the term compares is said in :mod:`kdcli.methods.comparison`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from kdcli.console import console
from kdcli.methods.base import Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.comparison import Comparison, Source, label_arrays
from kdcli.methods.labelled import require_cached_label, require_one_label
from kdcli.methods.losses import beside_labels, kl_divergence, kl_name, teacher_divergence, weighted_sum
from kdcli.methods.options import StandardiseOptions
from kdcli.models.student import LABEL_HEAD, StudentOutput

Term = Callable[[Tensor, Tensor, Batch], Tensor]
"""Loss of logits of a student against those of a teacher, both [b, c], mean over the images of the step."""

UNLABELLED = "--method kl, or --method kd --kl-weight 1"
"""What learns from logits and needs no labels, to be told."""
COMBINED = {
    "probs": "their mean probabilities",
    "logits": "the mean of their logits",
    "confidence": "their probabilities, weighted for each image by what each gives the label",
}
"""What each way to combine teachers compares with, to be told."""


@final
@dataclass(frozen=True, slots=True)
class Shares:
    """What the two terms weigh.

    Attributes:
        distill: the teachers', >= 0.
        label: the labels'; 0: none is learnt from.
        rise: share of the training in which the teachers' rises to its weight, in every step; 0: it is there at once.
    """

    distill: float = 1.0
    label: float = 0.0
    rise: float = 0.0


@final
class Rise(nn.Module):
    """A weight that rises to 1, the same over the pieces of a step; where it is, is saved with the run.

    Args:
        steps: in which it rises, >= 1.
        pieces: that each step is computed in.
    """

    def __init__(self, steps: int, pieces: int) -> None:
        super().__init__()
        self._steps, self._pieces, self._done = steps, pieces, 0

    def get_extra_state(self) -> Tensor:
        """How many pieces are done: what the host knows, no device is asked."""
        return torch.tensor(self._done)

    def set_extra_state(self, state: Tensor) -> None:
        """Undo :meth:`get_extra_state`."""
        self._done = int(state)

    def forward(self) -> float:
        """The weight in the present piece: 1 / steps in the first step."""
        step = self._done // self._pieces
        self._done += 1
        return min(1.0, (step + 1) / self._steps)


@final
class Transfer(Objective):
    """Labels and a mean of terms of teachers of the same classes.

    Args:
        comparison: what is compared.
        terms: losses of that, to be summed, each with the temperature at which teachers are combined for it.
        shares: what teachers and labels weigh.
        smoothing: of the labels, in [0, 1).
        rise: of the teachers' weight, if it rises.
        relational: whether the term compares images with each other.
    """

    def __init__(
        self,
        comparison: Comparison,
        terms: Sequence[tuple[float, Term]],
        shares: Shares,
        smoothing: float = 0.0,
        rise: Rise | None = None,
        relational: bool = False,
    ) -> None:
        super().__init__()
        self._comparison, self._terms, self._shares = comparison, tuple(terms), shares
        self._smoothing, self.rise, self._relational = smoothing, rise, relational

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits of the teachers."""
        return self._comparison.reads()

    def relational(self) -> bool:
        """Whether the term is."""
        return self._relational

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The parts ``label``, ``distill`` and ``kl`` (means) and, of several teachers, those of each.

        The KL is that at the method's temperature, of what is compared, whatever the term makes of it.
        """
        terms: dict[str, Tensor] = {}
        kls: dict[str, Tensor] = {}
        for temperature, term in self._terms:
            pairs, more = self._comparison(student.logits[LABEL_HEAD], teacher, temperature)
            for name, (ours, theirs) in pairs.items():
                value = term(ours, theirs, batch)
                terms[name] = terms[name] + value if name in terms else value
                kls[name] = teacher_divergence(ours, theirs, temperature, count=batch.count("images"))
        parts: dict[str, Tensor] = {}
        for part, of_each in (("distill", terms), ("kl", kls)):
            parts[part] = weighted_sum(of_each, self._comparison.weights, list(of_each))
            if len(of_each) > 1:
                parts |= {f"{part}/{name}": value for name, value in of_each.items()}
        parts |= more
        shares, risen = self._shares, 1.0 if self.rise is None else self.rise()
        return beside_labels(student, batch, parts, shares.distill * risen, self._smoothing, shares.label)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitMethod(Method):
    """Logits of teachers of the same classes, and maybe labels; its options are ``LogitOptions``.

    Attributes:
        look: what the term needs the one label of each image for, to be told; None: it does not.
        relational: whether the term compares images with each other.
    """

    look: str | None = None
    relational: bool = False

    def term(self, options: Any) -> Term:
        """The loss of one teacher: by default the KL."""
        return lambda ours, theirs, batch: kl_divergence(
            ours, theirs, options.temperature, options.kl_direction, batch.count("images")
        )

    def terms(self, options: Any) -> tuple[tuple[float, Term], ...]:
        """What is summed: by default the one term, each with the temperature at which teachers are combined for it."""
        return ((options.temperature, self.term(options)),)

    def told(self, options: Any) -> str:
        """What the term is, to be told."""
        return kl_name(options)

    def shares(self, options: Any) -> Shares:
        """What teachers and labels weigh: lambda and 1 - lambda."""
        weight = getattr(options, "kl_weight", 1.0)
        return Shares(weight, 1 - weight)

    def needs_of(self, options: Any) -> Needs:
        """No labels where they weigh nothing and nothing looks at them."""
        looked_at = self.look is not None or options.combine == "confidence" or self.shares(options).label > 0
        return self.needs if looked_at else replace(self.needs, labels=False)

    def sources(self, setup: Setup) -> dict[str, Source]:
        """Of teachers whose logits are not read as they are."""
        return {}

    def check(self, setup: Setup) -> Setup:
        """Refuses images without their one label where the term, or the way to combine teachers, looks at it."""
        options = setup.options
        if options.combine != "terms" and len(setup.weights) == 1:
            console.warn(
                f"--combine {options.combine} is for several teachers, and there is one: {setup.shares}"
            )
            options = options.model_copy(update={"combine": "terms"})
        if self.look is not None:
            require_one_label(setup, f"{self.name} {self.look}", UNLABELLED)
        if options.combine == "confidence":
            does = "--combine confidence weighs teachers by what they give an image's label"
            require_one_label(setup, does, "--combine probs")
            require_cached_label(setup, "--combine probs")
        warn_of_scale(options, self.shares(options).label)
        return replace(setup, options=options)

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """Logits, or what they are made of, and the label's log-probability where teachers are weighed by it."""
        own, more = self.sources(setup), label_arrays(setup.options)
        return {name: (*own.get(name, Source()).arrays, *more) for name in setup.weights}

    def describe(self, setup: Setup) -> list[str]:
        """The loss with its numbers."""
        options = setup.options
        lines = [f"{self.told(options)}{beside(options)}; teachers: {setup.shares}"]
        if options.combine != "terms":
            lines.append(f"compared with {COMBINED[options.combine]}")
        return lines + standardised(options)

    def build(self, setup: Setup) -> Objective:
        """See :class:`Transfer`."""
        options, shares = setup.options, self.shares(setup.options)
        rising = round(shares.rise * setup.steps)
        return Transfer(
            Comparison(setup.weights, options, setup.columns, self.sources(setup)),
            self.terms(options),
            shares,
            setup.settings.label_smoothing,
            Rise(rising, setup.settings.accumulate) if rising > 1 else None,
            self.relational,
        )


def beside(options: Any) -> str:
    """The weight of the distillation term, to be told, where labels have a share."""
    weight = getattr(options, "kl_weight", 1.0)
    return f", weight {weight:g} beside the labels" if weight < 1 else ""


def beside_label_weight(weight: float) -> str:
    """The weight of the labels, to be told, where it is not 1."""
    return "" if weight == 1 else f", {weight:g} x the labels"


def standardised(options: StandardiseOptions) -> list[str]:
    """That logits are standardised, to be told, where they are."""
    return ["logits of both sides are standardised in each image"] if options.standardise_logits else []


def warn_of_scale(options: StandardiseOptions, label_weight: float) -> None:
    """Say what standardised logits leave open where no label is learnt from."""
    if options.standardise_logits and label_weight == 0:
        console.warn(
            "--standardise-logits compares logits whatever their scale, and no label is learnt from, which alone would "
            "set the student's: its classes will be right or wrong as ever, its probabilities mean nothing"
        )
