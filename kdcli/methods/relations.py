"""Relations: what the images of a step are to each other, for the student as for its teachers.

    L = CE + beta sum_t alpha_t R(student, teacher t)

R is :mod:`~kdcli.methods.sp`'s, :mod:`~kdcli.methods.pkt`'s or :mod:`~kdcli.methods.rkd`'s. Spaces may differ in width:
nothing is learnt beside the student. A relation is between all images of a step, those of all processes and of all
pieces of ``--accumulate``, and is taken in fp32 at least. beta is RepDistiller's, beside a CE of weight 1.

SP and PKT are means over b^2 pairs that fall as 1/b, and their printed betas belong to steps of 64 images. The terms
here are b/64 times the formulas (ours): a beta then weighs an image's row against its label alike in steps of any size.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.methods.base import Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.cached_rows import require_varying
from kdcli.methods.gathering import gather_features, gather_rows
from kdcli.methods.losses import label_loss, weighted_sum
from kdcli.methods.options import MethodOptions, label_weight_option, method_option
from kdcli.models.student import LABEL_HEAD, StudentOutput

PRINTED_IMAGES = 64
"""Images of a step that the printed weights of SP and PKT are for."""
NEEDS = Needs(frozenset({"features"}), labels=True, several_labels=True)
SPARES = {"labels": "--label-weight 0"}

Relation = Callable[[Tensor, Tensor], Tensor]
"""Loss of the student's features of all images against a teacher's."""


def wide(values: Tensor) -> Tensor:
    """Values in fp32 at least, whatever the cache stores or the student runs in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def directions(rows: Float[Tensor, "b d"], epsilon: float) -> Float[Tensor, "b d"]:
    """Rows divided by their length plus epsilon. One of length 0 stays, and its gradient is not endless."""
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 1e-12, lengths + epsilon, 1.0)


@final
@dataclass(frozen=True, slots=True)
class Term:
    """One relation in the loss.

    Attributes:
        name: what logs call it.
        weight: beta > 0.
        relation: the loss of all images of a step.
        falls: whether that falls as 1/b, and beta is for :data:`PRINTED_IMAGES`.
    """

    name: str
    weight: float
    relation: Relation
    falls: bool = False


@final
class Relations(Objective):
    """Labels, and what images are to each other as the teachers see them.

    Args:
        weights: of each teacher, > 0.
        arrays: what is read of each: ``features`` or a map.
        terms: the relations.
        label_weight: of the labels, >= 0; with 0 none is learnt from.
        smoothing: of the labels, in [0, 1).
        tap: the student's layer whose map is compared; None: its features.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        arrays: Mapping[str, str],
        terms: Sequence[Term],
        label_weight: float = 1.0,
        smoothing: float = 0.0,
        tap: str | None = None,
    ) -> None:
        super().__init__()
        self._weights, self._arrays, self._terms = dict(weights), dict(arrays), tuple(terms)
        self._label_weight, self._smoothing, self._tap = label_weight, smoothing, tap

    def active(self) -> tuple[str, ...]:
        """The classifier, where labels are learnt from."""
        return (LABEL_HEAD,) if self._label_weight else ()

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Features of the teachers, or maps."""
        return {name: (self._arrays[name],) for name in self._weights}

    def taps(self) -> tuple[str, ...]:
        """The student's side of the maps."""
        return () if self._tap is None else (self._tap,)

    def relational(self) -> bool:
        """It is nothing else."""
        return True

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The part ``label``, and one a relation: the teachers' weighted sum."""
        own = student.features if self._tap is None else student.maps[self._tap]
        ours = gather_features(wide(own.flatten(1)))
        theirs = gather_rows(*(wide(teacher[name][self._arrays[name]].detach()) for name in self._weights))
        parts: dict[str, Tensor] = {}
        weights = {term.name: term.weight for term in self._terms}
        if self._label_weight:
            parts["label"] = label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)
            weights["label"] = self._label_weight
        for term in self._terms:
            losses = {
                name: term.relation(ours, each.flatten(1))
                for name, each in zip(self._weights, theirs, strict=True)
            }
            scale = len(ours) / PRINTED_IMAGES if term.falls else 1.0
            parts[term.name] = scale * weighted_sum(losses, self._weights, list(losses))
        loss = weighted_sum(parts, weights, list(parts))
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


# --- options and method -----------------------------------------------------------------------


class RelationOptions(MethodOptions):
    """What every one of them can be told."""

    label_weight: float = label_weight_option()


def relation_weight_option(default: float, of: str = "the relation", rows: bool = False) -> Any:
    """beta, with the method's own default; ``rows``: see :attr:`Term.falls`."""
    printed = f", for {PRINTED_IMAGES} images a step; a row weighs the same in any" if rows else ""
    return method_option(default, f"Weight beta of {of} beside the labels{printed}.", ge=0, le=1e7, silent=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class RelationalMethod(Method):
    """Relations between the images of a step, and maybe labels."""

    tunes = True

    least: int = 2

    @abstractmethod
    def terms(self, options: Any) -> tuple[Term, ...]:
        """The relations, whatever their weight."""

    def needs_of(self, options: RelationOptions) -> Needs:
        """Labels, where they have a weight."""
        return replace(self.needs, labels=options.label_weight > 0)

    def check(self, setup: Setup) -> Setup:
        """Refuses a backbone that does not train, and a teacher that says the same of all images."""
        if setup.origin.freeze is not None:
            raise UsageError(
                f"--freeze {setup.origin.freeze}, but {self.name} would have to change the backbone",
                "Leave --freeze out, or use --method labels-only.",
            )
        for name, array in self.read_of(setup).items():
            require_varying(setup, name, array)
        return setup

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """The one that is compared."""
        return {name: (array,) for name, array in self.read_of(setup).items()}

    def read_of(self, setup: Setup) -> dict[str, str]:
        """What is compared of each teacher: the name of an array."""
        return dict.fromkeys(setup.weights, "features")

    def describe(self, setup: Setup) -> list[str]:
        """The loss with its numbers."""
        options = setup.options
        terms = [f"{term.weight:g} {term.name}" for term in self.terms(options) if term.weight]
        terms += [f"{options.label_weight:g} CE"] if options.label_weight else ["no labels"]
        read = ", ".join(sorted(set(self.read_of(setup).values())))
        return [
            f"relations between the {setup.settings.batch_size} images of a step, by {read}: {' + '.join(terms)}; "
            f"teachers: {setup.shares}"
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`Relations`."""
        options = setup.options
        return Relations(
            setup.weights,
            self.read_of(setup),
            [term for term in self.terms(options) if term.weight],
            options.label_weight,
            setup.settings.label_smoothing,
            self.tap(setup),
        )

    def tap(self, setup: Setup) -> str | None:
        """The student's layer that is compared; None: its features."""
        return None
