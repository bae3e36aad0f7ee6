"""P1: "Representation Consolidation from Multiple Expert Teachers".

    L = lambda_0 L_distill(head 0, generalist) + sum_i lambda_i L_distill(head i, expert i)         (Eq. 1)

* ``L_distill``: soft cross-entropy, T = 2 on both sides, no factor T^2 (P1 section 2). Labels are never used, unless
  ``--label-weight`` adds their cross-entropy (P1 Exp. 5, Table 5: "Places proxy + label"; its weight is not printed).
  They have a head of their own, as Places' classes are not the generalist's; it is not exported.
* lambda_0 = 1 and lambda_i = 1/N. The pair lambda_0 : sum of lambda_i always sums to 2 (P1 Exp. 4:
  1/2 with 3/(2N), 3/2 with 1/(2N)), so ``--generalist-weight`` W gives every expert (2 - W)/N.
  W = 0 is the paper's baseline without a generalist; no expert at all (N = 0) is its soft-label baseline.
* Head 0 is the network's own classifier. Backbone and head 0 start from the generalist's weights where the
  architectures agree, the other heads from random ones. Where they differ, the student starts as ``--init``
  says; its classifier is kept if it happens to have the generalist's number of classes, else it is new.
* BatchNorm statistics are frozen; whether its scale and shift train is not printed: here they do. A student
  that starts from random weights has no statistics worth keeping: there they are trained (ours).
* SGD, momentum 0.9, weight decay 1e-4, batch 32, 40 epochs, learning rate 0.01 for every head and 0.001
  for the backbone, x0.1 at 50 % and 80 % (P1 appendix A).
* ``L_distill`` may be "the KD loss plus a contrastive embedding loss" (P1 section 2): KD + beta CRD, every teacher
  with embeddings of its own (:mod:`kdcli.methods.crd`). beta is not printed; 0.8 is that of CRD's authors.
* The baselines keep everything but the generalist's term (P1 section 2: "setting lambda_0 = 0 while keeping all
  other conditions"): the student starts from it all the same, and lambda_i stays 1/N. That is half of what
  ``consolidation --generalist-weight 0`` gives the experts, where the weights sum to 2.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Int64
from pydantic import model_validator
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.methods.base import Choice, Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.crd import ContrastiveDistillation, CrdOptions, contrasts, describe_crd, fit_negatives
from kdcli.methods.losses import label_loss, soft_cross_entropy, teacher_divergence, weighted_sum
from kdcli.methods.options import (
    GeneralistOptions,
    MethodOptions,
    generalist_weight_option,
    method_option,
    temperature_option,
)
from kdcli.models.student import LABEL_HEAD, StudentOutput

PAPER = "P1, Representation Consolidation"
PROXY_HEAD = "proxy"
"""The head of the labels of the proxy data, where they are learnt from."""


@final
class Consolidation(Objective):
    """Generalist and experts, one head each, on unlabelled images (P1 Eq. 1).

    Args:
        generalist: the teacher of head 0, which is the network's own classifier.
        classes: class count of each teacher.
        weights: lambda of each teacher, >= 0; teachers of weight 0 are left out altogether.
        temperature: T > 0.
        contrast: CRD of each teacher of positive weight; none: KD alone.
        crd_weight: beta >= 0, beside a KD term of weight 1.
    """

    def __init__(
        self,
        generalist: str,
        classes: Mapping[str, int],
        weights: Mapping[str, float],
        temperature: float = 2.0,
        contrast: Mapping[str, ContrastiveDistillation] | None = None,
        crd_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        self._heads = {name: LABEL_HEAD if name == generalist else name for name in self._weights}
        self._classes = {name: classes[name] for name in self._weights if name != generalist}
        self._temperature, self._crd_weight = temperature, crd_weight
        # A list, not a dict: names of teachers may hold dots, which module names may not.
        contrast = contrast or {}
        self._contrast = nn.ModuleList(contrast[name] for name in self._weights if name in contrast)

    def heads(self) -> dict[str, int]:
        """One per expert; head 0 is the network's own."""
        return dict(self._classes)

    def active(self) -> tuple[str, ...]:
        """The heads of positive weight."""
        return tuple(self._heads.values())

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits of the teachers, and their features where those are contrasted."""
        return dict.fromkeys(self._weights, ("logits", "features") if self._contrast else ("logits",))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P1 Eq. 1; the parts ``distill/TEACHER`` (KD), ``kl/TEACHER`` and, with CRD, ``crd/TEACHER``."""
        images = batch.count("images")
        terms: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        for name, head in self._heads.items():
            pair = student.logits[head], teacher[name]["logits"], self._temperature
            terms[name] = soft_cross_entropy(*pair, count=images)
            parts[f"kl/{name}"] = teacher_divergence(*pair, count=images)
        loss = weighted_sum(terms, self._weights, list(terms))
        parts = {f"distill/{name}": term.detach() for name, term in terms.items()} | parts
        if self._contrast:
            contrasts = {
                name: crd(student.features, teacher[name]["features"], batch.index, images)
                for name, crd in zip(self._weights, self._contrast, strict=True)
            }
            loss = loss + self._crd_weight * weighted_sum(contrasts, self._weights, list(contrasts))
            parts |= {f"crd/{name}": term.detach() for name, term in contrasts.items()}
        return {"loss": loss, **parts}


@final
class BesideLabels(Objective):
    """Another objective, and the labels of the data in a head of their own (P1 Exp. 5, "Places proxy + label").

    Args:
        other: knows no head of that name.
        classes: of the labels.
        weight: of their term, > 0, beside the other's loss as it is.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(self, other: Objective, classes: int, weight: float, smoothing: float = 0.0) -> None:
        super().__init__()
        self.other = other
        self._classes, self._weight, self._smoothing = classes, weight, smoothing

    def heads(self) -> dict[str, int]:
        """The other's, and one for the labels."""
        return {**self.other.heads(), PROXY_HEAD: self._classes}

    def active(self) -> tuple[str, ...]:
        """All of these."""
        return (*self.other.active(), PROXY_HEAD)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """What the other reads."""
        return self.other.reads()

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The other's parts, and ``label``: the mean over the labelled images."""
        parts: dict[str, Tensor] = self.other(student, teacher, batch)
        label = label_loss(student.logits[PROXY_HEAD], batch, self._smoothing)
        return {**parts, "loss": parts["loss"] + self._weight * label, "label": label.detach()}


# --- weights ----------------------------------------------------------------------------------


def pair_weights(choice: Choice) -> dict[str, float]:
    """lambda_0 for the generalist and (2 - lambda_0) / N for each of the N experts (P1 section 2, Exp. 4)."""
    options: PairOptions = choice.options
    if options.generalist is None:  # Needs.generalist is checked before any weight is asked for
        raise ValueError("consolidation weighs by a generalist")
    experts = [name for name in choice.teachers if name != options.generalist]
    shares = dict.fromkeys(experts, (2 - options.generalist_weight) / max(1, len(experts)))
    return {options.generalist: options.generalist_weight, **shares}


def expert_weights(choice: Choice) -> dict[str, float]:
    """1/N for each of the N experts, nothing for the generalist (P1 section 2: lambda_0 = 0, all else kept)."""
    experts = [name for name in choice.teachers if name != choice.options.generalist]
    return dict.fromkeys(experts, 1 / max(1, len(experts)))


def soft_label_weights(choice: Choice) -> dict[str, float]:
    """The generalist alone (P1 section 3, baseline 2)."""
    generalist: str | None = choice.options.generalist
    return {} if generalist is None else {generalist: 1.0}


def old_new_weight(text: str) -> float:
    """lambda_0 of a ratio OLD:NEW: ``1:3`` is 1/2, as lambda_0 and the experts' lambdas sum to 2 (P1 Exp. 4).

    Raises:
        ValueError: it is no ratio of two numbers >= 0 that are not both 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text)
    old, new = (float(number) for number in found.groups()) if found else (0.0, 0.0)
    if old + new == 0:
        raise ValueError(f"--old-new {text}: not a ratio OLD:NEW of numbers, such as 1:3")
    return 2 * old / (old + new)


# --- options ----------------------------------------------------------------------------------


class HeadOptions(GeneralistOptions):
    """What all of them can be told."""

    temperature: float = temperature_option(2.0)
    label_weight: float = method_option(
        0.0,
        "Weight of the data's own labels, in a head of their own (P1 Exp. 5); 0: no label is looked at.",
        ge=0,
        le=1e4,
    )


class PairWeightOptions(MethodOptions):
    """Of methods that weigh one teacher, the generalist, against all others."""

    generalist_weight: float = generalist_weight_option()
    old_new: str | None = method_option(
        None,
        "OLD:NEW: the same weight as a ratio of the generalist to all others; 1:3 is 0.5.",
        metavar="OLD:NEW",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_weight(cls, given: dict[str, Any]) -> dict[str, Any]:
        ratio = given.get("old_new")
        if ratio is None:
            return given
        weight = old_new_weight(str(ratio))
        if given.get("generalist_weight") is not None:
            raise ValueError(
                f"--old-new {ratio} and --generalist-weight {given['generalist_weight']} both set lambda_0: give "
                "one of them, OLD:NEW is --generalist-weight 2 OLD / (OLD + NEW)"
            )
        return {**given, "old_new": None, "generalist_weight": weight}


class PairOptions(PairWeightOptions, HeadOptions):
    """Of those that weigh the generalist against the experts."""


class CrdHeadOptions(CrdOptions, HeadOptions):
    """With CRD."""


class CrdPairOptions(CrdOptions, PairOptions):
    """With CRD and both weights."""


# --- methods ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Heads(Method):
    """Teachers in a head each.

    Attributes:
        weights: lambda of each teacher.
    """

    tunes = True
    weights: Callable[[Choice], dict[str, float]]
    ranked: bool = True

    @property
    def contrastive(self) -> bool:
        """Whether features are contrasted, too."""
        return issubclass(self.Options, CrdOptions)

    def weigh(self, choice: Choice) -> dict[str, float]:
        """See :attr:`weights`."""
        return self.weights(choice)

    def label_head(self, options: Any) -> str | None:
        """With ``--label-weight`` one of its own: head 0 is the generalist's."""
        return PROXY_HEAD if options.label_weight > 0 else None

    def check(self, setup: Setup) -> Setup:
        """Refuses a teacher whose head would have that one's name."""
        if self.label_head(setup.options) in setup.weights:
            raise UsageError(
                f"with --label-weight no teacher may be called '{PROXY_HEAD}': the head of the labels has that name",
                "Leave --label-weight out, or cache the teacher under another name.",
            )
        return setup

    def fit(self, options: Any, labels: Int64[np.ndarray, " n"]) -> Any:
        """See :func:`~kdcli.methods.crd.fit_negatives`."""
        return fit_negatives(options, labels, self.name) if self.contrastive else options

    def describe(self, setup: Setup) -> list[str]:
        """P1 Eq. 1 with its numbers."""
        told = f"soft cross-entropy at T = {setup.options.temperature:g}; weights: {setup.shares}"
        weight = setup.options.label_weight
        labels = [f"{weight:g} x the labels of the data, in a head of their own"] if weight > 0 else []
        return [told, *labels, *([describe_crd(setup)] if self.contrastive else [])]

    def build(self, setup: Setup) -> Objective:
        """See :class:`Consolidation`, and :class:`BesideLabels`."""
        options = setup.options
        consolidation = Consolidation(
            options.generalist,
            {name: record.num_classes for name, record in setup.teachers.items()},
            setup.weights,
            options.temperature,
            contrasts(setup) if self.contrastive else None,
            options.crd_weight if self.contrastive else 0.0,
        )
        if options.label_weight == 0:
            return consolidation
        return BesideLabels(consolidation, setup.labels, options.label_weight, setup.settings.label_smoothing)


PRINTED = Settings(
    optimizer="momentum",  # timm's "sgd" is Nesterov's, which P1 does not say
    momentum=0.9,
    lr=0.01,
    backbone_lr_scale=0.1,
    weight_decay=1e-4,
    decay_all=True,
    schedule="step",
    milestones=(0.5, 0.8),
    epochs=40,
    batch_size=32,
    bn="frozen",
)

_KD = Needs(frozenset({"logits"}), generalist=True, several_labels=True)
_CRD = Needs(frozenset({"logits", "features"}), generalist=True, several_labels=True)

CONSOLIDATION = Heads(
    name="consolidation", paper=PAPER, equation="Eq. 1",
    summary="A generalist and experts, one head each; no labels.", Options=PairOptions, needs=_KD, defaults=PRINTED,
    weights=pair_weights,
)  # fmt: skip
CONSOLIDATION_CRD = Heads(
    name="consolidation-crd", paper=PAPER, equation="Eq. 1, KD + CRD",
    summary="Consolidation that contrasts features, too; no labels.", Options=CrdPairOptions, needs=_CRD,
    defaults=PRINTED, weights=pair_weights,
)  # fmt: skip
MULTI_HEAD_KD = Heads(
    name="multi-head-kd", paper=PAPER, equation="Eq. 1, lambda_0 = 0",
    summary="Baseline: the experts alone, from the generalist's weights; no labels.", Options=HeadOptions, needs=_KD,
    defaults=PRINTED, weights=expert_weights,
)  # fmt: skip
MULTI_HEAD_CRD = Heads(
    name="multi-head-crd", paper=PAPER, equation="Eq. 1, KD + CRD, lambda_0 = 0",
    summary="Baseline: multi-head-kd that contrasts features, too; no labels.", Options=CrdHeadOptions, needs=_CRD,
    defaults=PRINTED, weights=expert_weights,
)  # fmt: skip
SOFT_LABEL = Heads(
    name="soft-label", paper=PAPER, equation="Eq. 1, N = 0",
    summary="Baseline: the generalist alone, distilled into itself; no labels.", Options=HeadOptions, needs=_KD,
    defaults=PRINTED, ranked=False, weights=soft_label_weights,
)  # fmt: skip
