"""A plan: a run, decided but not begun. kdcli.training.resolve makes it."""

from dataclasses import asdict, dataclass
from typing import Any, final

from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.methods.base import Method, Settings, Setup
from kdcli.methods.levels import Matching
from kdcli.models.network import Classifier
from kdcli.training.batches import ViewRule
from kdcli.training.classes import columns_of, shared_classes
from kdcli.training.config import StudentConfig
from kdcli.training.frozen import Frozen, FrozenStudent
from kdcli.training.lower import Lower
from kdcli.training.replay import Recording
from kdcli.training.sets import NamedSet, data_identity
from kdcli.training.settings import OFF, unused_by
from kdcli.training.student import Start
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
        method: entry of the registry.
        settings: its numbers.
        data: the images to train on; those without cached outputs are left out.
        test: labelled images to test on, if any.
        rule: which view each epoch shows.
        recording: the open cache and the rows of ``data`` in it; None without a cache.
        teachers: who is used, with which weight; None without teachers.
        ranking: the ranking that gave the weights, if any.
        start: what the student starts from.
        device: where it runs.
        lower: what the cache holds of the student's lower part, with ``--train-from``.
        validation: labelled images that were set aside of ``data``, if any.
        processes: that share each step; BatchNorm and random numbers are each one's own.
        strong: makes the strong views, where the method compares two.
        sets: the data sets with their names, ``data`` the first; empty where there is one.
        frozen: where the frozen student comes from, if the method compares with it.
        matching: what is matched of the teacher's representation, with ``mlfd``.
    """

    config: StudentConfig
    method: Method
    settings: Settings
    data: ImageData
    test: ImageData | None
    rule: ViewRule
    recording: Recording | None
    teachers: Teachers | None
    ranking: Ranking | None
    start: Start
    device: str
    lower: Lower | None = None
    validation: ImageData | None = None
    processes: int = 1
    strong: ViewSet | None = None
    sets: tuple[NamedSet, ...] = ()
    frozen: Frozen | None = None
    matching: Matching | None = None

    @property
    def init(self) -> str:
        """``pretrained``, ``random``, ``xavier`` or the spec of the model that the student starts from."""
        return self.start.init

    @property
    def joint(self) -> bool:
        """Whether several data sets share one classifier."""
        return self.config.label_space == "joint"

    @property
    def split(self) -> bool:
        """Whether labelled and unlabelled images come in batches of their own."""
        return splits(self.settings)

    @property
    def selects(self) -> bool:
        """Whether epochs are judged by something that may choose among them."""
        return self.validation is not None or self.config.select == ON_TEST

    @property
    def turns(self) -> int:
        """Passes over the data of which the views may be shown."""
        return turns_of(self.settings, self.rule, self.split or bool(self.sets))

    @property
    def num_classes(self) -> int:
        """Width of the student's own classifier."""
        if self.teachers is not None and self.teachers.generalist is not None:
            return int(self.teachers.generalist.num_classes)
        if (space := shared_classes(self.method, self.teachers, self.data)) is not None:
            return space.count
        names = self.data.class_names
        return len(names) if names is not None else int(self.data.labels.max()) + 1

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classifier's classes, where known."""
        if self.teachers is not None and self.teachers.generalist is not None:
            return self.teachers.generalist.class_names
        space = shared_classes(self.method, self.teachers, self.data)
        return self.data.class_names if space is None else space.names

    @property
    def cache_id(self) -> str | None:
        """Identity of the cache (of several: joined by commas)."""
        return None if self.recording is None else joint_id(self.recording.cache.cache_ids)

    def freeze(self, network: Classifier) -> FrozenStudent | None:
        """A copy of the student's network as it starts, where the training loop has to run it."""
        live = self.frozen is not None and self.frozen.teacher is None
        return FrozenStudent(network) if live else None

    def setup(self, student_width: int = 0, matching: Matching | None = None) -> Setup:
        """What the objective is made from.

        Args:
            student_width: of the student's pooled features; only known once it is open, only CRD asks.
            matching: :attr:`matching` with the student's shapes; likewise, only mlfd asks.
        """
        teachers = self.teachers
        records = {} if teachers is None else teachers.records
        return Setup(
            classes={name: record.num_classes for name, record in records.items()},
            # By name: the order of a ranking must not decide which head draws which weights.
            weights={} if teachers is None else dict(sorted(teachers.weights.items())),
            settings=self.settings,
            generalist=teachers.generalist.name if teachers and teachers.generalist else None,
            split=self.split or bool((self.data.labels < 0).any()),
            sets={each.name: each.classes for each in self.sets},
            joint=self.joint,
            images=len(self.data),
            student_width=student_width,
            teacher_widths={name: record.num_features for name, record in records.items()},
            columns=columns_of(self.method, teachers, self.data),
            frozen=self.frozen.teacher.name if self.frozen and self.frozen.teacher else None,
            matching=matching,
            largest=frozenset() if teachers is None else frozenset(teachers.largest),
        )

    def identity(self) -> dict[str, Any]:
        """What makes this run this run, as JSON: two runs of equal identity have equal results."""
        config, teachers = self.config, self.teachers
        numbers = asdict(self.settings)
        for name in unused_by(self.method) & numbers.keys():
            del numbers[name]
        for (
            name,
            off,
        ) in OFF.items():  # not told of where it does nothing: runs begun before it existed go on
            if numbers.get(name, off) == off:
                numbers.pop(name, None)
        if self.processes > 1:
            numbers["processes"] = self.processes
        return {
            "method": self.method.name,
            "student": config.student,
            "init": self.init,
            "image_size": config.image_size,
            **numbers,
            "milestones": list(self.settings.milestones),
            "seed": config.seed,
            "data_seed": config.data_seed,
            "amp": config.amp,
            "views": self.rule.views.document(),
            "teacher_view": config.teacher_view,
            "data": data_identity(self.data),
            "test": None if self.test is None else data_identity(self.test),
            "cache_id": self.cache_id,
            "teachers": {}
            if teachers is None
            else {name: record.id for name, record in teachers.records.items()},
            "weights": {} if teachers is None else dict(teachers.weights),
            "generalist": teachers.generalist.name if teachers and teachers.generalist else None,
            "freeze": config.freeze,
            "started_from": None if self.start.record is None else self.start.record.id,
            "train_from": None if self.lower is None else f"{self.lower.tap} of {self.lower.teacher.id}",
            "validation": config.validation,
            "select": config.select if self.selects else None,
            **self._identity_of_streams(),
            **({} if self.matching is None else self.matching.document()),
        }

    def _identity_of_streams(self) -> dict[str, Any]:
        # Keys that runs with one batch a step do not have: those begun before them go on.
        found: dict[str, Any] = {}
        if self.frozen is not None:
            teacher = self.frozen.teacher
            found["frozen"] = self.frozen.place
            found["frozen_teacher"] = None if teacher is None else teacher.id
        if self.teachers is not None and self.teachers.largest:
            found["largest_logits"] = dict(sorted(self.teachers.largest.items()))
        if self.method.name == "cd":  # similarities are those within a piece
            found["contrasted"] = self.settings.batch_size // self.settings.accumulate
        if self.strong is not None:
            found["strong_views"] = self.strong.document()
        if self.sets:
            found["set_names"] = [each.name for each in self.sets]
            found["label_space"] = "joint" if self.joint else "separate"
            found["sets"] = {each.name: data_identity(each.data) for each in self.sets}
            found["tests"] = {each.name: data_identity(each.test) for each in self.sets if each.test}
        return found


@final
@dataclass(frozen=True, slots=True)
class Pins:
    """What a run that was begun earlier keeps to, though the cache may hold more by now.

    Attributes:
        teachers: the cached ones it uses.
        train_views: how many training views it cycles through.
        frozen: where the frozen student came from.
        largest: teachers of whom it reads the largest logits.
    """

    teachers: tuple[str, ...] = ()
    train_views: int | None = None
    frozen: str | None = None
    largest: tuple[str, ...] = ()


def splits(settings: Settings) -> bool:
    """Whether labelled and unlabelled images come in batches of their own."""
    return settings.unlabelled_ratio is not None or bool(settings.unlabelled_includes_labelled)


def turns_of(settings: Settings, rule: ViewRule, several: bool) -> int:
    """Passes over the data of which the views may be shown.

    The shorter of several streams is passed more often than there are epochs: any cached view may come.
    """
    return max(settings.epochs, rule.cached or 0) if several else settings.epochs
