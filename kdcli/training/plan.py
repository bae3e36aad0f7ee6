"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

import functools
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.staging import Needs
from kdcli.config import TrainConfig
from kdcli.data.sources import ImageData, open_data
from kdcli.data.views import ViewSet
from kdcli.errors import CacheMissingError, UsageError
from kdcli.models.network import Classifier
from kdcli.models.spec import ModelSpec
from kdcli.objectives.base import Method, Settings, Setup
from kdcli.objectives.levels import Matching
from kdcli.objectives.registry import METHODS
from kdcli.training.classes import columns_of, require_method, shared_classes
from kdcli.training.feed import ViewRule
from kdcli.training.freezing import Frozen, FrozenStudent, choose_frozen, require_comparable
from kdcli.training.lower import Lower, choose_lower
from kdcli.training.matching import choose_matching, with_convention
from kdcli.training.recorded import Recording, require_partners
from kdcli.training.sets import (
    NamedSet,
    OpenData,
    data_identity,
    labelled_only,
    open_sets,
    open_test,
    require_both,
    require_classes,
    require_sets,
    train_specs,
)
from kdcli.training.settings import (
    OFF,
    fit_batchnorm,
    fit_negatives,
    resolve_device,
    resolve_settings,
    settable,
    unused_by,
    without_unused,
)
from kdcli.training.student import NEAREST_SOURCE, Start, resolve_start
from kdcli.training.teachers import Teachers, choose_teachers, joint_id, ranked_records, require_options
from kdcli.training.validation import ON_TEST, split_off
from kdcli.training.viewing import choose_strong_views, choose_views
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

    config: TrainConfig
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
        return _splits(self.settings)

    @property
    def selects(self) -> bool:
        """Whether epochs are judged by something that may choose among them."""
        return self.validation is not None or self.config.select == ON_TEST

    @property
    def turns(self) -> int:
        """Passes over the data of which the views may be shown."""
        return _turns(self.settings, self.rule, self.split or bool(self.sets))

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
    """

    teachers: tuple[str, ...] = ()
    train_views: int | None = None
    frozen: str | None = None


@final
class Sources:
    """Opens data sets and caches, each of them once: several students share what they read.

    Args:
        data: opens a data set instead, for a caller that trains on some of its images.
    """

    def __init__(self, data: OpenData | None = None) -> None:
        self.data: OpenData = data or functools.cache(open_data)
        self.cache = functools.cache(CacheSet.open)


def make_plan(
    config: TrainConfig,
    ranking: Ranking | None = None,
    pins: Pins | None = None,
    processes: int = 1,
    sources: Sources | None = None,
) -> Plan:
    """Resolve and check a configuration.

    Args:
        config: what the user asked for.
        ranking: what ``config.ranking`` holds, already read.
        pins: what a run begun earlier understood by all cached teachers and views.
        processes: that share each step.
        sources: what other plans opened already.

    Raises:
        UsageError: options that contradict each other or the method.
        NotFoundError: a model, data set or teacher that cannot be had.
        BadDataError: data that the method cannot use.
        CacheMissingError: arrays or rows that are not cached, with the command that fills the gap.
        IdentityError: a cache of other images, or a ranking of other teachers.
        DeviceError: no such device, or one that cannot run at this precision.
    """
    method, pins, sources = METHODS[config.method], pins or Pins(), sources or Sources()
    config = with_convention(without_unused(config, method), method)
    config = config.model_copy(update={"teacher_view": config.teacher_view or method.teacher_view})
    if config.lr_grid is not None:
        raise UsageError(
            "--lr-grid makes several runs, and this is one", "Call kdcli.training.grid.train_grid."
        )
    if config.sequential is not None:
        raise UsageError(
            "--sequential makes several runs, and this is one",
            "Call kdcli.training.sequential.train_sequence; in a sweep, give each student one teacher.",
        )
    require_sets(config, method)
    ranked, ranking = ranking, ranking if "ranking" in method.options else None
    settings = resolve_settings(config, method.defaults)
    require_options(config, method, ranking)
    student = ModelSpec.parse(config.student)
    device = resolve_device(config, processes)
    cache = sources.cache(config.cache, config.verify) if config.cache else None
    teachers = None
    if cache is not None and method.needs.kinds:
        teachers = choose_teachers(config, method, settings, cache, ranking, pins.teachers)
    start = resolve_start(
        config.init,
        student,
        teachers.generalist if teachers is not None else None,
        lambda: ranked_records(ranked, cache, config),
    )
    settings = fit_batchnorm(config, settings, start.init)
    lower = choose_lower(config, start, cache)
    rule = choose_views(config, method, cache, pins.train_views)
    strong = choose_strong_views(config, rule) if "strong_recipe" in method.options else None
    main = next(iter(train_specs(config).values()), config.first_data)
    everything = sources.data(main, data_root=config.data_root, download=config.download)
    data = everything if method.needs.kinds or method.needs.unlabelled else labelled_only(everything)
    data, validation = split_off(config, method, data)
    columns_of(method, teachers, data)  # refuses teachers of other classes
    require_method(method, settings, shared_classes(method, teachers, data), processes, rule.views.mixes)
    frozen = None
    if cache is not None and teachers is not None and method.needs.frozen:
        require_comparable(method, data, cache)
        views = _views(method, settings, rule, cache)
        frozen = choose_frozen(config, start, cache, method.needs.kinds, data, views, pins.frozen)
        if frozen.teacher is not None and not config.teacher:
            teachers = teachers.without(frozen.teacher.name)
    matching = choose_matching(config, method, teachers, cache, data)
    recording, data = _record(config, method, settings, data, cache, teachers, lower, rule, frozen, matching)
    settings = fit_negatives(method, settings, len(data))
    if method.needs.labels:
        require_classes(data, main)
    if _splits(settings):
        require_both(data, settings, main)
    sets = open_sets(config, data, config.label_space == "joint", sources.data)
    for each, spec in zip(sets[1:], list(train_specs(config).values())[1:], strict=True):
        require_classes(each.data, spec)
    if sets and config.label_space == "joint":
        data = sets[0].data
    test = None if sets else open_test(config, sources.data)
    config = config.model_copy(
        update={
            **{name: getattr(settings, name) for name in settable() - unused_by(method)},
            "data": tuple(f"{each.name}={each.data.location}" for each in sets) or everything.location,
            "test": tuple(f"{each.name}={each.test.location}" for each in sets if each.test) or None
            if sets
            else test and test.location,
            "student": str(student),
            **({} if frozen is None else {"frozen": frozen.place}),
            "init": NEAREST_SOURCE if config.init == NEAREST_SOURCE else start.init,
            "old_new": None,  # it is in generalist_weight now
            "teacher": () if teachers is None else tuple(teachers.records),
            "cache": tuple(path.absolute() for path in config.cache),
            "recipe": rule.views.recipe,
            "out": config.out.absolute(),
            "data_root": None if config.data_root is None else config.data_root.absolute(),
        }
    )
    return Plan(
        config,
        method,
        settings,
        data,
        test,
        rule,
        recording,
        teachers,
        ranked if config.init == NEAREST_SOURCE else ranking,
        start,
        device,
        lower,
        validation,
        processes,
        strong,
        sets,
        frozen,
        matching,
    )


def _splits(settings: Settings) -> bool:
    return settings.unlabelled_ratio is not None or bool(settings.unlabelled_includes_labelled)


def _turns(settings: Settings, rule: ViewRule, several: bool) -> int:
    """The shorter of several streams is passed more often than there are epochs: any cached view may come."""
    return max(settings.epochs, rule.cached or 0) if several else settings.epochs


def _views(method: Method, settings: Settings, rule: ViewRule, cache: CacheSet) -> list[int]:
    """Views that the teachers are asked about."""
    turns = _turns(settings, rule, _splits(settings) or method.needs.sets)
    return sorted({rule.teacher(turn) for turn in range(turns)} & set(range(cache.view_count)))


def _record(
    config: TrainConfig,
    method: Method,
    settings: Settings,
    data: ImageData,
    cache: CacheSet | None,
    teachers: Teachers | None,
    lower: Lower | None,
    rule: ViewRule,
    frozen: Frozen | None,
    matching: Matching | None,
) -> tuple[Recording | None, ImageData]:
    """Find the data in the cache, and leave out what the teachers have no outputs for."""
    if cache is None:
        return None, data
    rows = cache.rows_of(data, check_content=False)  # the feed compares the bytes as it decodes them
    views = _views(method, settings, rule, cache)
    kinds = (*sorted(method.needs.kinds), *(matching.arrays if matching is not None else ()))
    reads = {} if teachers is None else dict.fromkeys(teachers.weights, kinds)
    if frozen is not None and frozen.teacher is not None:
        reads[frozen.teacher.name] = kinds
    if lower is not None:
        reads = lower.with_maps(reads)
    if config.stage is not None:
        cache.stage(Needs(reads, rows, tuple(views)), config.stage)
    usable = cache.require(reads, rows, views, config.allow_partial)
    if not usable.any():
        raise CacheMissingError(
            f"none of the {len(data)} images of {config.first_data} has cached outputs",
            "Run kd cache-teachers to its end, then train again.",
        )
    if not usable.all():
        kept = np.flatnonzero(usable)
        data, rows = data.select(kept), rows[kept]
    recording = Recording(cache, rows, {})
    if rule.recorded:
        require_partners(recording, data, rule.views, [view for view in views if view])
    return recording, data
