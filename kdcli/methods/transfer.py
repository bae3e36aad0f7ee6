"""P3: Roth et al., "Fantastic Gains and Where to Find Them" (ICLR 2024): transfer between pretrained models.

    L_KL = T^2 / n sum_i KL(teacher || student)                                             (Eq. 1)
    L    = lambda L_KL + (1 - lambda) L_XE                                                  (Eq. 2)
    slow <- tau slow + (1 - tau) fast, every N steps                                        (Eq. 3, MCL)
    m_t  = [p_t(y) > p_st(y)],  m_st = 1 - m_t                                              (Eq. 4, DP)
    L_DP = T^2 / n sum_i [ m_t KL(teacher || student) + m_st KL(frozen student || student) ]    (Eq. 5)
    L_CD = KL between the softmaxed cosine similarities of a batch                          (Eq. 6)

* All distil into the student's own classifier: teacher and student tell apart the same classes. CD and CRD compare
  features and ask nothing of the teacher's classes (:mod:`kdcli.methods.transfer_features`); DP is in
  :mod:`kdcli.methods.partitioning`.
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
from dataclasses import dataclass, replace
from typing import Any, final

from pydantic import model_validator
from torch import Tensor

from kdcli.console import console
from kdcli.errors import CacheMissingError, UsageError
from kdcli.methods.base import Average, Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.losses import (
    Columns,
    beside_labels,
    kl_divergence,
    kl_name,
    soft_cross_entropy,
    spread_logits,
    top_classes_divergence,
    weighted_sum,
)
from kdcli.methods.options import (
    KlOptions,
    MethodOptions,
    kl_weight_option,
    method_option,
    temperature_option,
)
from kdcli.models.student import LABEL_HEAD, StudentOutput

PAPER = "P3, Fantastic Gains"
LARGEST = ("topk_ids", "topk_values")
"""Arrays of a teacher's K largest logits: their classes, and the logits, the largest first."""

Term = Callable[[Tensor, Tensor, float | None], Tensor]
"""Loss of student logits against those of a teacher; the last argument is what the sum is divided by."""


@final
class Transfer(Objective):
    """Labels and a mean of divergences from teachers of the same classes (P3 Eq. 1, 2).

    Args:
        weights: of each teacher, > 0.
        term: divergence from one of them.
        kl_weight: lambda in [0, 1]; 1 learns from no label.
        columns: see :class:`~kdcli.methods.losses.Columns`.
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
            arrays = teacher[name]
            if name in self._largest:
                theirs = spread_logits(arrays["topk_ids"], arrays["topk_values"], logits.shape[1])
            else:
                theirs = arrays["logits"]
            terms[name] = self._term(logits, self._columns(name, theirs), count)
        parts = {"distill": weighted_sum(terms, self._weights, list(terms))}
        if len(terms) > 1:
            parts |= {f"distill/{name}": term for name, term in terms.items()}
        return beside_labels(student, batch, parts, self._kl_weight, self._smoothing)


# --- options ----------------------------------------------------------------------------------


class HalfKlOptions(KlOptions):
    """KL and labels, equally (ours)."""

    kl_weight: float = kl_weight_option(0.5)


class MclOptions(KlOptions):
    """KL and labels, and a slow copy of the student."""

    kl_weight: float = kl_weight_option(0.7)
    mcl_tau: float | None = method_option(
        0.9999, "Share of itself that MCL's slow copy keeps in an update.", ge=0, lt=1
    )
    mcl_share: float | None = method_option(
        None, "Instead of --mcl-tau: share of the way that the slow copy goes in the whole run.", gt=0, lt=1
    )
    mcl_every: int = method_option(
        2, "Steps between updates of MCL's slow copy.", ge=1, metavar="N", le=10**5
    )

    @model_validator(mode="before")
    @classmethod
    def _one_pace(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("mcl_share") is None:
            return given
        if given.get("mcl_tau") is not None:
            raise ValueError(
                f"--mcl-share {given['mcl_share']} and --mcl-tau {given['mcl_tau']} both set tau: give one of them"
            )
        return {**given, "mcl_tau": None}


class SoftCeOptions(MethodOptions):
    """Soft cross-entropy."""

    temperature: float = temperature_option(1.0)


class TopKlOptions(KlOptions):
    """KL over few classes."""

    top_classes: int = method_option(
        10, "Classes that topk-kl compares: the teacher's most probable ones.", ge=1, metavar="K", le=10**6
    )


# --- methods ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitTransfer(Method):
    """Logits of teachers of the same classes, and maybe labels."""

    tunes = True

    def needs_of(self, options: Any) -> Needs:
        """No labels where lambda is 1."""
        return without_labels(self.needs, getattr(options, "kl_weight", 1.0))

    def term(self, options: Any) -> Term:
        """The divergence from one teacher."""
        return lambda ours, theirs, count: kl_divergence(
            ours, theirs, options.temperature, options.kl_direction, count
        )

    def told(self, options: Any) -> str:
        """What the divergence is, to be told."""
        return kl_name(options)

    def describe(self, setup: Setup) -> list[str]:
        """P3 Eq. 2 with its numbers."""
        return [f"{self.told(setup.options)}{beside(setup.options)}; teachers: {setup.shares}"]

    def build(self, setup: Setup) -> Objective:
        """See :class:`Transfer`."""
        options = setup.options
        return Transfer(
            setup.weights,
            self.term(options),
            getattr(options, "kl_weight", 1.0),
            setup.columns,
            setup.settings.label_smoothing,
            setup.own or (),
        )


def without_labels(needs: Needs, kl_weight: float) -> Needs:
    """What is needed where labels have the rest of a weight: none of them where it is 1 (P3 Eq. 2)."""
    return needs if kl_weight < 1 else replace(needs, labels=False)


def beside(options: Any) -> str:
    """The weight of the distillation term, to be told, where labels have a share."""
    weight = getattr(options, "kl_weight", 1.0)
    return f", weight {weight:g} beside the labels" if weight < 1 else ""


@final
class Kl(LogitTransfer):
    """KL."""


@final
class SoftCe(LogitTransfer):
    """Soft cross-entropy."""

    def term(self, options: SoftCeOptions) -> Term:
        """See :func:`~kdcli.methods.losses.soft_cross_entropy`."""
        return lambda ours, theirs, count: soft_cross_entropy(ours, theirs, options.temperature, count=count)

    def told(self, options: SoftCeOptions) -> str:
        """With its temperature."""
        return f"soft cross-entropy at T = {options.temperature:g}"


@final
class Mcl(LogitTransfer):
    """KL, labels and the slow copy."""

    def check(self, setup: Setup) -> Setup:
        """Refuses a second average of the weights; warns of a copy that stays random."""
        if setup.settings.ema is not None:
            raise UsageError(
                f"--ema {setup.settings.ema:g} averages weights, and so does the slow copy of {self.name}",
                "Leave --ema out; --mcl-tau and --mcl-every say how the slow copy follows.",
            )
        if not setup.origin.trained and setup.options.mcl_share is None:
            console.warn(
                f"{self.name} exports a slow copy that starts from random weights and keeps {setup.options.mcl_tau:g} "
                "of itself in an update: it may learn nothing; --mcl-share 0.99 lets it follow to the end"
            )
        return setup

    def average(self, setup: Setup) -> Average:
        """The slow copy (P3 Eq. 3). It starts as the student and keeps its pace."""
        return slow_copy(setup.options, setup.steps)

    def describe(self, setup: Setup) -> list[str]:
        """With how far the slow copy goes."""
        slow = self.average(setup)
        updates = setup.steps // slow.every
        return [
            *LogitTransfer.describe(self, setup),
            f"slow copy: tau {slow.decay:.6g}, every {slow.every} steps; {updates} updates go "
            f"{1 - slow.decay**updates:.1%} of the way; it is tested and exported, BatchNorm buffers averaged likewise",
        ]


def slow_copy(options: MclOptions, steps: int) -> Average:
    """How the slow copy follows in a training of ``steps`` steps.

    Given as a share s of the way to the fast weights that it goes in a whole run of u updates, tau is
    ``(1 - s) ** (1 / u)``: fast weights that stand still would be approached by s.
    """
    if options.mcl_share is None:
        return Average(options.mcl_tau or 0.0, options.mcl_every)
    updates = max(1, steps // options.mcl_every)
    return Average(float((1 - options.mcl_share) ** (1 / updates)), options.mcl_every)


@final
class TopKl(LogitTransfer):
    """KL over the teacher's most probable classes; :attr:`Setup.own` says of whom how many logits are cached."""

    def term(self, options: TopKlOptions) -> Term:
        """See :func:`~kdcli.methods.losses.top_classes_divergence`."""
        return lambda ours, theirs, count: top_classes_divergence(
            ours, theirs, options.top_classes, options.temperature, options.kl_direction, count
        )

    def told(self, options: TopKlOptions) -> str:
        """With how many classes."""
        return f"{kl_name(options)}, over the teacher's {options.top_classes} most probable classes, renormalised"

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """All logits, or the largest."""
        return {name: LARGEST if name in (setup.own or {}) else ("logits",) for name in setup.weights}

    def check(self, setup: Setup) -> Setup:
        """Refuses more classes than there are, or than are cached."""
        needed: int = setup.options.top_classes
        if needed > setup.classes:
            raise UsageError(
                f"--top-classes {needed}, but there are {setup.classes} classes",
                f"Use --top-classes {max(1, setup.classes // 2)}, or --method {KL.name}, which compares all of them.",
            )
        return replace(setup, own=_largest(setup, needed))

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the teachers of whom the largest logits are read."""
        largest = {"largest_logits": dict(sorted(setup.own.items()))} if setup.own else {}
        return {**Method.identity(self, setup), **largest}

    def describe(self, setup: Setup) -> list[str]:
        """With how many logits are read of each teacher."""
        kept = {name: setup.own.get(name) for name in setup.weights}
        read = (f"{name} {'all' if top is None else f'the {top} largest'}" for name, top in kept.items())
        return [*LogitTransfer.describe(self, setup), f"logits read from the cache: {', '.join(read)}"]


def _largest(setup: Setup, needed: int) -> dict[str, int]:
    """How many logits are kept of each teacher of whom not all are, or of more views than all are.

    Raises:
        CacheMissingError: fewer than are needed.
    """
    pinned = setup.before.get("largest_logits", ())
    found = {}
    for name in setup.weights:
        outputs = setup.teachers[name].outputs
        whole, top = outputs.get("logits"), outputs.get("topk")
        if top is not None and (name in pinned or whole is None or (whole.eval_only and not top.eval_only)):
            found[name] = top.top_k
    few = [name for name, kept in found.items() if kept < needed]
    if few and setup.cache is not None:
        raise CacheMissingError(
            f"the {needed} largest logits of '{few[0]}' are needed (--top-classes {needed}), and the cache keeps "
            f"only the {found[few[0]]} largest",
            f"{setup.cache.adding(few, ['logits'])} adds all of them; or make a new cache with --keep "
            f"topk:{needed}, or lower --top-classes",
        )
    return found


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
)

_SAME = Needs(frozenset({"logits"}), classes=True)
_LABELS = replace(_SAME, labels=True)

KL = Kl(
    name="kl", paper=PAPER, equation="Eq. 1", summary="KL from teachers of the same classes; no labels.",
    Options=KlOptions, needs=_SAME, defaults=PRINTED,
)  # fmt: skip
XE_KL = Kl(
    name="xe-kl", paper=PAPER, equation="Eq. 2", summary="KL and labels.", Options=HalfKlOptions, needs=_LABELS,
    defaults=PRINTED,
)  # fmt: skip
KL_LS = Kl(
    name="kl-ls", paper=PAPER, equation="Eq. 2, smoothed labels", summary="KL and smoothed labels.",
    Options=HalfKlOptions, needs=_LABELS, defaults=replace(PRINTED, label_smoothing=0.1),
)  # fmt: skip
MCL = Mcl(
    name="mcl", paper=PAPER, equation="Eq. 2, 3",
    summary="KL and labels; a slowly following copy of the student is kept.", Options=MclOptions, needs=_LABELS,
    defaults=replace(PRINTED, lr=0.01),
)  # fmt: skip
SOFT_CE = SoftCe(
    name="soft-ce", paper=PAPER, equation="Eq. 1, cross-entropy",
    summary="Soft cross-entropy instead of KL; no labels.", Options=SoftCeOptions, needs=_SAME, defaults=PRINTED,
)  # fmt: skip
TOPK_KL = TopKl(
    name="topk-kl", paper=PAPER, equation="Eq. 1, top classes",
    summary="KL over the teacher's most probable classes; no labels.", Options=TopKlOptions,
    needs=replace(_SAME, largest=True), defaults=PRINTED,
)  # fmt: skip
