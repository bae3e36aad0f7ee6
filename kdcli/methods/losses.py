"""Losses that several methods share, as pure functions."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kdcli.methods.batch import Batch, Mixed
from kdcli.methods.gathering import gather_features, gather_rows, processes
from kdcli.methods.options import Direction, KlOptions
from kdcli.models.student import LABEL_HEAD, StudentOutput


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
    return _mean(losses, rows, count)


@torch.no_grad()
def teacher_divergence(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    temperature: float,
    rows: Bool[Tensor, " b"] | None = None,
    count: float | None = None,
) -> Float[Tensor, ""]:
    """``mean_i KL(p_t[i] || p_s[i])``, to be told beside a loss, whatever that is; no factor T^2.

    It is :func:`soft_cross_entropy` less the teacher's own entropy: 0 where the student gives what the teacher does.
    Of teachers of whom only the largest logits are known the others are minus infinity, and add nothing.

    Args:
        student_logits: see :func:`soft_cross_entropy`, as for the rest.
        teacher_logits: likewise.
        temperature: likewise.
        rows: likewise.
        count: likewise.

    Returns:
        In nats, without a gradient.
    """
    ours, theirs = (
        (each.float() / temperature).log_softmax(dim=1) for each in (student_logits, teacher_logits)
    )
    targets = theirs.exp()
    return _mean(torch.where(targets > 0, targets * (theirs - ours), 0.0).sum(dim=1), rows, count)


def _mean(
    losses: Float[Tensor, " b"], rows: Bool[Tensor, " b"] | None, count: float | None
) -> Float[Tensor, ""]:
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


def label_loss(logits: Float[Tensor, "b _"], batch: Batch, smoothing: float = 0.0) -> Float[Tensor, ""]:
    """What a head loses on a batch's labels: :func:`label_cross_entropy`, or of several labels an image theirs.

    That is the binary cross-entropy of each label with its logit, mean over the labels and over the labelled images
    (torch's ``binary_cross_entropy_with_logits``). Mixed images count for both as there; smoothing moves a target
    y to ``(1 - s) y + s / 2``.

    Args:
        logits: raw; one a class, or one a label.
        batch: with the labels, and over how many of them the mean goes.
        smoothing: s in [0, 1).
    """
    count = batch.count("labelled")
    if batch.targets is None:
        return label_cross_entropy(logits, batch.labels, batch.mixed, smoothing, count)
    own = _binary_rows(logits, batch.labels, batch.targets, smoothing)
    rows, mixed = batch.labels >= 0, batch.mixed
    if mixed is not None and mixed.targets is not None:
        theirs = _binary_rows(logits, mixed.labels, mixed.targets, smoothing)
        own, rows = mixed.own * own + (1 - mixed.own) * theirs, rows | (mixed.labels >= 0)
    return own.sum() / _divisor(rows, count)


def _binary_rows(
    logits: Float[Tensor, "b l"], labels: Int64[Tensor, " b"], targets: Float[Tensor, "b l"], smoothing: float
) -> Float[Tensor, " b"]:
    smoothed = targets * (1 - smoothing) + smoothing / 2
    losses = functional.binary_cross_entropy_with_logits(logits.float(), smoothed, reduction="none")
    return losses.mean(dim=1).masked_fill(labels < 0, 0.0)


def _divisor(rows: Bool[Tensor, " b"], count: float | None) -> Tensor | float:
    return rows.sum().clamp(min=1) if count is None else count or 1.0


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """``sum_i weights[i] * parts[i]`` over ``names``, in that order."""
    return sum((parts[name] * weights[name] for name in names[1:]), parts[names[0]] * weights[names[0]])


# --- divergences (P3) ------------------------------------------------------------------------


def kl_divergence(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    temperature: float,
    direction: Direction = "forward",
    count: float | None = None,
) -> Float[Tensor, ""]:
    """``T^2 / n * sum_i KL(p_t[i] || p_s[i])`` with ``p = softmax(logits / T)`` (P3 Eq. 1).

    Divided by the images, not by images times classes as torch's ``reduction="mean"`` does. In fp32.

    Args:
        student_logits: raw.
        teacher_logits: raw; no gradient flows into them.
        temperature: T > 0.
        direction: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher).
        count: n, see :class:`~kdcli.methods.batch.Counts`; default: the rows.

    Returns:
        In nats, >= 0.
    """
    ours = functional.log_softmax(student_logits.float() / temperature, dim=1)
    theirs = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
    total = functional.kl_div(second, first, reduction="sum", log_target=True)
    return total * temperature**2 / (count or len(student_logits) or 1)


def kl_order(direction: Direction) -> str:
    """The arguments of :func:`kl_divergence` in their order, to be told."""
    return "student || teacher" if direction == "reverse" else "teacher || student"


def kl_name(options: KlOptions) -> str:
    """What :func:`kl_divergence` is with these options, to be told."""
    return f"T^2/n KL({kl_order(options.kl_direction)}) at T = {options.temperature:g}"


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


def choose_source(confidences: Sequence[Float[Tensor, " b"]]) -> Int64[Tensor, " b"]:
    """Which source each image is learnt from: the most confident one (P3 Eq. 4, several teachers: section 4.3).

    Args:
        confidences: the log-probability that every source gives at T = 1: of the label (supervised) or of its own
            most probable class (unsupervised). The frozen student comes first, so that a teacher has to be
            strictly above it; of equal teachers the first one is taken.

    Returns:
        Number of the source; 0 is the frozen student.
    """
    together = torch.stack([each.detach().float() for each in confidences], dim=1)
    # Torch leaves open which of equal values argmax names; the smallest place of the maximum is meant.
    largest = together == together.amax(dim=1, keepdim=True)
    places = torch.arange(together.shape[1], device=together.device)
    return torch.where(largest, places, together.shape[1] - 1).amin(dim=1)


def chosen_logits(
    sources: Sequence[Float[Tensor, "b c"]], choice: Int64[Tensor, " b"]
) -> Float[Tensor, "b c"]:
    """Each image's logits from the source that it is learnt from."""
    rows = torch.arange(len(choice), device=choice.device)
    return torch.stack([each.detach().float() for each in sources])[choice, rows]


def beside_labels(
    student: StudentOutput,
    batch: Batch,
    parts: dict[str, Tensor],
    distill_weight: float,
    smoothing: float,
    label_weight: float | None = None,
) -> dict[str, Tensor]:
    """Loss and parts of P3 Eq. 2, from the part ``distill`` and, unless they weigh nothing, the labels.

    Args:
        student: whose classifier learns from the labels.
        batch: has them.
        parts: of the loss; all of them are returned, too.
        distill_weight: lambda >= 0.
        smoothing: of the labels, in [0, 1).
        label_weight: theirs, >= 0; None: 1 - lambda.
    """
    loss = distill_weight * parts["distill"]
    labels = 1 - distill_weight if label_weight is None else label_weight
    if labels > 0:
        label = label_loss(student.logits[LABEL_HEAD], batch, smoothing)
        loss, parts = loss + labels * label, {"label": label, **parts}
    return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


def similarity_divergence(
    student: Float[Tensor, "b ds"],
    teacher: Float[Tensor, "b dt"],
    direction: Direction = "forward",
    count: float | None = None,
) -> Float[Tensor, ""]:
    """CD: KL between softmaxed cosine similarities of a batch's images (P3 Eq. 6).

    ``1/n sum_i KL(softmax(S_t[i]) || softmax(S_s[i]))`` with ``S[i, j] = cos(f_i, f_j)``, an image with itself
    included. The two spaces may differ in width. In several processes the images are those of all of them, and each
    computes the one loss; its gradient is for data-parallel training, which takes the mean over the processes.

    Args:
        student: pooled features.
        teacher: pooled features, cached; no gradient flows into them.
        direction: see :func:`kl_divergence`; the formula is that of ``forward``.
        count: n of one process, see :class:`~kdcli.methods.batch.Counts`; default: the rows.
    """
    gathered = gather_features(student.float()), *gather_rows(teacher.detach().float())
    ours, theirs = (functional.normalize(each, dim=1) for each in gathered)
    together = None if count is None else count * processes()
    return kl_divergence(ours @ ours.T, theirs @ theirs.T, 1.0, direction, together)
