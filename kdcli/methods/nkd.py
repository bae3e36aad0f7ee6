"""NKD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels" (ICCV 2023).

    L = CE - mean t_y log s_y - gamma tau^2 mean sum over j != y of t^_j log s^_j

t_y, s_y are probabilities of the label at T = 1; t^, s^ those of the other classes among themselves at tau.

* Teachers that are combined are so at T = 1 for t_y, and at tau for t^.
* gamma 1.5, tau 1, as released. Both terms are cross-entropies, not KLs: the loss of a perfect student is not 0.
* The label says which class is apart, so every image has to have one, and mixed images have two.
* The numbers of the engine are those of kd (ours: so that methods differ in the loss alone).
"""

from typing import final

from jaxtyping import Float, Int64
from torch import Tensor

from kdcli.methods.batch import Batch
from kdcli.methods.dkd import split
from kdcli.methods.kd import CIFAR, SAME_CLASSES
from kdcli.methods.logits import LogitMethod, Shares, Term, beside_label_weight
from kdcli.methods.options import LogitOptions, label_weight_option, method_option, temperature_option


class NkdOptions(LogitOptions):
    """What NKD can be told."""

    temperature: float = temperature_option(1.0)
    nkd_gamma: float = method_option(1.5, "Weight of NKD's term of the other classes.", ge=0, le=1e4)
    label_weight: float = label_weight_option(spares=False)


def target_entropy(
    student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """``-t_y log s_y`` of each image at T = 1, in nats; in fp32.

    Args:
        student: raw logits, c >= 2.
        teacher: likewise; no gradient flows into them.
        labels: class indices, none of them -1.
    """
    return -split(teacher.detach(), labels)[0].exp() * split(student, labels)[0]


def others_entropy(
    student: Float[Tensor, "b c"],
    teacher: Float[Tensor, "b c"],
    labels: Int64[Tensor, " b"],
    temperature: float,
) -> Float[Tensor, " b"]:
    """Cross-entropy of the other classes among themselves at tau > 0, times tau^2; see :func:`target_entropy`."""
    theirs, ours = (split(each / temperature, labels)[2] for each in (teacher.detach(), student))
    return -(theirs.exp() * ours).sum(dim=1) * temperature**2


def _mean(rows: Float[Tensor, " b"], batch: Batch) -> Float[Tensor, ""]:
    return rows.sum() / (batch.count("images") or len(rows) or 1)


@final
class Nkd(LogitMethod):
    """NKD and labels."""

    def terms(self, options: NkdOptions) -> tuple[tuple[float, Term], ...]:
        """See :func:`target_entropy` and :func:`others_entropy`."""

        def target(ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
            return _mean(target_entropy(ours, theirs, batch.labels), batch)

        def others(ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
            rows = others_entropy(ours, theirs, batch.labels, options.temperature)
            return options.nkd_gamma * _mean(rows, batch)

        return (1.0, target), (options.temperature, others)

    def told(self, options: NkdOptions) -> str:
        """With its weight."""
        return (
            f"NKD: the right class at T = 1, {options.nkd_gamma:g} x the others at T = {options.temperature:g}"
            f"{beside_label_weight(options.label_weight)}"
        )

    def shares(self, options: NkdOptions) -> Shares:
        """Gamma is in the term."""
        return Shares(1.0, options.label_weight)


NKD = Nkd(
    name="nkd", paper="Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023",
    equation="the loss NKD",
    summary="Labels, the teacher's probability of the right class, and those of the others among themselves.",
    Options=NkdOptions, needs=SAME_CLASSES, defaults=CIFAR, look="weighs what teachers give an image's label apart",
)  # fmt: skip
