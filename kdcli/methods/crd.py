"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (ICLR 2020).

Of a student's and a teacher's embedding of the same image against those of other images:

    h(t, s) = P / (P + K/n),   P = exp(g_t(t) . g_s(s) / tau) / Z                                (Eq. 19)
    L = -mean [ log h(positive) + sum over K negatives of log(1 - h(negative)) ]                 (section 3.2)

* ``g_t``, ``g_s``: one linear layer each and L2 normalisation, to 128 dimensions; both are trained, and dropped
  after training. P1 (section 2): every teacher has a pair of its own.
* The other images come from two memory banks, one row per image of the data set: a row is an image, whatever
  its view, so all views share it. A row moves towards each new embedding with momentum 0.5, after it was scored.
* The student's embedding is scored against the teacher's bank and the teacher's against the student's; the loss
  is the sum of both (as released: Eq. 19 pairs two embeddings of one forward).
* K = 16384 negatives, tau = 0.07, n images. The constants Z are estimated on the first batch and kept (as
  released: a contrastive estimate needs no exact normalisation; Z only fixes the range).
* Negatives are images of other classes where labels are known (as released; P3 App. A.2), or any other images: all
  that P1's unlabelled proxy leaves, and so the default of P1's methods. An image without a label may be a negative of
  any, and takes any other. One random draw serves all images of a batch (ours): its rows are read once instead of
  b K times, and each image leaves out itself and its class. No two of its negatives are the same row.
* Scores are fp32 whatever the student runs in: exp(1 / tau) is 1.6e6, and fp16 ends at 65504.
"""

import math
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kdcli.console import console
from kdcli.errors import BadDataError
from kdcli.methods.base import Setup
from kdcli.methods.gathering import gather_rows
from kdcli.methods.keyed import hashed
from kdcli.methods.options import MethodOptions, method_option

EPSILON = 1e-7
"""Of the released code, beside K/n in both denominators."""


Negatives = Literal["other-classes", "other-images"]


def negatives_option(default: Negatives) -> Any:
    """What CRD contrasts an image with, with the method's own default."""
    return method_option(
        default,
        "What CRD contrasts an image with: images of other classes, as far as labels are known, or any.",
    )


def crd_weight_option(**marks: Any) -> Any:
    """Beta; ``silent`` where labels are all that is beside it."""
    return method_option(0.8, "Weight beta of CRD beside a teacher's other term.", ge=0, le=1e4, **marks)


class CrdOptions(MethodOptions):
    """What CRD can be told, in every method that has it."""

    negatives: Negatives = negatives_option("other-images")
    crd_weight: float = crd_weight_option()
    crd_negatives: int = method_option(
        16384, "Negatives of CRD for an image, or as many as there are.", ge=1, le=10**7
    )
    crd_temperature: float = method_option(0.07, "Temperature of CRD's scores.", ge=1e-4, le=1000)
    crd_dim: int = method_option(128, "Dimensions of CRD's embeddings.", ge=1, le=2**16)
    crd_momentum: float = method_option(0.5, "Share that CRD's memory keeps of a row.", ge=0, lt=1)


def contrastive_scores(
    embedding: Float[Tensor, "b d"],
    bank: Float[Tensor, "m d"],
    columns: Int64[Tensor, "b k1"],
    temperature: float,
) -> Float[Tensor, "b k1"]:
    """``exp(embedding . row / tau)`` for the rows that each image is contrasted with (Eq. 19, before Z).

    Args:
        embedding: of unit length.
        bank: the rows that any image of the batch is contrasted with.
        columns: which of them each image is: its own first, then its negatives.
        temperature: tau > 0.
    """
    return (embedding @ bank.T / temperature).gather(1, columns).exp()


def contrastive_loss(
    scores: Float[Tensor, "b k1"], images: int, count: float | None = None
) -> Float[Tensor, ""]:
    """The loss of one side, mean over the batch, in nats.

    Args:
        scores: ``P``; the positive first, then K negatives.
        images: n of the data set; negatives are drawn with probability 1/n.
        count: what the sum over the batch is divided by, where it is a piece of a step; default: its images.
    """
    noise = (scores.shape[1] - 1) / images
    positive = scores[:, 0] / (scores[:, 0] + noise + EPSILON)
    negatives = noise / (scores[:, 1:] + noise + EPSILON)
    losses = -(positive.log() + negatives.log().sum(dim=1))
    return losses.mean() if count is None else losses.sum() / count


def available(classes: Int64[np.ndarray, " n"]) -> int:
    """How many negatives every image has: n less the largest class, or less the image itself."""
    return len(classes) - int(np.bincount(classes + 1, minlength=2)[1:].max(initial=1))


def draw_images(images: int, count: int, seed: int, step: int, device: torch.device) -> Int64[Tensor, " m"]:
    """Different images in random order, drawn where they are needed: the same of the same numbers on every device.

    The images of the smallest hashes of (seed, step, image): integers are the same everywhere.

    Args:
        images: to draw from.
        count: how many, at most ``images``.
        seed: of the run and teacher.
        step: how often was drawn before.
        device: where to draw them.
    """
    order = hashed(torch.arange(images, device=device), seed, step)
    drawn: Int64[Tensor, " m"] = order.topk(count, largest=False, sorted=True).indices
    return drawn


def draw_rows(
    index: Int64[Tensor, " b"], classes: Int64[Tensor, " n"], negatives: int, drawn: Int64[Tensor, " d"]
) -> tuple[Int64[Tensor, " m"], Int64[Tensor, "b k1"]]:
    """Rows of the banks for a batch, and which of them each image is contrasted with.

    So many different images are drawn for the whole batch that each image finds K of other classes among them, and
    takes the first K: they are different, and all that it may be contrasted with are equally probable.

    Args:
        index: of each image, in [0, n).
        classes: of all images; -1 is unknown, and then only the image itself is left out.
        negatives: K, from 1 to :func:`available`.
        drawn: different images in random order, at least n - ``available`` + K; whatever the batch holds, so that
            all processes of a run have the same.

    Returns:
        ``rows``, the batch's own and then those drawn; ``columns``, per image its own and its K negatives.
    """
    own = classes[index][:, None]
    other = (drawn != index[:, None]) & ((own < 0) | (classes[drawn] != own))
    # The k-th that fits goes to column k, all others to one column more, which is cut off: nobody waits to learn
    # how many fit.
    order = other.cumsum(dim=1)
    column = torch.where(other & (order <= negatives), order - 1, negatives)
    places = torch.arange(len(drawn), device=index.device).expand_as(column)
    chosen = column.new_zeros(len(index), negatives + 1).scatter(1, column, places)[:, :negatives]
    batch = torch.arange(len(index), device=index.device)[:, None]
    return torch.cat([index, drawn]), torch.cat([batch, chosen + len(index)], dim=1)


@final
class ContrastiveDistillation(nn.Module):
    """CRD between a student and one teacher: embeddings, banks, constants and random numbers.

    All of it is in ``state_dict``, so a run goes on from a checkpoint as if it had never stopped. In a process
    group every process holds equal banks: new embeddings are gathered before they are put in.

    Args:
        student_width: of the student's pooled features.
        teacher_width: of the teacher's.
        classes: of the n images of the data set, which are the rows of each bank; -1 where an image is contrasted
            with all others.
        options: dimensions, K from 1 to :func:`available`, tau and momentum.
    """

    def __init__(
        self, student_width: int, teacher_width: int, classes: Int64[np.ndarray, " n"], options: CrdOptions
    ) -> None:
        super().__init__()
        dim, negatives, images = options.crd_dim, options.crd_negatives, len(classes)
        if negatives > (most := available(classes)):
            raise ValueError(f"{negatives} negatives where images have {most}")
        self.student_embedding = nn.Linear(student_width, dim)
        self.teacher_embedding = nn.Linear(teacher_width, dim)
        bound = 1 / math.sqrt(dim / 3)  # as released; rows of zeros would have no direction to start from
        self.student_bank: Tensor
        self.teacher_bank: Tensor
        self.register_buffer("student_bank", torch.empty(images, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(images, dim).uniform_(-bound, bound))
        self.constants: Tensor  # Z of the student's and of the teacher's side; 0: not estimated yet
        self.register_buffer("constants", torch.zeros(2))
        self.classes: Tensor
        self.register_buffer("classes", torch.tensor(classes), persistent=False)  # follows from the plan
        self._images, self._negatives, self._candidates = images, negatives, images - most + negatives
        self._temperature, self._momentum = options.crd_temperature, options.crd_momentum
        self._seed, self._step, self._estimated = int(torch.randint(2**62, ())), 0, False

    def get_extra_state(self) -> Tensor:
        """Where the random numbers are, and whether Z is estimated: what the host knows of them."""
        return torch.tensor([self._seed, self._step, self._estimated])

    def set_extra_state(self, state: Tensor) -> None:
        """Undo :meth:`get_extra_state`."""
        self._seed, self._step, estimated = state.tolist()
        self._estimated = bool(estimated)

    def forward(
        self,
        student: Float[Tensor, "b ds"],
        teacher: Float[Tensor, "b dt"],
        index: Int64[Tensor, " b"],
        count: float | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch; puts its embeddings into the banks.

        Args:
            student: pooled features.
            teacher: pooled features, cached; no gradient flows into them.
            index: position of each image in the data set.
            count: see :func:`contrastive_loss`.
        """
        drawn = draw_images(self._images, self._candidates, self._seed, self._step, index.device)
        self._step += 1
        rows, columns = draw_rows(index, self.classes, self._negatives, drawn)
        return self.contrast(student, teacher, index, rows, columns, count)

    def contrast(
        self,
        student: Float[Tensor, "b ds"],
        teacher: Float[Tensor, "b dt"],
        index: Int64[Tensor, " b"],
        rows: Int64[Tensor, " m"],
        columns: Int64[Tensor, "b k1"],
        count: float | None = None,
    ) -> Float[Tensor, ""]:
        """:meth:`forward` with given rows of the banks, see :func:`draw_rows`."""
        with torch.autocast(index.device.type, enabled=False):
            ours = _embed(self.student_embedding, student)
            theirs = _embed(self.teacher_embedding, teacher.detach())
            scores = [
                contrastive_scores(embedding, bank[rows], columns, self._temperature)
                for embedding, bank in ((ours, self.teacher_bank), (theirs, self.student_bank))
            ]
            self._estimate_constants(scores)
            self._update(index, ours.detach(), theirs.detach())
            sides = [
                contrastive_loss(score / constant, self._images, count)
                for score, constant in zip(scores, self.constants, strict=True)
            ]
        return sides[0] + sides[1]

    @torch.no_grad()
    def _estimate_constants(self, scores: list[Tensor]) -> None:
        """Z = n times the mean score of the first batch, over all processes."""
        if self._estimated:
            return
        means = torch.stack([score.mean(dim=1) for score in scores], dim=1)
        (gathered,) = gather_rows(means)
        self.constants.copy_(gathered.mean(dim=0) * self._images)
        self._estimated = True

    @torch.no_grad()
    def _update(self, index: Tensor, ours: Tensor, theirs: Tensor) -> None:
        """Move the rows of the batch; of an image that comes twice, the last embedding counts."""
        index, ours, theirs = gather_rows(index, ours, theirs)
        places = torch.arange(len(index), device=index.device)
        last = torch.where(index[:, None] == index, places, -1).amax(dim=1)
        for bank, embedding in ((self.student_bank, ours[last]), (self.teacher_bank, theirs[last])):
            moved = self._momentum * bank[index] + (1 - self._momentum) * embedding
            bank[index] = functional.normalize(moved)


def _embed(layer: nn.Linear, features: Tensor) -> Tensor:
    return functional.normalize(layer(features.to(layer.weight.dtype)))


# --- for methods that have it -----------------------------------------------------------------


def contrasts(setup: Setup) -> dict[str, ContrastiveDistillation]:
    """CRD of each teacher."""
    if setup.data is None:
        raise ValueError("there are no images yet")
    width, classes = setup.opened().num_features, _told_apart(setup.options, setup.data.labels)
    return {
        name: ContrastiveDistillation(width, setup.teachers[name].num_features, classes, setup.options)
        for name in setup.weights
    }


def _told_apart(options: CrdOptions, labels: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Which images CRD takes to be alike; -1 for those that are like no other."""
    return labels if options.negatives == "other-classes" else np.full_like(labels, -1)


def fit_negatives(options: CrdOptions, labels: Int64[np.ndarray, " n"], method: str) -> CrdOptions:
    """An image has n - 1 others, or those of other classes, to be contrasted with.

    Raises:
        BadDataError: there is none.
    """
    most = available(_told_apart(options, labels))
    if options.crd_negatives <= most:
        return options
    if len(labels) < 2:
        raise BadDataError(
            f"{method} contrasts images with each other, and there is one image only",
            "Give more images, or use a method without CRD.",
        )
    if most < 1:
        raise BadDataError(
            f"{method} contrasts images with those of other classes, and all {len(labels)} images are of one",
            "Contrast them with any other image: --negatives other-images.",
        )
    console.note(
        f"CRD: {most} negatives an image instead of {options.crd_negatives}: not every one of the {len(labels)} "
        "images has more"
    )
    return options.model_copy(update={"crd_negatives": most})


def describe_crd(setup: Setup) -> str:
    """What is said of it at the start of a run."""
    options: CrdOptions = setup.options
    size = 2 * len(setup.weights) * setup.images * options.crd_dim * 4  # fp32, one bank for each side
    known = setup.data is not None and bool((setup.data.labels >= 0).any())
    negatives = {"other-images": "any other images", "other-classes": "images of other classes"}[
        options.negatives
    ]
    if options.negatives == "other-classes" and not known:
        negatives = "any other images, as none is labelled"
    return (
        f"CRD: weight {options.crd_weight:g}, {options.crd_negatives} negatives ({negatives}), temperature "
        f"{options.crd_temperature:g}, {options.crd_dim} dimensions; memory of {size / 1e6:.1f} MB"
    )
