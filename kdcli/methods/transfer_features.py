"""P3's transfer of features: CD and CRD beside the labels; :mod:`kdcli.methods.transfer` has the paper."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from jaxtyping import Int64
from torch import Tensor, nn

from kdcli.methods.base import Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.cached_rows import require_varying
from kdcli.methods.crd import (
    ContrastiveDistillation,
    CrdOptions,
    Negatives,
    contrasts,
    crd_weight_option,
    describe_crd,
    fit_negatives,
    negatives_option,
)
from kdcli.methods.logits import beside
from kdcli.methods.losses import (
    beside_labels,
    kl_order,
    label_loss,
    similarity_divergence,
    weighted_sum,
)
from kdcli.methods.options import Direction, MethodOptions, kl_direction_option, kl_weight_option
from kdcli.methods.transfer import PAPER, PRINTED
from kdcli.models.student import LABEL_HEAD, StudentOutput


@final
class SimilarityDistillation(Objective):
    """CD: similarities between a batch's images as the teachers see them, beside the labels (P3 Eq. 6).

    Args:
        weights: of each teacher, > 0.
        kl_weight: lambda in [0, 1], the weight of CD; 0.5 weighs it as the labels (App. A.2).
        smoothing: of the labels, in [0, 1).
        direction: of the KL, see :func:`~kdcli.methods.losses.kl_divergence`.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        kl_weight: float = 0.5,
        smoothing: float = 0.0,
        direction: Direction = "forward",
    ) -> None:
        super().__init__()
        self._weights, self._kl_weight, self._smoothing = dict(weights), kl_weight, smoothing
        self._direction = direction

    def active(self) -> tuple[str, ...]:
        """The classifier, unless lambda is 1: then no loss reaches it."""
        return (LABEL_HEAD,) if self._kl_weight < 1 else ()

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Features of the teachers."""
        return dict.fromkeys(self._weights, ("features",))

    def relational(self) -> bool:
        """Similarities are those between all images of a step."""
        return True

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The parts ``label`` and ``distill``; similarities are over all processes."""
        ours, count = student.features, batch.count("images")
        terms = {
            name: similarity_divergence(ours, teacher[name]["features"], self._direction, count)
            for name in self._weights
        }
        parts = {"distill": weighted_sum(terms, self._weights, list(terms))}
        return beside_labels(student, batch, parts, self._kl_weight, self._smoothing)


@final
class ContrastiveTransfer(Objective):
    """CE + beta CRD with every teacher, by the weights of Tian et al. (P3 App. A.2).

    Args:
        weights: of each teacher, > 0.
        contrast: CRD of each.
        crd_weight: beta >= 0, beside a label term of weight 1.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        contrast: Mapping[str, ContrastiveDistillation],
        crd_weight: float = 0.8,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._weights, self._crd_weight, self._smoothing = dict(weights), crd_weight, smoothing
        self._contrast = nn.ModuleList(contrast[name] for name in self._weights)

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Features of the teachers."""
        return dict.fromkeys(self._weights, ("features",))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The parts ``label`` and ``crd/TEACHER``."""
        logits, count = student.logits[LABEL_HEAD], batch.count("images")
        label = label_loss(logits, batch, self._smoothing)
        terms = {
            name: crd(student.features, teacher[name]["features"], batch.index, count)
            for name, crd in zip(self._weights, self._contrast, strict=True)
        }
        loss = label + self._crd_weight * weighted_sum(terms, self._weights, list(terms))
        parts = {"label": label, **{f"crd/{name}": term for name, term in terms.items()}}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


class SimilarityOptions(MethodOptions):
    """What CD can be told."""

    kl_weight: float = kl_weight_option(0.5)
    kl_direction: Direction = kl_direction_option()


class ClassContrastOptions(CrdOptions):
    """What CRD can be told where labels are learnt from, too (P3 App. A.2)."""

    negatives: Negatives = negatives_option("other-classes")
    crd_weight: float = crd_weight_option(silent=0)


@final
class Similarities(Method):
    """CD."""

    tunes = True

    def needs_of(self, options: SimilarityOptions) -> Needs:
        """No labels where lambda is 1."""
        return self.needs if options.kl_weight < 1 else replace(self.needs, labels=False)

    def describe(self, setup: Setup) -> list[str]:
        """P3 Eq. 6 with its numbers."""
        return [
            f"KL({kl_order(setup.options.kl_direction)}) of similarities{beside(setup.options)}; "
            f"teachers: {setup.shares}",
            f"similarities within {setup.settings.batch_size} images",
        ]

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With how many images are compared with each other: those of a step, in however many pieces."""
        return {**Method.identity(self, setup), "contrasted": setup.settings.batch_size}

    def check(self, setup: Setup) -> Setup:
        """Refuses a teacher that says the same of all images."""
        for name in setup.weights:
            require_varying(setup, name, "features")
        return setup

    def build(self, setup: Setup) -> Objective:
        """See :class:`SimilarityDistillation`."""
        options: SimilarityOptions = setup.options
        return SimilarityDistillation(
            setup.weights, options.kl_weight, setup.settings.label_smoothing, options.kl_direction
        )


@final
class Contrast(Method):
    """CRD and labels."""

    tunes = True

    def fit(self, options: CrdOptions, labels: Int64[np.ndarray, " n"]) -> CrdOptions:
        """See :func:`~kdcli.methods.crd.fit_negatives`."""
        return fit_negatives(options, labels, self.name)

    def describe(self, setup: Setup) -> list[str]:
        """With CRD's numbers."""
        return [f"CRD; teachers: {setup.shares}", describe_crd(setup)]

    def build(self, setup: Setup) -> Objective:
        """See :class:`ContrastiveTransfer`."""
        return ContrastiveTransfer(
            setup.weights, contrasts(setup), setup.options.crd_weight, setup.settings.label_smoothing
        )


_NEEDS = Needs(frozenset({"features"}), labels=True, several_labels=True)

CD = Similarities(
    name="cd", paper=PAPER, equation="Eq. 6", summary="Similarities between a batch's images, and labels.",
    Options=SimilarityOptions, needs=_NEEDS, defaults=PRINTED, spares={"labels": "--kl-weight 1"}, least=2,
)  # fmt: skip
CRD = Contrast(
    name="crd", paper=PAPER, equation="Eq. 7", summary="Features contrasted as Tian et al. do, and labels.",
    Options=ClassContrastOptions, needs=_NEEDS, defaults=PRINTED,
)  # fmt: skip
