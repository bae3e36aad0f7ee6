"""DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022).

With p = softmax(s / tau), q = softmax(t / tau), both [b, c], and rho Pearson's correlation:

    inter = tau^2 (1 - mean over images of rho(p_i., q_i.)),   intra = tau^2 (1 - mean over classes of rho(p_.j, q_.j))
    L = CE + beta inter + gamma intra

* beta = gamma = 2, tau = 1: the released code multiplies a loss of weights 1 by 2.
* intra correlates a class over all images of a step: those of all processes and of all pieces of ``--accumulate``. It
  depends on the batch size, and one image alone has none.
* A class (or image) whose probabilities are all equal correlates with nothing: rho is 0, and so is its gradient. The
  released code adds 1e-8 to the product of the norms instead, whose gradient is that times 1e8.
* A correlation is free of scale; tau^2 stands as in the released code.
* The numbers of the engine are those of kd, with which the paper compares on CIFAR-100.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.methods.base import Method, Setup
from kdcli.methods.batch import Batch
from kdcli.methods.gathering import gather_features, gather_rows
from kdcli.methods.kd import CIFAR, SAME_CLASSES
from kdcli.methods.logits import LogitMethod, Shares, Term, beside_label_weight
from kdcli.methods.options import LogitOptions, label_weight_option, method_option, temperature_option

_ROUNDING = 1e-6
"""Deviation, as a share of the values, that is rounding in fp32."""


class DistOptions(LogitOptions):
    """What DIST can be told."""

    temperature: float = temperature_option(1.0)
    dist_beta: float = method_option(
        2.0, "Weight of DIST's correlations within images.", ge=0, le=1e4, silent=0
    )
    dist_gamma: float = method_option(
        2.0, "Weight of DIST's correlations within classes.", ge=0, le=1e4, silent=0
    )
    label_weight: float = label_weight_option()


def correlation(ours: Float[Tensor, "m n"], theirs: Float[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """Pearson's correlation of each row with the same row of the other; 0, without gradient, where one is constant."""
    lengths, centred, constant = [], [], torch.zeros(len(ours), dtype=torch.bool, device=ours.device)
    for each in (ours, theirs):
        apart = each - each.mean(dim=1, keepdim=True)
        square = apart.square().sum(dim=1)
        flat = square <= _ROUNDING**2 * each.detach().square().sum(dim=1)
        lengths.append(square.masked_fill(flat, 1.0).sqrt())
        centred.append(apart)
        constant = constant | flat
    rho = (centred[0] * centred[1]).sum(dim=1) / (lengths[0] * lengths[1])
    return rho.masked_fill(constant, 0.0)


def relations(
    student: Float[Tensor, "b c"],
    teacher: Float[Tensor, "b c"],
    temperature: float,
    count: float | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Inter and intra; in fp32, each from 0 to 2 tau^2.

    In several processes intra is over the images of all of them: each computes the one loss, and its gradient is for
    data-parallel training, which takes the mean over the processes.

    Args:
        student: raw logits.
        teacher: likewise; no gradient flows into them.
        temperature: tau > 0.
        count: what the sum over the images is divided by (see :class:`~kdcli.methods.batch.Counts`); default: their
            number.
    """
    ours = (student.float() / temperature).softmax(dim=1)
    theirs = (teacher.detach().float() / temperature).softmax(dim=1)
    inter = (1 - correlation(ours, theirs)).sum() / (count or len(ours) or 1)
    (all_theirs,) = gather_rows(theirs)
    intra = (1 - correlation(gather_features(ours).T, all_theirs.T)).mean()
    return inter * temperature**2, intra * temperature**2


@final
class Dist(LogitMethod):
    """DIST and labels."""

    def term(self, options: DistOptions) -> Term:
        """See :func:`relations`."""

        def term(ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
            inter, intra = relations(ours, theirs, options.temperature, batch.count("images"))
            return options.dist_beta * inter + options.dist_gamma * intra

        return term

    def told(self, options: DistOptions) -> str:
        """With its weights."""
        return (
            f"DIST at T = {options.temperature:g}: {options.dist_beta:g} x correlations within images, "
            f"{options.dist_gamma:g} x within classes{beside_label_weight(options.label_weight)}"
        )

    def shares(self, options: DistOptions) -> Shares:
        """Beta and gamma are in the term."""
        return Shares(1.0, options.label_weight)

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With how many images a class is correlated over: those of a step."""
        return {**Method.identity(self, setup), "contrasted": setup.settings.batch_size}

    def describe(self, setup: Setup) -> list[str]:
        """With how many images a class is correlated over."""
        return [
            *LogitMethod.describe(self, setup),
            f"correlations of a class over {setup.settings.batch_size} images",
        ]


DIST = Dist(
    name="dist", paper="Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022",
    equation="inter + intra",
    summary="Labels, and correlations with the teacher's probabilities: within images and within classes.",
    Options=DistOptions, needs=SAME_CLASSES, defaults=CIFAR, relational=True, least=2,
    spares={"labels": "--label-weight 0"},
)  # fmt: skip
