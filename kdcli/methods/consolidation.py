"""P1: "Representation Consolidation from Multiple Expert Teachers".

    L = lambda_0 L_distill(head 0, generalist) + sum_i lambda_i L_distill(head i, expert i)         (Eq. 1)

* ``L_distill``: soft cross-entropy, T = 2 on both sides, no factor T^2 (P1 section 2). Labels are never used.
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

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from torch import Tensor, nn

from kdcli.methods.base import (
    Batch,
    Choice,
    Method,
    Needs,
    Objective,
    Settings,
    Setup,
    TeacherOutputs,
    soft_cross_entropy,
    weighted_sum,
)
from kdcli.methods.crd import ContrastiveDistillation
from kdcli.models.student import LABEL_HEAD, StudentOutput

PAPER = "P1, Representation Consolidation"


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
        """P1 Eq. 1; the parts ``distill/TEACHER`` (KD) and, with CRD, ``crd/TEACHER``."""
        terms = {
            name: soft_cross_entropy(
                student.logits[head],
                teacher[name]["logits"],
                self._temperature,
                count=batch.count("images"),
            )
            for name, head in self._heads.items()
        }
        loss = weighted_sum(terms, self._weights, list(terms))
        parts = {f"distill/{name}": term.detach() for name, term in terms.items()}
        if self._contrast:
            contrasts = {
                name: crd(student.features, teacher[name]["features"], batch.index, batch.count("images"))
                for name, crd in zip(self._weights, self._contrast, strict=True)
            }
            loss = loss + self._crd_weight * weighted_sum(contrasts, self._weights, list(contrasts))
            parts |= {f"crd/{name}": term.detach() for name, term in contrasts.items()}
        return {"loss": loss, **parts}


def pair_weights(choice: Choice) -> dict[str, float]:
    """lambda_0 for the generalist and (2 - lambda_0) / N for each of the N experts (P1 section 2, Exp. 4)."""
    if choice.generalist is None:  # Needs.generalist is checked before any weight is asked for
        raise ValueError("consolidation weighs by a generalist")
    experts = [name for name in choice.teachers if name != choice.generalist]
    shares = dict.fromkeys(experts, (2 - choice.generalist_weight) / max(1, len(experts)))
    return {choice.generalist: choice.generalist_weight, **shares}


def expert_weights(choice: Choice) -> dict[str, float]:
    """1/N for each of the N experts, nothing for the generalist (P1 section 2: lambda_0 = 0, all else kept)."""
    experts = [name for name in choice.teachers if name != choice.generalist]
    return dict.fromkeys(experts, 1 / max(1, len(experts)))


def soft_label_weights(choice: Choice) -> dict[str, float]:
    """The generalist alone (P1 section 3, baseline 2)."""
    return {} if choice.generalist is None else {choice.generalist: 1.0}


def _build(setup: Setup) -> Objective:
    return Consolidation(setup.generalist or "", setup.classes, setup.weights, setup.settings.temperature)


def _build_contrastive(setup: Setup) -> Objective:
    numbers = setup.settings
    contrast = {
        name: ContrastiveDistillation(
            setup.student_width,
            setup.teacher_widths[name],
            setup.images,
            numbers.crd_dim,
            numbers.crd_negatives,
            numbers.crd_temperature,
            numbers.crd_momentum,
        )
        for name in setup.weights
    }
    return Consolidation(
        setup.generalist or "",
        setup.classes,
        setup.weights,
        numbers.temperature,
        contrast,
        numbers.crd_weight,
    )


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
    temperature=2.0,
    generalist_weight=1.0,
)

_KD = Needs(frozenset({"logits"}), generalist=True)
_CRD = Needs(frozenset({"logits", "features"}), generalist=True)
_OPTIONS = frozenset({"teacher", "ranking", "generalist", "temperature"})
_PAIR = frozenset({"generalist_weight", "old_new"})
_CONTRAST = frozenset({"crd_weight", "crd_negatives", "crd_temperature", "crd_dim", "crd_momentum"})

METHODS = (
    Method(
        "consolidation",
        PAPER,
        "Eq. 1",
        "A generalist and experts, one head each; no labels.",
        _KD,
        PRINTED,
        pair_weights,
        _build,
        _OPTIONS | _PAIR,
    ),
    Method(
        "consolidation-crd",
        PAPER,
        "Eq. 1, KD + CRD",
        "Consolidation that contrasts features, too; no labels.",
        _CRD,
        PRINTED,
        pair_weights,
        _build_contrastive,
        _OPTIONS | _PAIR | _CONTRAST,
    ),
    Method(
        "multi-head-kd",
        PAPER,
        "Eq. 1, lambda_0 = 0",
        "Baseline: the experts alone, from the generalist's weights; no labels.",
        _KD,
        replace(PRINTED, generalist_weight=0.0),
        expert_weights,
        _build,
        _OPTIONS,
    ),
    Method(
        "multi-head-crd",
        PAPER,
        "Eq. 1, KD + CRD, lambda_0 = 0",
        "Baseline: multi-head-kd that contrasts features, too; no labels.",
        _CRD,
        replace(PRINTED, generalist_weight=0.0),
        expert_weights,
        _build_contrastive,
        _OPTIONS | _CONTRAST,
    ),
    Method(
        "soft-label",
        PAPER,
        "Eq. 1, N = 0",
        "Baseline: the generalist alone, distilled into itself; no labels.",
        _KD,
        PRINTED,
        soft_label_weights,
        _build,
        frozenset({"teacher", "generalist", "temperature"}),
    ),
)
