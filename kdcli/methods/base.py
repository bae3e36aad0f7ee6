"""What a method is: one object with its options, needs, defaults, checks, description, identity and loss.

docs/extending.md has an example. Training asks the object for everything; it knows no method's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.data.recipes import Recipe
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.declarations import Needs, Settings
from kdcli.methods.options import GeneralistOptions, MethodOptions, StreamOptions
from kdcli.models.adaptors import KeptAdaptor
from kdcli.models.arguments import Argument
from kdcli.models.spec import Model
from kdcli.models.student import LABEL_HEAD, StudentOutput
from kdcli.registry import METHODS
from kdcli.types import Ranking

__all__ = [
    "Average", "Choice", "Method", "Needs", "Objective", "Origin", "Settings", "Setup",
    "equal_shares", "find_method", "method_names",
]  # fmt: skip


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
        labels: how many classes, or labels, the labels of the data tell apart.
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
    labels: int = 0
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

    def apart(self) -> bool:
        """Whether the batches of a step (:attr:`Batch.part`) are mixed by no layer, BatchNorm included."""
        return False

    def relational(self) -> bool:
        """Whether it compares images with each other, so that a step's loss is no mean over pieces of its images.

        Then :meth:`forward` sees all images of a step at once, outputs with a gradient, also with ``accumulate``: the
        student goes through each piece twice (:mod:`kdcli.training.whole_step`).
        """
        return False

    def pooled(self) -> bool:
        """Whether :meth:`forward` reads the pooled features, or logits made of them; else maps alone."""
        return True

    def notes(self) -> tuple[str, ...]:
        """Lines that a run says at its start about what was made to fit the student."""
        return ()

    def settle(self) -> None:
        """Compute buffers of the cache that training does not change.

        Called once, by the first process, before the first step of a run that has no checkpoint; the others are given
        its :meth:`constants`.

        Raises:
            KdError: what is cached cannot be learnt from.
        """

    def constants(self) -> Sequence[Tensor]:
        """The buffers that :meth:`settle` computes."""
        return ()

    def compare(
        self, student: StudentOutput, teacher: TeacherOutputs
    ) -> Mapping[str, tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]]:
        """Where :meth:`Method.predicts`: by name ``TEACHER/ARRAY`` what is predicted of it, and what it is.

        Rows are vectors of an image, or cells of its map. Both are in the teacher's units, but for a rotation, and less
        the same centre, which their cosine is of.
        """
        return {}

    def kept_adaptors(self) -> Sequence[KeptAdaptor]:
        """Trained layers that predict a teacher's outputs from the student's, to be kept with the run."""
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
        needs: what must be there first, unless its options say otherwise: :meth:`needs_of`.
        defaults: the numbers it runs with unless told otherwise.
        recipe: of live views unless told otherwise; None: the cache's, or ``imagenet`` without one.
        teacher_view: what teachers saw unless told otherwise; with ``eval`` the student's views are live.
        ranked: whether a ranking, where one is given, says which teachers it learns from.
        spares: which of its needs an option does without, ``labels`` or ``logits``, and that option.
        scheme: name of P2's scheme of weighting that it stands for, if any.
        least: images of a step that it compares with each other: fewer are refused.
        tunes: whether ``defaults`` are for a student of trained weights, too slow for random ones.
    """

    tunes: ClassVar[bool] = False

    name: str
    paper: str
    equation: str
    summary: str
    Options: type[MethodOptions] = MethodOptions
    needs: Needs
    defaults: Settings
    recipe: str | None = None
    teacher_view: Literal["same", "eval"] = "same"
    ranked: bool = False
    scheme: str | None = None
    least: int = 1
    spares: Mapping[str, str] = field(default_factory=dict)

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

    def needs_of(self, options: Any) -> Needs:
        """What must be there first for a run with these options: less where a term of the loss has weight 0."""
        return self.needs

    def weigh(self, choice: Choice) -> dict[str, float]:
        """Weight of each teacher: by default the same for all. One of weight 0 is neither read nor given a head."""
        return equal_shares(choice.teachers) if self.needs.kinds else {}

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """What is read of each teacher: name -> arrays of the cache."""
        return dict.fromkeys(setup.weights, tuple(sorted(self.needs_of(setup.options).kinds)))

    def check(self, setup: Setup) -> Setup:
        """Refuse what the method cannot do, and decide what it decides, before any model is opened.

        Returns:
            The same, maybe with other options or teachers, and with :attr:`Setup.own`.

        Raises:
            KdError: what to do instead is its hint.
        """
        return setup

    def fit(self, options: Any, labels: Int64[np.ndarray, " n"]) -> Any:
        """Its options for images with these labels (-1: none); those without outputs of the teachers are left out."""
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

    def label_head(self, options: Any) -> str | None:
        """The student's head that learns from the labels of the data, if any does."""
        return LABEL_HEAD if self.needs_of(options).labels else None

    def predicts(self, options: Any) -> bool:
        """Whether features and maps of teachers are all that is learnt, and no class.

        The student has no classifier then, and held-out images, which need no labels, are judged by how near it comes
        to what is cached of their view 0 (:meth:`Objective.compare`).
        """
        return False

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
