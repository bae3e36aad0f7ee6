"""What every objective is: what it needs, what it adds to the student, and its loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from kdcli.methods.levels import Matching
from kdcli.models.student import StudentOutput
from kdcli.types import OutputKind, Ranking

TeacherOutputs = Mapping[str, Mapping[str, Tensor]]
"""Cached outputs of one batch: teacher name -> array name -> tensor [b, ...]."""

FROZEN = "frozen student"
"""Name of the frozen student's outputs where no cache holds them; no cached teacher's name has a space."""

LARGEST = ("topk_ids", "topk_values")
"""Arrays of a teacher's K largest logits: their classes, and the logits, the largest first."""


@final
@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there before an objective can run.

    Attributes:
        kinds: arrays that every teacher it uses must have in the cache; empty: no cache is needed.
        labels: whether some images must be labelled.
        ranking: whether a ranking of the teachers must be given.
        generalist: whether one cached teacher must be named as the generalist.
        unlabelled: whether unlabelled images are learnt from without any teacher.
        sets: whether it learns from several data sets, each with a name.
        classes: whether teachers and student must tell apart the same classes: the student's own classifier
            learns from their logits.
        frozen: whether it compares with the student as it was before training.
        largest: whether, of the logits, a teacher's ``top_classes`` largest (see :class:`Settings`) will do where
            not all of them are cached.
    """

    kinds: frozenset[OutputKind] = frozenset()
    labels: bool = False
    ranking: bool = False
    generalist: bool = False
    unlabelled: bool = False
    sets: bool = False
    classes: bool = False
    frozen: bool = False
    largest: bool = False


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """Numbers of a training run: a method's defaults, or what they and the user's choices resolve to.

    Attributes:
        optimizer: timm's name.
        lr: peak learning rate of the heads, > 0.
        backbone_lr_scale: the backbone's learning rate as a share of ``lr``, >= 0.
        momentum: of optimisers that have one.
        weight_decay: >= 0.
        decay_all: whether biases and normalisation parameters decay as well.
        schedule: how the learning rate falls.
        milestones: shares of the training at which ``step`` multiplies it by 0.1.
        warmup: share of the training in which it rises, linearly (``one-cycle``: along a cosine).
        epochs: passes over the data.
        batch_size: images per step.
        bn: ``frozen``: BatchNorm statistics are not updated; ``frozen-affine``: nor are its scale and shift.
        accumulate: pieces that a step's images are computed in, one after the other.
        clip_norm: largest norm of the gradient of all parameters together; None: as it comes.
        label_smoothing: share in [0, 1) of each label that is spread evenly over all classes.
        ema: decay of the moving average of the weights that is tested and exported; None: the weights are.
        temperature: softmax temperature T of both sides of the distillation term.
        label_weight: P2's lambda, in [0, 1], the weight of the labelled term.
        generalist_weight: P1's lambda_0, in [0, 2], the weight of head 0.
        unlabelled_ratio: unlabelled images per labelled one in a step, > 0; None where a step is one batch.
        unlabelled_includes_labelled: whether labelled images are among the unlabelled ones, too; None: no.
        threshold: confidence in [0, 1] from which FixMatch takes a prediction for a label.
        unlabelled_weight: FixMatch's lambda_u, >= 0.
        crd_weight: beta, >= 0, the weight of CRD beside the distillation term of a teacher.
        crd_negatives: CRD's K, >= 1; a plan leaves at most n - 1.
        crd_temperature: CRD's tau, > 0.
        crd_dim: CRD's dimensions.
        crd_momentum: share that CRD's memory keeps of a row, in [0, 1).
        kl_weight: P3's lambda, in [0, 1], the weight of the distillation term; labels have the rest.
        kl_direction: ``forward`` is KL(teacher || student).
        top_classes: classes that top-k KL compares, >= 1.
        mcl_tau: share that the slow copy keeps of itself in an update, in [0, 1).
        mcl_share: instead, how much of the way to the fast weights it goes in all updates, in (0, 1).
        mcl_every: steps between updates of the slow copy, >= 1; None: there is no such copy.
    """

    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    schedule: Literal["constant", "cosine", "step", "one-cycle"]
    milestones: tuple[float, ...] = (0.5, 0.8)
    warmup: float = 0.0
    backbone_lr_scale: float = 1.0
    momentum: float = 0.9
    decay_all: bool = False
    bn: Literal["train", "frozen", "frozen-affine"] = "train"
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    temperature: float = 1.0
    label_weight: float = 1.0
    generalist_weight: float = 0.0
    unlabelled_ratio: float | None = None
    unlabelled_includes_labelled: bool | None = None
    threshold: float = 0.95
    unlabelled_weight: float = 1.0
    crd_weight: float = 0.8
    crd_negatives: int = 16384
    crd_temperature: float = 0.07
    crd_dim: int = 128
    crd_momentum: float = 0.5
    kl_weight: float = 1.0
    kl_direction: Literal["forward", "reverse"] = "forward"
    top_classes: int = 10
    mcl_tau: float | None = None
    mcl_share: float | None = None
    mcl_every: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """From what a method derives the weight of each teacher.

    Attributes:
        teachers: names of the cached teachers to use.
        ranking: the ranking given, if any; its sources are among ``teachers`` where they matter.
        generalist: the teacher named as generalist, if any.
        generalist_weight: P1's lambda_0.
    """

    teachers: tuple[str, ...]
    ranking: Ranking | None
    generalist: str | None
    generalist_weight: float


@final
@dataclass(frozen=True, slots=True)
class Setup:
    """What an objective is made from.

    Attributes:
        classes: class count of every teacher that has a weight.
        weights: weight of each teacher, >= 0.
        settings: the resolved numbers.
        generalist: the teacher whose head is the network's own classifier, if any.
        split: whether some images are unlabelled; only then the distillation term leaves out the others.
        sets: class count of each data set, in the order in which they were given; empty where there is one.
        joint: whether the sets share one classifier over the union of their classes.
        images: number of images in the data set, the range of :attr:`Batch.index`.
        student_width: of the student's pooled features.
        teacher_widths: of those of every teacher that has a weight.
        columns: of each teacher that orders the same classes in another way, its number of each of them.
        frozen: the cached teacher that the frozen student is; None: the training loop runs it.
        matching: what is matched of a teacher's representation, with the shapes of both sides, if anything is.
        largest: teachers of whom :data:`LARGEST` is cached, and read, instead of all logits.
    """

    classes: Mapping[str, int]
    weights: Mapping[str, float]
    settings: Settings
    generalist: str | None = None
    split: bool = False
    sets: Mapping[str, int] = field(default_factory=dict)
    joint: bool = False
    images: int = 0
    student_width: int = 0
    teacher_widths: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: str | None = None
    matching: Matching | None = None
    largest: frozenset[str] = frozenset()


@final
@dataclass(frozen=True, slots=True)
class Mixed:
    """What the images of a batch are mixed with (MixUp, CutMix).

    Attributes:
        labels: class index of each image's partner; -1 is unlabelled, or no partner.
        own: lambda, the share of each image that is its own, from 0 to 1; 1 without a partner.
    """

    labels: Int64[Tensor, " b"]
    own: Float[Tensor, " b"]


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """Over how many images a mean goes, where a batch is one of several pieces of a step's images.

    Each is the number in the whole step (over all processes) divided by the number of pieces. A loss that
    divides its sums by them has, as mean over the pieces, the mean over the images, however unequal the
    pieces are; a mean over a piece's own images has not.

    Attributes:
        images: all.
        labelled: those with a label (of their own or of the image they are mixed with).
        unlabelled: those without one of their own.
        parts: of each batch that the step is made of, see :attr:`Batch.part`.
    """

    images: float
    labelled: float
    unlabelled: float
    parts: tuple[float, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """What an objective knows of a batch besides outputs.

    Attributes:
        labels: class indices; -1 is unlabelled.
        index: position of each image in the data set (stable over epochs).
        mixed: partners and shares, where the view mixes images; teachers saw the same mixtures.
        part: which of the batches that the step is made of each image belongs to, from 0; None where it
            is one batch. With several data sets, the number of its set.
        strong: whether a row is the strong view of an image, where images come in two views.
        counts: where this is one of several pieces of a step's images: over how many its means go.
    """

    labels: Int64[Tensor, " b"]
    index: Int64[Tensor, " b"]
    mixed: Mixed | None = None
    part: Int64[Tensor, " b"] | None = None
    strong: Bool[Tensor, " b"] | None = None
    counts: Counts | None = None

    def count(self, of: Literal["images", "labelled", "unlabelled"] | int) -> float | None:
        """What a loss divides its sum over these images, or those of a part, by; None: their number in this batch."""
        if self.counts is None:
            return None
        if isinstance(of, int):
            return self.counts.parts[of]
        return float(getattr(self.counts, of))


class Objective(nn.Module, ABC):
    """A loss over outputs of a student and its teachers. A module: what it trains is saved with a run."""

    @abstractmethod
    def heads(self) -> dict[str, int]:
        """Heads to add to the student's own classifier, name -> classes. Heads of weight 0 are not made."""

    @abstractmethod
    def active(self) -> tuple[str, ...]:
        """Names of the heads whose logits :meth:`forward` reads."""

    @abstractmethod
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Arrays to gather from the cache: teacher -> array names."""

    def taps(self) -> tuple[str, ...]:
        """Layers of the student whose feature maps :meth:`forward` reads."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """Lines that a run says at its start about what was made to fit the student."""
        return ()

    @abstractmethod
    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss`` to differentiate, and its parts, detached, to log."""


@final
@dataclass(frozen=True, slots=True)
class Method:
    """One entry of the registry: a name on the command line and what stands behind it.

    Attributes:
        name: value of ``--method``.
        paper: where it is from.
        equation: its formula there.
        description: one line.
        needs: what must be there first.
        defaults: the numbers it runs with unless told otherwise.
        options: fields of the configuration that change it beyond those every method has.
        recipe: of live views unless told otherwise.
        teacher_view: what the teachers saw unless told otherwise; with ``eval`` the student's live views are of
            ``recipe``, whatever the cache's is.
        weigh: weight of each teacher it uses; teachers of weight 0 are neither read nor given a head.
        build: makes the objective.
    """

    name: str
    paper: str
    equation: str
    description: str
    needs: Needs
    defaults: Settings
    weigh: Callable[[Choice], dict[str, float]]
    build: Callable[[Setup], Objective]
    options: frozenset[str] = field(default_factory=frozenset)
    recipe: str = "imagenet"
    teacher_view: Literal["same", "eval"] = "same"


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
        count: what their sum is divided by (see :class:`Counts`); default: their number.

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
        count: what the sum is divided by (see :class:`Counts`); default: the number of labelled rows.
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
