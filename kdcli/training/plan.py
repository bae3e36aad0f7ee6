"""A plan: a run, decided but not begun. kdcli.training.resolve makes it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.geometry import OWN, EvalGeometry
from kdcli.methods.base import Average, Method, Needs, Settings, Setup
from kdcli.models.arguments import parse_arguments
from kdcli.precision import Precision
from kdcli.training.classes import Classes
from kdcli.training.config import StudentConfig
from kdcli.training.lower import Lower
from kdcli.training.replay import Recording, ViewRule
from kdcli.training.sets import NamedSet, data_identity
from kdcli.training.start import Start
from kdcli.training.teachers import Teachers, joint_id
from kdcli.training.validation import ON_TEST
from kdcli.types import Ranking

DEFAULT_RECIPE = "imagenet"


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A run, decided but not begun.

    Attributes:
        config: the configuration with every default filled in; written as config.yaml.
        method: what the student learns from.
        setup: the run as its method sees it.
        data: the images to train on; those without cached outputs are left out.
        test: images to test on, if any; labelled, unless teachers judge.
        rule: which view each epoch shows.
        recording: the open cache and the rows of ``data`` in it; None without a cache.
        teachers: who is used, with which weight; None without teachers.
        ranking: the ranking that gave the weights, if any.
        start: what the student starts from.
        device: where it runs.
        precision: how it computes there.
        classes: what the student's own classifier tells apart.
        labels: what the labels of ``data`` tell apart.
        lower: what the cache holds of the student's lower part, with ``--train-from``.
        validation: images that were set aside of ``data``, if any; likewise.
        processes: that share each step; BatchNorm and random numbers are each one's own.
        strong: makes the strong views, where the method compares two.
        sets: the data sets with their names, ``data`` the first; empty where there is one.
        dropped: images that were left out as they cannot be read, by location and key, with the reason.
        geometry: how view 0 and the images of tests are fitted to the student's input.
    """

    config: StudentConfig
    method: Method
    setup: Setup
    data: ImageData
    test: ImageData | None
    rule: ViewRule
    recording: Recording | None
    teachers: Teachers | None
    ranking: Ranking | None
    start: Start
    device: str
    precision: Precision
    classes: Classes
    labels: Classes
    lower: Lower | None = None
    validation: ImageData | None = None
    processes: int = 1
    strong: ViewSet | None = None
    sets: tuple[NamedSet, ...] = ()
    geometry: EvalGeometry = OWN
    dropped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The engine's numbers."""
        return self.setup.settings

    @property
    def needs(self) -> Needs:
        """What the method needs with its options."""
        return self.method.needs_of(self.setup.options)

    @property
    def init(self) -> str:
        """``pretrained``, ``random``, ``xavier`` or the spec of the model that the student starts from."""
        return self.start.init

    @property
    def joint(self) -> bool:
        """Whether several data sets share one classifier."""
        return self.method.joint(self.setup.options)

    @property
    def predicts(self) -> bool:
        """Whether held-out images are judged by what teachers gave for them, see :meth:`Method.predicts`."""
        return self.method.predicts(self.setup.options)

    @property
    def unlabelled_ratio(self) -> float | None:
        """Unlabelled images per labelled one, where they come in batches of their own."""
        return self.method.unlabelled_ratio(self.setup.options)

    @property
    def repeats_labelled(self) -> bool:
        """Whether labelled images are among the unlabelled ones, too."""
        return self.method.repeats_labelled(self.setup.options)

    @property
    def split(self) -> bool:
        """Whether labelled and unlabelled images come in batches of their own."""
        return self.unlabelled_ratio is not None

    @property
    def selects(self) -> bool:
        """Whether epochs are judged by something that may choose among them."""
        return self.validation is not None or self.config.select == ON_TEST

    @property
    def turns(self) -> int:
        """Passes over the data of which the views may be shown."""
        return turns_of(self.settings.epochs, self.rule, self.split or bool(self.sets))

    @property
    def cache_id(self) -> str | None:
        """Identity of the cache (of several: joined by commas)."""
        return None if self.recording is None else joint_id(self.recording.cache.cache_ids)

    @property
    def average(self) -> Average | None:
        """The average of the student's weights that is part of the method, if one is."""
        return self.method.average(self.setup)

    def identity(self) -> dict[str, Any]:
        """What makes this run this run, as JSON: two runs of equal identity have equal results."""
        config, teachers = self.config, self.teachers
        records = {} if teachers is None else teachers.records
        return {
            **self.method.identity(self.setup),
            "method": self.method.name,
            "student": config.student,
            "init": self.init,
            "image_size": config.image_size,
            "model_args": parse_arguments(config.model_arg),
            "eval_geometry": str(self.geometry),
            **asdict(self.settings),
            "processes": self.processes,
            "seed": config.seed,
            "data_seed": config.data_seed,
            **self.precision.document(),
            "views": self.rule.views.document(),
            "strong_views": None if self.strong is None else self.strong.document(),
            "teacher_view": config.teacher_view,
            "multi_label": config.multi_label,
            "data": data_identity(self.data),
            "test": None if self.test is None else data_identity(self.test),
            "set_names": [each.name for each in self.sets],
            "sets": {each.name: data_identity(each.data) for each in self.sets},
            "tests": {each.name: data_identity(each.test) for each in self.sets if each.test},
            "cache_id": self.cache_id,
            "teachers": {name: record.id for name, record in records.items()},
            "weights": {} if teachers is None else dict(teachers.weights),
            "freeze": config.freeze,
            "started_from": None if self.start.record is None else self.start.record.id,
            "train_from": config.train_from
            if self.lower is None
            else f"{self.lower.tap} of {self.lower.teacher.id}",
            "validation": config.validation,
            "select": config.select if self.selects else None,
        }


@final
@dataclass(frozen=True, slots=True)
class Pins:
    """What a run that was begun earlier keeps to, though the cache may hold more by now.

    Attributes:
        teachers: the cached ones it uses.
        train_views: how many training views it cycles through.
        identity: all of its identity, for its method; empty for a new run.
        dropped: what it left out, see :class:`Plan`.
    """

    teachers: tuple[str, ...] = ()
    train_views: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def turns_of(epochs: int, rule: ViewRule, several: bool) -> int:
    """Passes over the data of which the views may be shown.

    The shorter of several streams is passed more often than there are epochs: any cached view may come.
    """
    return max(epochs, rule.cached or 0) if several else epochs
