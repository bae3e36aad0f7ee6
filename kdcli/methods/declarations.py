"""What a method declares of itself: what it needs, and the numbers it runs with."""

from dataclasses import dataclass
from typing import Literal, final

from kdcli.types import OutputKind

Kind = OutputKind | Literal["maps"]
"""Of outputs; maps are arrays ``maps/TAP``, of which a method decides which it reads."""


@final
@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there before a method can run.

    Attributes:
        kinds: outputs that every teacher it uses must have in the cache; empty: no cache is needed.
        labels: whether some images must be labelled.
        ranking: whether a ranking of the teachers must be given.
        generalist: whether one cached teacher must be named as the generalist.
        unlabelled: whether unlabelled images are learnt from without any teacher.
        sets: whether it learns from several data sets, each with a name.
        classes: whether teachers and student must tell apart the same classes: the student's own classifier
            learns from their logits.
        same: whether teachers must tell apart the classes of the labels, which a new classifier of the student learns;
            with ``classes``, one that has as many classes goes on.
        frozen: whether it compares with the student as it was before training.
        largest: whether, of the logits, a teacher's K largest will do where not all of them are cached.
        several_labels: whether images may have several: only ``losses.label_loss`` sees them and their head's logits.
    """

    kinds: frozenset[Kind] = frozenset()
    labels: bool = False
    ranking: bool = False
    generalist: bool = False
    unlabelled: bool = False
    sets: bool = False
    classes: bool = False
    same: bool = False
    frozen: bool = False
    largest: bool = False
    several_labels: bool = False

    @property
    def only_labels(self) -> bool:
        """Whether nothing else is learnt from: the baseline that teachers are compared with."""
        return self == Needs(labels=True, several_labels=self.several_labels)

    @property
    def only_features(self) -> bool:
        """Whether features are all that it reads of teachers, beside labels."""
        return self.kinds == {"features"} and self.labels


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """The engine's numbers of a run: a method's defaults, or what they and the user's choices resolve to.

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
        final_lr_share: where ``one-cycle`` ends, as a share of the peak; None: 4e-6.
        epochs: passes over the data.
        batch_size: images per step.
        bn: ``frozen``: BatchNorm statistics are not updated; ``frozen-affine``: nor are its scale and shift.
        accumulate: pieces that a step's images are computed in, one after the other.
        clip_norm: largest norm of the gradient of all parameters together; None: as it comes.
        label_smoothing: share in [0, 1) of each label that is spread evenly over all classes.
        ema: decay of the moving average of the weights that is tested and exported; None: the weights are.
    """

    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    schedule: Literal["constant", "cosine", "step", "one-cycle"]
    milestones: tuple[float, ...] = (0.5, 0.8)
    warmup: float = 0.0
    final_lr_share: float | None = None
    backbone_lr_scale: float = 1.0
    momentum: float = 0.9
    decay_all: bool = False
    bn: Literal["train", "frozen", "frozen-affine"] = "train"
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
