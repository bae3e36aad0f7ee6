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

from dataclasses import replace
from typing import Any, final

from pydantic import model_validator

from kdcli.console import console
from kdcli.errors import UsageError
from kdcli.methods.base import Average, Needs, Settings, Setup
from kdcli.methods.logits import LogitMethod, Term
from kdcli.methods.losses import soft_cross_entropy
from kdcli.methods.options import (
    LogitKlOptions,
    LogitOptions,
    kl_weight_option,
    method_option,
    temperature_option,
)

PAPER = "P3, Fantastic Gains"


# --- options ----------------------------------------------------------------------------------


class HalfKlOptions(LogitKlOptions):
    """KL and labels, equally (ours)."""

    kl_weight: float = kl_weight_option(0.5)


class MclOptions(LogitKlOptions):
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


class SoftCeOptions(LogitOptions):
    """Soft cross-entropy."""

    temperature: float = temperature_option(1.0)


# --- methods ----------------------------------------------------------------------------------


@final
class Kl(LogitMethod):
    """KL, and maybe labels."""

    tunes = True


@final
class SoftCe(LogitMethod):
    """Soft cross-entropy."""

    tunes = True

    def term(self, options: SoftCeOptions) -> Term:
        """See :func:`~kdcli.methods.losses.soft_cross_entropy`."""
        return lambda ours, theirs, batch: soft_cross_entropy(
            ours, theirs, options.temperature, count=batch.count("images")
        )

    def told(self, options: SoftCeOptions) -> str:
        """With its temperature."""
        return f"soft cross-entropy at T = {options.temperature:g}"


@final
class Mcl(LogitMethod):
    """KL, labels and the slow copy."""

    tunes = True

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
        return LogitMethod.check(self, setup)

    def average(self, setup: Setup) -> Average:
        """The slow copy (P3 Eq. 3). It starts as the student and keeps its pace."""
        return slow_copy(setup.options, setup.steps)

    def describe(self, setup: Setup) -> list[str]:
        """With how far the slow copy goes."""
        slow = self.average(setup)
        updates = setup.steps // slow.every
        return [
            *LogitMethod.describe(self, setup),
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
_SPARES = {"labels": "--kl-weight 1"}

KL = Kl(
    name="kl", paper=PAPER, equation="Eq. 1", summary="KL from teachers of the same classes; no labels.",
    Options=LogitKlOptions, needs=_SAME, defaults=PRINTED,
)  # fmt: skip
XE_KL = Kl(
    name="xe-kl", paper=PAPER, equation="Eq. 2", summary="KL and labels.", Options=HalfKlOptions, needs=_LABELS,
    defaults=PRINTED, spares=_SPARES,
)  # fmt: skip
KL_LS = Kl(
    name="kl-ls", paper=PAPER, equation="Eq. 2, smoothed labels", summary="KL and smoothed labels.",
    Options=HalfKlOptions, needs=_LABELS, defaults=replace(PRINTED, label_smoothing=0.1), spares=_SPARES,
)  # fmt: skip
MCL = Mcl(
    name="mcl", paper=PAPER, equation="Eq. 2, 3",
    summary="KL and labels; a slowly following copy of the student is kept.", Options=MclOptions, needs=_LABELS,
    defaults=replace(PRINTED, lr=0.01), spares=_SPARES,
)  # fmt: skip
SOFT_CE = SoftCe(
    name="soft-ce", paper=PAPER, equation="Eq. 1, cross-entropy",
    summary="Soft cross-entropy instead of KL; no labels.", Options=SoftCeOptions, needs=_SAME, defaults=PRINTED,
)  # fmt: skip
