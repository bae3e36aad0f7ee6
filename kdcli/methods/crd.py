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
* Negatives are any other images, labelled or not (ours, and all that unlabelled data leave: the released code draws
  them from other classes). One random draw serves all images of a batch (ours): the rows of K + 1 images are
  read once instead of b K times, and each image leaves itself out. No two of its negatives are the same row.
* Scores are fp32 whatever the student runs in: exp(1 / tau) is 1.6e6, and fp16 ends at 65504.
"""

import math
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kdcli.console import console
from kdcli.errors import BadDataError
from kdcli.methods.base import Setup
from kdcli.methods.gathering import gather_rows
from kdcli.methods.options import MethodOptions, method_option

EPSILON = 1e-7
"""Of the released code, beside K/n in both denominators."""


class CrdOptions(MethodOptions):
    """What CRD can be told, in every method that has it."""

    crd_weight: float = method_option(0.8, "Weight beta of CRD beside a teacher's other term.", ge=0)
    crd_negatives: int = method_option(16384, "Negatives of CRD, at most images - 1.", ge=1)
    crd_temperature: float = method_option(0.07, "Temperature of CRD's scores.", gt=0)
    crd_dim: int = method_option(128, "Dimensions of CRD's embeddings.", ge=1)
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


def draw_rows(
    index: Int64[Tensor, " b"], images: int, negatives: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " m"], Int64[Tensor, "b k1"]]:
    """Rows of the banks for a batch, and which of them each image is contrasted with.

    K + 1 different images are drawn for the whole batch. An image that is among them leaves itself out, any
    other leaves the last one out: each has K different negatives, every other image is one with equal
    probability, and K = n - 1 takes all of them.

    Args:
        index: of each image, in [0, images).
        images: n.
        negatives: K, in [1, n - 1].
        generator: on the CPU; it is asked for the same numbers whatever the batch holds, so that all processes of
            a run draw the same images.

    Returns:
        ``rows``, the batch's own and then those drawn; ``columns``, per image its own and its K negatives.
    """
    drawn = torch.randperm(images, generator=generator)[: negatives + 1].to(index.device)
    itself = drawn == index[:, None]
    left_out = torch.where(itself.any(dim=1), itself.int().argmax(dim=1), negatives)
    places = torch.arange(negatives, device=index.device)
    others = places + (places >= left_out[:, None])
    own = torch.arange(len(index), device=index.device)[:, None]
    return torch.cat([index, drawn]), torch.cat([own, others + len(index)], dim=1)


@final
class ContrastiveDistillation(nn.Module):
    """CRD between a student and one teacher: embeddings, banks, constants and random numbers.

    All of it is in ``state_dict``, so a run goes on from a checkpoint as if it had never stopped. In a process
    group every process holds equal banks: new embeddings are gathered before they are put in.

    Args:
        student_width: of the student's pooled features.
        teacher_width: of the teacher's.
        images: n of the data set, at least 2; rows of each bank.
        options: dimensions, K in [1, n - 1], tau and momentum.
    """

    def __init__(self, student_width: int, teacher_width: int, images: int, options: CrdOptions) -> None:
        super().__init__()
        dim, negatives = options.crd_dim, options.crd_negatives
        if negatives >= images:
            raise ValueError(f"{negatives} negatives among {images} images")
        self.student_embedding = nn.Linear(student_width, dim)
        self.teacher_embedding = nn.Linear(teacher_width, dim)
        bound = 1 / math.sqrt(dim / 3)  # as released; rows of zeros would have no direction to start from
        self.student_bank: Tensor
        self.teacher_bank: Tensor
        self.register_buffer("student_bank", torch.empty(images, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(images, dim).uniform_(-bound, bound))
        self.constants: Tensor  # Z of the student's and of the teacher's side; 0: not estimated yet
        self.register_buffer("constants", torch.zeros(2))
        self._images, self._negatives = images, negatives
        self._temperature, self._momentum = options.crd_temperature, options.crd_momentum
        self._generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def get_extra_state(self) -> Tensor:
        """The state of the random numbers."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Undo :meth:`get_extra_state`."""
        self._generator.set_state(state.cpu())

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
        rows, columns = draw_rows(index, self._images, self._negatives, self._generator)
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
        if bool((self.constants > 0).all()):
            return
        means = torch.stack([score.mean(dim=1) for score in scores], dim=1)
        self.constants.copy_(gather_rows(means).mean(dim=0) * self._images)

    @torch.no_grad()
    def _update(self, index: Tensor, ours: Tensor, theirs: Tensor) -> None:
        """Move the rows of the batch; of an image that comes twice, the last embedding counts."""
        index, ours, theirs = (gather_rows(values) for values in (index, ours, theirs))
        last = ~(index[:, None] == index).triu(diagonal=1).any(dim=1)
        index = index[last]
        for bank, embedding in ((self.student_bank, ours[last]), (self.teacher_bank, theirs[last])):
            moved = self._momentum * bank[index] + (1 - self._momentum) * embedding
            bank[index] = functional.normalize(moved)


def _embed(layer: nn.Linear, features: Tensor) -> Tensor:
    return functional.normalize(layer(features.to(layer.weight.dtype)))


# --- for methods that have it -----------------------------------------------------------------


def contrasts(setup: Setup) -> dict[str, ContrastiveDistillation]:
    """CRD of each teacher."""
    width = setup.opened().num_features
    return {
        name: ContrastiveDistillation(width, setup.teachers[name].num_features, setup.images, setup.options)
        for name in setup.weights
    }


def fit_negatives(options: CrdOptions, images: int, method: str) -> CrdOptions:
    """An image has n - 1 others to be contrasted with.

    Raises:
        BadDataError: there is one image only.
    """
    if options.crd_negatives < images:
        return options
    if images < 2:
        raise BadDataError(
            f"{method} contrasts images with each other, and there is one image only",
            "Give more images, or use a method without CRD.",
        )
    console.note(
        f"CRD: {images - 1} negatives instead of {options.crd_negatives}, as there are {images} images"
    )
    return options.model_copy(update={"crd_negatives": images - 1})


def describe_crd(setup: Setup) -> str:
    """What is said of it at the start of a run."""
    options: CrdOptions = setup.options
    size = 2 * len(setup.weights) * setup.images * options.crd_dim * 4  # fp32, one bank for each side
    return (
        f"CRD: weight {options.crd_weight:g}, {options.crd_negatives} negatives, temperature "
        f"{options.crd_temperature:g}, {options.crd_dim} dimensions; memory of {size / 1e6:.1f} MB"
    )
