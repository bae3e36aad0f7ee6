"""Losses that several methods share, as pure functions."""

from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from kdcli.methods.batch import Mixed


def soft_cross_entropy(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    temperature: float,
    rows: Bool[Tensor, " b"] | None = None,
    count: float | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student against the teacher's soft labels; no factor T^2.

    ``-mean_i sum_c p_t[i, c] log p_s[i, c]`` with ``p = softmax(logits / T)`` on both sides
    (P1 section 2 with T = 2; P2 Eq. 3 with T = 1). Computed in fp32 whatever the logits are stored in.

    Args:
        student_logits: raw.
        teacher_logits: raw; no gradient flows into them.
        temperature: T > 0.
        rows: the rows the mean is over; default all. Without any row the result is 0.
        count: what their sum is divided by (see :class:`~kdcli.methods.batch.Counts`); default: their number.

    Returns:
        The mean over the rows, in nats.
    """
    targets = functional.softmax(teacher_logits.detach().float() / temperature, dim=1)
    losses = -(targets * functional.log_softmax(student_logits.float() / temperature, dim=1)).sum(dim=1)
    if rows is None:
        return losses.mean() if count is None else losses.sum() / (count or 1.0)
    return losses.masked_fill(~rows, 0.0).sum() / _divisor(rows, count)


def label_cross_entropy(
    logits: Float[Tensor, "b c"],
    labels: Int64[Tensor, " b"],
    mixed: Mixed | None = None,
    smoothing: float = 0.0,
    count: float | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy against class labels, mean over the labelled rows (P2 Eq. 2); 0 when there are none.

    A mixed image counts for both of its labels: ``lam CE(y) + (1 - lam) CE(y_partner)`` (MixUp and CutMix);
    it is a labelled row if either is labelled, and an unlabelled part adds nothing.

    Args:
        logits: raw.
        labels: class indices; -1 is unlabelled.
        mixed: what the images are mixed with, if they are.
        smoothing: share in [0, 1) of each label that is spread evenly over all classes, its own included.
        count: what the sum is divided by (see :class:`~kdcli.methods.batch.Counts`); default: the labelled rows.
    """
    if mixed is None:
        total = functional.cross_entropy(
            logits.float(), labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )
        return total / _divisor(labels >= 0, count)
    own, theirs = (
        functional.cross_entropy(
            logits.float(), classes, ignore_index=-1, reduction="none", label_smoothing=smoothing
        )
        for classes in (labels, mixed.labels)
    )
    rows = (labels >= 0) | (mixed.labels >= 0)
    return (mixed.own * own + (1 - mixed.own) * theirs).sum() / _divisor(rows, count)


def _divisor(rows: Bool[Tensor, " b"], count: float | None) -> Tensor | float:
    return rows.sum().clamp(min=1) if count is None else count or 1.0


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """``sum_i weights[i] * parts[i]`` over ``names``, in that order."""
    return sum((parts[name] * weights[name] for name in names[1:]), parts[names[0]] * weights[names[0]])
