"""P3: Roth et al., "Fantastic Gains and Where to Find Them" (ICLR 2024): transfer between pretrained models.

    L_KL = T^2 / n sum_i KL(teacher || student)                                             (Eq. 1)
    L    = lambda L_KL + (1 - lambda) L_XE                                                  (Eq. 2)
    slow <- tau slow + (1 - tau) fast, every N steps                                        (Eq. 3, MCL)
    m_t  = [p_t(y) > p_st(y)],  m_st = 1 - m_t                                              (Eq. 4, DP)
    L_DP = T^2 / n sum_i [ m_t KL(teacher || student) + m_st KL(frozen student || student) ]    (Eq. 5)
    L_CD = KL between the softmaxed cosine similarities of a batch                          (Eq. 6)

* All distil into the student's own classifier: teacher and student tell apart the same classes. CD and CRD compare
  features and ask nothing of the teacher's classes (:mod:`kdcli.methods.transfer_features`).
* The order of the printed KL's arguments is ambiguous; KL(teacher || student) is what its references compute.
  ``--kl-direction reverse`` is the other. lambda weighs the KL (P2's weighs the labels): ``--kl-weight``.
* DP compares probabilities at T = 1 whatever T is; a tie keeps the frozen student; n is the whole batch. Without
  labels (``dp-unsup``) the largest probabilities are compared, whatever their classes. Several teachers: each image
  learns from the most confident of frozen student and teachers ("parallel", section 4.3).
* The frozen student is the initial one in eval mode, on the view that the teachers saw.
* MCL: the slow copy is tested and exported. Its BatchNorm buffers are averaged like weights (ours; timm's EMA).
* Several teachers for any other method: the mean of their terms (ours).
* ``kl-ls`` is lambda KL + (1 - lambda) CE on labels smoothed by 0.1: our reading of "label smoothing" (section 5.1).
  ``soft-ce`` is the cross-entropy against soft labels without T^2, as printed nowhere: at T = 1 its gradient is KL's.

Printed (appendix A.1, A.3): SGD, momentum 0.9, weight decay 1e-3, learning rate 1e-4 (MCL: 0.01), T = 1, 20 epochs;
MCL with lambda 0.7, tau 0.9999, N = 2; equal weights in CD (A.2); DP with lambda 1. Not printed, so OURS: batches of
64, a constant learning rate, frozen BatchNorm statistics (the student starts as the function that it was), decay of
all parameters, lambda 0.5 of XE-KL and KL-LS (grid 0.05 to 0.5). CRD's numbers are those of its authors.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from kdcli.methods.base import (
    FROZEN,
    LARGEST,
    Batch,
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
from kdcli.methods.divergences import (
    Direction,
    beside_labels,
    choose_source,
    chosen_logits,
    kl_divergence,
    spread_logits,
    top_classes_divergence,
)
from kdcli.methods.transfer_features import ContrastiveTransfer, SimilarityDistillation
from kdcli.methods.weighted import equal_weights
from kdcli.models.student import LABEL_HEAD, StudentOutput
from kdcli.types import OutputKind

PAPER = "P3, Fantastic Gains"

Term = Callable[[Tensor, Tensor, float | None], Tensor]
"""Loss of student logits against those of a teacher; the last argument is what the sum is divided by."""


@final
class Columns(nn.Module):
    """Brings logits of teachers into the order of the student's classes.

    Args:
        columns: of each teacher whose order differs, its class number of each of the student's classes.
    """

    def __init__(self, columns: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._names = tuple(columns)
        for number, order in enumerate(columns.values()):
            # Not saved: it follows from the plan. By number: names of teachers may hold dots.
            self.register_buffer(f"order{number}", torch.tensor(order), persistent=False)

    def forward(self, name: str, logits: Tensor) -> Tensor:
        """``logits`` of the teacher ``name``, [b, c]."""
        if name not in self._names:
            return logits
        order: Tensor = self.get_buffer(f"order{self._names.index(name)}")
        return logits[:, order]


@final
class Transfer(Objective):
    """Labels and a mean of divergences from teachers of the same classes (P3 Eq. 1, 2).

    Args:
        weights: of each teacher, > 0.
        term: divergence from one of them.
        kl_weight: lambda in [0, 1]; 1 learns from no label.
        columns: see :class:`Columns`.
        smoothing: of the labels, in [0, 1).
        largest: teachers of whom only the largest logits are read, where that is all that ``term`` looks at.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        term: Term,
        kl_weight: float = 1.0,
        columns: Mapping[str, Sequence[int]] | None = None,
        smoothing: float = 0.0,
        largest: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._weights, self._term = dict(weights), term
        self._kl_weight, self._smoothing = kl_weight, smoothing
        self._columns, self._largest = Columns(columns or {}), frozenset(largest)

    def heads(self) -> dict[str, int]:
        """None: the classifier learns."""
        return {}

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits of the teachers."""
        return {name: LARGEST if name in self._largest else ("logits",) for name in self._weights}

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P3 Eq. 2; the parts ``label``, ``distill`` (the mean) and, of several, ``distill/TEACHER``."""
        logits, count = student.logits[LABEL_HEAD], batch.count("images")
        terms = {}
        for name in self._weights:
            said = teacher[name]
            if name in self._largest:
                theirs = spread_logits(said["topk_ids"], said["topk_values"], logits.shape[1])
            else:
                theirs = said["logits"]
            terms[name] = self._term(logits, self._columns(name, theirs), count)
        parts = {"distill": weighted_sum(terms, self._weights, list(terms))}
        if len(terms) > 1:
            parts |= {f"distill/{name}": term for name, term in terms.items()}
        return beside_labels(student, batch, parts, self._kl_weight, self._smoothing)


@final
class DataPartitioning(Objective):
    """Each image from whoever is surer of it: a teacher or the student as it was (P3 Eq. 4, 5).

    Args:
        teachers: their names; of equally sure ones the first is taken.
        frozen: under which name the frozen student's outputs come.
        cached: whether they are read from the cache; else the training loop computes them.
        supervised: whether probabilities of the label are compared, or the largest ones.
        temperature: T > 0 of the loss; never of the comparison.
        direction: see :func:`~kdcli.methods.divergences.kl_divergence`.
        kl_weight: lambda in [0, 1].
        columns: see :class:`Columns`.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(
        self,
        teachers: Sequence[str],
        frozen: str = FROZEN,
        cached: bool = False,
        supervised: bool = True,
        temperature: float = 1.0,
        direction: Direction = "forward",
        kl_weight: float = 1.0,
        columns: Mapping[str, Sequence[int]] | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._teachers, self._sources = tuple(teachers), (frozen, *teachers)
        self._read = self._sources if cached else self._teachers
        self._confidence = "logp_label" if supervised else "logp_max"
        self._temperature, self._direction = temperature, direction
        self._kl_weight, self._smoothing = kl_weight, smoothing
        self._columns = Columns(columns or {})

    def heads(self) -> dict[str, int]:
        """None: the classifier learns."""
        return {}

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits, and the exact log-probabilities that are compared: half precision makes ties."""
        return dict.fromkeys(self._read, ("logits", self._confidence))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P3 Eq. 5; the parts ``distill``, ``label`` if lambda < 1, and ``share/TEACHER`` of the images."""
        count = batch.count("images") or len(batch.labels)
        choice = choose_source([teacher[name][self._confidence] for name in self._sources])
        targets = chosen_logits(
            [self._columns(name, teacher[name]["logits"]) for name in self._sources], choice
        )
        logits = student.logits[LABEL_HEAD]
        parts = {"distill": _divergence(self._direction, self._temperature)(logits, targets, count)}
        for number, name in enumerate(self._teachers, start=1):
            parts[f"share/{name}"] = (choice == number).sum() / count
        return beside_labels(student, batch, parts, self._kl_weight, self._smoothing)


# --- the registry -----------------------------------------------------------------------------


def _divergence(direction: Direction, temperature: float) -> Term:
    return lambda ours, theirs, count: kl_divergence(ours, theirs, temperature, direction, count)


def _transfer(term: Callable[[Settings], Term], labels: bool) -> Callable[[Setup], Objective]:
    def build(setup: Setup) -> Objective:
        numbers = setup.settings
        weight = numbers.kl_weight if labels else 1.0
        return Transfer(
            setup.weights, term(numbers), weight, setup.columns, numbers.label_smoothing, setup.largest
        )

    return build


def _kl(numbers: Settings) -> Term:
    return _divergence(numbers.kl_direction, numbers.temperature)


def _soft_ce(numbers: Settings) -> Term:
    return lambda ours, theirs, count: soft_cross_entropy(ours, theirs, numbers.temperature, count=count)


def _top_classes(numbers: Settings) -> Term:
    return lambda ours, theirs, count: top_classes_divergence(
        ours, theirs, numbers.top_classes, numbers.temperature, numbers.kl_direction, count
    )


def _partition(supervised: bool) -> Callable[[Setup], Objective]:
    def build(setup: Setup) -> Objective:
        numbers = setup.settings
        return DataPartitioning(
            tuple(setup.weights),
            setup.frozen or FROZEN,
            setup.frozen is not None,
            supervised,
            numbers.temperature,
            numbers.kl_direction,
            numbers.kl_weight if supervised else 1.0,
            setup.columns,
            numbers.label_smoothing,
        )

    return build


def _similarity(setup: Setup) -> Objective:
    numbers = setup.settings
    return SimilarityDistillation(setup.weights, numbers.kl_weight, numbers.label_smoothing)


def _contrastive(setup: Setup) -> Objective:
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
    return ContrastiveTransfer(setup.weights, contrast, numbers.crd_weight, numbers.label_smoothing)


PRINTED = Settings(
    optimizer="momentum",  # timm's "sgd" is Nesterov's, which P3 does not say
    lr=1e-4,
    momentum=0.9,
    weight_decay=1e-3,
    decay_all=True,
    schedule="constant",
    epochs=20,
    batch_size=64,
    bn="frozen",
    temperature=1.0,
)

_LOGITS: frozenset[OutputKind] = frozenset({"logits"})
_FEATURES: frozenset[OutputKind] = frozenset({"features"})
_LABEL: frozenset[OutputKind] = frozenset({"logits", "logp_label"})
_LARGEST: frozenset[OutputKind] = frozenset({"logits", "logp_max"})
_KD = frozenset({"teacher", "temperature"})
_KL = _KD | {"kl_direction"}
_DP = _KL | {"frozen", "frozen_teacher"}
_MCL = frozenset({"mcl_tau", "mcl_share", "mcl_every"})
_CRD = frozenset({"teacher", "crd_weight", "crd_negatives", "crd_temperature", "crd_dim", "crd_momentum"})
_SAME = Needs(_LOGITS, classes=True)
_LABELS = replace(_SAME, labels=True)
_HALF = replace(PRINTED, kl_weight=0.5)


def _method(
    name: str,
    equation: str,
    description: str,
    needs: Needs,
    defaults: Settings,
    build: Callable[[Setup], Objective],
    options: frozenset[str],
) -> Method:
    return Method(name, PAPER, equation, description, needs, defaults, equal_weights, build, options)


METHODS = (
    _method("kl", "Eq. 1", "KL from teachers of the same classes; no labels.",
            _SAME, PRINTED, _transfer(_kl, labels=False), _KL),
    _method("xe-kl", "Eq. 2", "KL and labels.",
            _LABELS, _HALF, _transfer(_kl, labels=True), _KL | {"kl_weight"}),
    _method("kl-ls", "Eq. 2, smoothed labels", "KL and smoothed labels.",
            _LABELS, replace(_HALF, label_smoothing=0.1), _transfer(_kl, labels=True), _KL | {"kl_weight"}),
    _method("mcl", "Eq. 2, 3", "KL and labels; a slowly following copy of the student is kept.",
            _LABELS, replace(PRINTED, lr=0.01, kl_weight=0.7, mcl_tau=0.9999, mcl_every=2),
            _transfer(_kl, labels=True), _KL | _MCL | {"kl_weight"}),
    _method("dp", "Eq. 4, 5", "KL from whoever gives the label more: teachers, or the frozen student.",
            Needs(_LABEL, labels=True, classes=True, frozen=True),
            PRINTED, _partition(supervised=True), _DP | {"kl_weight"}),
    _method("dp-unsup", "Eq. 4, 5, largest probability", "KL from whoever is surer; no labels.",
            Needs(_LARGEST, classes=True, frozen=True),
            PRINTED, _partition(supervised=False), _DP),
    _method("cd", "Eq. 6", "Similarities between a batch's images, and labels.",
            Needs(_FEATURES, labels=True), _HALF, _similarity, frozenset({"teacher", "kl_weight"})),
    _method("crd", "Eq. 7", "Features contrasted as Tian et al. do, and labels.",
            Needs(_FEATURES, labels=True), PRINTED, _contrastive, _CRD),
    _method("soft-ce", "Eq. 1, cross-entropy", "Soft cross-entropy instead of KL; no labels.",
            _SAME, PRINTED, _transfer(_soft_ce, labels=False), _KD),
    _method("topk-kl", "Eq. 1, top classes", "KL over the teacher's most probable classes; no labels.",
            replace(_SAME, largest=True), PRINTED, _transfer(_top_classes, labels=False), _KL | {"top_classes"}),
)  # fmt: skip
