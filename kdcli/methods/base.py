"""What a method is: one object with its options, needs, defaults, checks, description, identity and loss.

docs/extending.md has an example. Training asks the object for everything; it knows no method's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from torch import Tensor, nn

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.data.recipes import Recipe
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.options import GeneralistOptions, MethodOptions, StreamOptions
from kdcli.models.arguments import Argument
from kdcli.models.spec import Model
from kdcli.models.student import StudentOutput
from kdcli.registry import METHODS
from kdcli.types import OutputKind, Ranking


@final
@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there before a method can run.

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
        largest: whether, of the logits, a teacher's K largest will do where not all of them are cached.
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

    @property
    def only_labels(self) -> bool:
        """Whether nothing else is learnt from: the baseline that teachers are compared with."""
        return self == Needs(labels=True)

    @property
    def only_features(self) -> bool:
        """Whether features are all that it reads of teachers."""
        return self.kinds == {"features"}


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
    backbone_lr_scale: float = 1.0
    momentum: float = 0.9
    decay_all: bool = False
    bn: Literal["train", "frozen", "frozen-affine"] = "train"
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """From what a method derives the weight of each teacher.

    Attributes:
        teachers: names of the cached teachers to use.
        ranking: the ranking given, if any; its sources are among ``teachers`` where they matter.
        options: the method's.
    """

    teachers: tuple[str, ...]
    ranking: Ranking | None = None
    options: Any = None


@final
@dataclass(frozen=True, slots=True)
class Average:
    """A moving average of the student's weights, which is what is tested and exported.

    Attributes:
        decay: share that the average keeps of itself in an update, in [0, 1).
        every: steps between updates, >= 1.
        rising: whether the decay rises to its value: the average of a short run is then not that of its first weights.
    """

    decay: float
    every: int = 1
    rising: bool = False


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """What the student is before training, as far as it was asked for.

    Attributes:
        student: its model spec.
        start: spec of the model whose weights it starts from.
        trained: whether these are trained weights.
        image_size: in pixels; None: the model's own.
        arguments: of its library's constructor.
        freeze: the part that does not train, if any.
        train_from: the tap up to which it stays as it starts, its maps read from the cache.
    """

    student: str = ""
    start: str = ""
    trained: bool = True
    image_size: int | None = None
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    freeze: str | None = None
    train_from: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Setup:
    """A run as its method sees it, decided but not begun.

    Attributes:
        options: the method's.
        settings: the engine's numbers.
        weights: of each teacher that is read, > 0.
        teachers: what the cache knows of them, and of the generalist.
        asked: the teachers that were asked for by name; empty: all.
        data: the images to train on; those without cached outputs are still among them when it is checked.
        cache: where the teachers are.
        views: numbers of the views that teachers are asked about.
        teacher_view: ``same``: teachers saw the student's view; ``eval``: the clean view 0.
        mixes: whether the student's views mix images.
        recipe: of the student's training views.
        classes: how many the student's own classifier tells apart.
        columns: of each teacher that orders the same classes in another way, its number of each of them.
        split: whether some images are unlabelled; only then a distillation term may leave out the others.
        sets: class count of each data set, in the order in which they were given; empty where there is one.
        origin: what the student starts as.
        steps: of the whole training; 0 while it is checked.
        before: identity of the run that is gone on with; empty for a new one.
        own: whatever the method decided in :meth:`Method.check`.
        model: the open student; only there when the objective is built.
    """

    options: Any
    settings: Settings
    weights: Mapping[str, float] = field(default_factory=dict)
    teachers: Mapping[str, TeacherRecord] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    data: ImageData | None = None
    cache: CacheSet | None = None
    views: tuple[int, ...] = ()
    teacher_view: Literal["same", "eval"] = "same"
    mixes: bool = False
    recipe: Recipe | None = None
    classes: int = 0
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    split: bool = False
    sets: Mapping[str, int] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    steps: int = 0
    before: Mapping[str, Any] = field(default_factory=dict)
    own: Any = None
    model: Model | None = None

    @property
    def images(self) -> int:
        """How many there are: the range of :attr:`Batch.index`."""
        return 0 if self.data is None else len(self.data)

    @property
    def shares(self) -> str:
        """The teachers and their weights, to be told."""
        return ", ".join(f"{name} {weight:.4g}" for name, weight in self.weights.items())

    def opened(self) -> Model:
        """The open student, for :meth:`Method.build`."""
        if self.model is None:
            raise ValueError("the student is not open yet")
        return self.model


class Objective(nn.Module, ABC):
    """A loss over outputs of a student and its teachers. A module: what it trains is saved with a run."""

    def heads(self) -> dict[str, int]:
        """Heads to add to the student's own classifier, name -> classes. Heads of weight 0 are not made."""
        return {}

    @abstractmethod
    def active(self) -> tuple[str, ...]:
        """Names of the heads whose logits :meth:`forward` reads."""

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Arrays to gather from the cache: teacher -> array names."""
        return {}

    def taps(self) -> tuple[str, ...]:
        """Layers of the student whose feature maps :meth:`forward` reads."""
        return ()

    def live(self) -> Mapping[str, nn.Module]:
        """Networks that are run beside the student, on its normalised images and their labels.

        Each gives arrays as a cache holds them, which :meth:`forward` finds under its name among the teachers.
        """
        return {}

    def notes(self) -> tuple[str, ...]:
        """Lines that a run says at its start about what was made to fit the student."""
        return ()

    @abstractmethod
    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """Scalars: ``loss`` to differentiate, and its parts, detached, to log."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Method(ABC):
    """A value of ``--method``, and all that is to be known of it.

    Attributes:
        name: as it is typed.
        paper: where it is from.
        equation: its formula there.
        summary: one line.
        Options: its options, on the command line beside those of every run.
        needs: what must be there first.
        defaults: the numbers it runs with unless told otherwise.
        recipe: of live views unless told otherwise.
        teacher_view: what the teachers saw unless told otherwise; with ``eval`` the student's live views are of
            ``recipe``, whatever the cache's is.
        ranked: whether a ranking, where one is given, says which teachers it learns from.
        scheme: name of P2's scheme of weighting that it stands for, if any.
    """

    name: str
    paper: str
    equation: str
    summary: str
    Options: type[MethodOptions] = MethodOptions
    needs: Needs
    defaults: Settings
    recipe: str = "imagenet"
    teacher_view: Literal["same", "eval"] = "same"
    ranked: bool = False
    scheme: str | None = None

    @property
    def example(self) -> str:
        """A command that runs it."""
        needs = self.needs
        words = [
            "kd train-student",
            "a=DATA b=DATA" if needs.sets else "DATA",
            "--student SPEC",
            *(["--cache CACHE"] if needs.kinds else []),
            *(["--ranking ranking.json"] if needs.ranking else []),
            *(["--generalist NAME"] if needs.generalist else []),
            f"--method {self.name} --out OUT",
        ]
        return " ".join(words)

    def weigh(self, choice: Choice) -> dict[str, float]:
        """Weight of each teacher: by default the same for all. One of weight 0 is neither read nor given a head."""
        return equal_weights(choice) if self.needs.kinds else {}

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """What is read of each teacher: name -> arrays of the cache."""
        return dict.fromkeys(setup.weights, tuple(sorted(self.needs.kinds)))

    def check(self, setup: Setup) -> Setup:
        """Refuse what the method cannot do, and decide what it decides, before any model is opened.

        Returns:
            The same, maybe with other options or teachers, and with :attr:`Setup.own`.

        Raises:
            KdError: what to do instead is its hint.
        """
        return setup

    def fit(self, options: Any, images: int) -> Any:
        """Its options for so many images, those without outputs of the teachers left out."""
        return options

    def describe(self, setup: Setup) -> list[str]:
        """What is said at the start of a run besides data, student and the engine's numbers."""
        return [f"teachers: {setup.shares}"] if setup.weights else []

    def identity(self, setup: Setup) -> dict[str, Any]:
        """What of the method makes a run this run, as JSON: by default its options."""
        document: dict[str, Any] = setup.options.model_dump(mode="json")
        return document

    @abstractmethod
    def build(self, setup: Setup) -> Objective:
        """The objective; random numbers are those of the run's seed. ``setup.model`` is open."""

    def average(self, setup: Setup) -> Average | None:
        """The average of the student's weights that is part of the method, if one is."""
        return None

    def generalist(self, options: Any) -> str | None:
        """The teacher that the student starts from and whose head is the classifier, if any."""
        return options.generalist if isinstance(options, GeneralistOptions) else None

    def unlabelled_ratio(self, options: Any) -> float | None:
        """Unlabelled images per labelled one, where they come in batches of their own."""
        if not isinstance(options, StreamOptions):
            return None
        separate = options.unlabelled_ratio is not None or bool(options.unlabelled_includes_labelled)
        return (options.unlabelled_ratio or 1.0) if separate else None

    def repeats_labelled(self, options: Any) -> bool:
        """Whether labelled images are among the unlabelled ones, too."""
        return isinstance(options, StreamOptions) and bool(options.unlabelled_includes_labelled)

    def joint(self, options: Any) -> bool:
        """Whether several data sets share one classifier over the union of their classes."""
        return False

    def strong_views(self, options: Any, weak: ViewSet) -> ViewSet | None:
        """Where the method compares two views of an image: the other one."""
        return None


def equal_weights(choice: Choice) -> dict[str, float]:
    """The same weight for every teacher."""
    return equal_shares(choice.teachers)


def equal_shares(names: Sequence[str]) -> dict[str, float]:
    """1/N for each of N teachers."""
    return dict.fromkeys(names, 1 / len(names))


def find_method(name: str) -> Method:
    """The method of a name or ``pkg.mod:OBJECT``.

    Raises:
        UsageError: there is none, or the object is none.
        NotFoundError: there is no such module or object.
    """
    found: Method = METHODS.find(name)
    return found


def method_names(trait: str) -> tuple[str, ...]:
    """Names of the registered methods whose :class:`Needs` have a trait, such as ``only_labels``."""
    return tuple(name for name in METHODS if getattr(find_method(name).needs, trait))
