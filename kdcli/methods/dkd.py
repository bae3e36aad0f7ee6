"""DKD: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022).

With q = softmax(. / T), q_y the probability of the label and q^ the softmax over the other classes alone:

    TCKD = T^2 mean KL([t_y, 1 - t_y] || [s_y, 1 - s_y]),   NCKD = T^2 mean KL(t^ || s^)
    L = CE + w (alpha TCKD + beta NCKD),   w rises from 0 to 1

* KD is TCKD + (1 - t_y) NCKD: it cares little for the other classes of images that the teacher is sure of, which
  beta undoes. How large beta should be depends on how sure the teacher is: 8, 6 or 2 in the released code for pairs of
  CIFAR-100, 0.5 or 2 for ImageNet (T = 1).
* log(1 - p) is a difference of logsumexps, as 1 - p is 0 in half or full precision for a student that is sure.
* Printed and released: alpha 1, beta 8, T 4, w = min(epoch / 20, 1) of 240 epochs. Here w rises in every step and is
  the same at the end of each epoch; the share of the training, 1/12, is what is kept for other lengths (ours).
* The label says which class is apart, so every image has to have one, and mixed images have two.
"""

from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from kdcli.methods.batch import Batch
from kdcli.methods.kd import CIFAR, SAME_CLASSES
from kdcli.methods.logits import LogitMethod, Shares, Term, beside_label_weight
from kdcli.methods.options import LogitOptions, label_weight_option, method_option, temperature_option


class DkdOptions(LogitOptions):
    """What DKD can be told."""

    temperature: float = temperature_option(4.0)
    dkd_alpha: float = method_option(1.0, "Weight of DKD's term of the right class.", ge=0, le=1e4, silent=0)
    dkd_beta: float = method_option(8.0, "Weight of DKD's term of the other classes.", ge=0, le=1e4, silent=0)
    dkd_warmup: float = method_option(
        20 / 240, "Share of the training in which both of DKD's weights rise.", ge=0, le=1
    )
    label_weight: float = label_weight_option(spares=False)


def decoupled(
    student: Float[Tensor, "b c"],
    teacher: Float[Tensor, "b c"],
    labels: Int64[Tensor, " b"],
    temperature: float,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """TCKD and NCKD of each image, times T^2, in nats; in fp32.

    Args:
        student: raw logits, c >= 2.
        teacher: likewise; no gradient flows into them.
        labels: class indices, none of them -1.
        temperature: T > 0.
    """
    s, s_rest, s_hat = split(student / temperature, labels)
    t, t_rest, t_hat = split(teacher.detach() / temperature, labels)
    target = t.exp() * (t - s) + t_rest.exp() * (t_rest - s_rest)
    others = functional.kl_div(s_hat, t_hat, reduction="none", log_target=True).sum(dim=1)
    return target * temperature**2, others * temperature**2


def split(
    logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, "b c-1"]]:
    """Log-probabilities of the label, of all other classes together, and of each of these among themselves.

    Args:
        logits: c >= 2; the softmax is at T = 1.
        labels: class indices, none of them -1.

    Returns:
        In fp32; the others are in the order of the classes, without the label.
    """
    logits = logits.float()
    count = logits.shape[1]
    place = torch.arange(count - 1, device=labels.device)
    columns = place + (place >= labels[:, None])  # all but the label's
    own, others = logits.gather(1, labels[:, None])[:, 0], logits.gather(1, columns)
    rest = others.logsumexp(dim=1)
    whole = torch.logaddexp(own, rest)
    return own - whole, rest - whole, others - rest[:, None]


@final
class Dkd(LogitMethod):
    """DKD and labels."""

    def term(self, options: DkdOptions) -> Term:
        """See :func:`decoupled`."""

        def term(ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
            target, others = decoupled(ours, theirs, batch.labels, options.temperature)
            rows = options.dkd_alpha * target + options.dkd_beta * others
            return rows.sum() / (batch.count("images") or len(rows) or 1)

        return term

    def told(self, options: DkdOptions) -> str:
        """With its weights."""
        rising = (
            f", rising in the first {options.dkd_warmup:.3g} of the training" if options.dkd_warmup else ""
        )
        return (
            f"DKD at T = {options.temperature:g}: {options.dkd_alpha:g} x the right class, {options.dkd_beta:g} x the "
            f"others{rising}{beside_label_weight(options.label_weight)}"
        )

    def shares(self, options: DkdOptions) -> Shares:
        """Alpha and beta are in the term."""
        return Shares(1.0, options.label_weight, options.dkd_warmup)


DKD = Dkd(
    name="dkd", paper="Zhao et al., Decoupled Knowledge Distillation, CVPR 2022", equation="Eq. 7",
    summary="Labels, and the teacher's probabilities of the right class and of the others, weighed apart.",
    Options=DkdOptions, needs=SAME_CLASSES, defaults=CIFAR, look="weighs what teachers give an image's label apart",
)  # fmt: skip
