"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

import functools
from collections.abc import Mapping
from typing import final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.staging import Needs, stage
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import CacheMissingError, UsageError
from kdcli.methods.base import Method, Settings
from kdcli.methods.levels import Matching
from kdcli.methods.registry import METHODS
from kdcli.models.spec import ModelSpec
from kdcli.training.batches import ViewRule
from kdcli.training.classes import columns_of, require_method, shared_classes
from kdcli.training.config import StudentConfig
from kdcli.training.frozen import Frozen, choose_frozen, require_comparable
from kdcli.training.levels import choose_matching, with_convention
from kdcli.training.lower import Lower, choose_lower
from kdcli.training.plan import Pins, Plan, splits, turns_of
from kdcli.training.replay import Recording, require_partners
from kdcli.training.sets import (
    NamedSet,
    OpenData,
    labelled_only,
    open_sets,
    open_test,
    require_both,
    require_classes,
    require_sets,
    train_specs,
)
from kdcli.training.settings import (
    fit_batchnorm,
    fit_negatives,
    resolve_device,
    resolve_settings,
    settable,
    unused_by,
    without_unused,
)
from kdcli.training.student import NEAREST_SOURCE, Start, resolve_start
from kdcli.training.teachers import Teachers, choose_teachers, ranked_records, require_options
from kdcli.training.validation import split_off
from kdcli.training.views import choose_strong_views, choose_views
from kdcli.types import Ranking


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
    config: StudentConfig,
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
    _require_one_run(config)
    require_sets(config, method)
    ranked, ranking = ranking, ranking if "ranking" in method.options else None
    settings = resolve_settings(config, method.defaults)
    require_options(config, method, ranking)
    student = ModelSpec.parse(config.student)
    device = resolve_device(config, processes)
    cache = sources.cache(config.cache, config.verify) if config.cache else None
    teachers = None
    if cache is not None and method.needs.kinds:
        teachers = choose_teachers(config, method, settings, cache, ranking, pins.teachers, pins.largest)
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
    require_method(method, settings, shared_classes(method, teachers, data), rule.views.mixes)
    frozen, teachers = _freeze(config, method, settings, start, cache, teachers, data, rule, pins)
    matching = choose_matching(config, method, teachers, cache, data)
    recording, data = _record(config, method, settings, data, cache, teachers, lower, rule, frozen, matching)
    settings = fit_negatives(method, settings, len(data))
    if method.needs.labels:
        require_classes(data, main)
    if splits(settings):
        require_both(data, settings, main)
    sets = _open_sets(config, data, sources)
    if sets and config.label_space == "joint":
        data = sets[0].data
    test = None if sets else open_test(config, sources.data)
    named = {
        "data": tuple(f"{each.name}={each.data.location}" for each in sets) or everything.location,
        "test": tuple(f"{each.name}={each.test.location}" for each in sets if each.test) or None
        if sets
        else test and test.location,
        "student": str(student),
        **({} if frozen is None else {"frozen": frozen.place}),
        "init": NEAREST_SOURCE if config.init == NEAREST_SOURCE else start.init,
        "teacher": () if teachers is None else tuple(teachers.records),
        "recipe": rule.views.recipe,
    }
    config = _resolved(config, method, settings, named)
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


def _require_one_run(config: StudentConfig) -> None:
    if config.lr_grid is not None:
        raise UsageError(
            "--lr-grid makes several runs, and this is one", "Call kdcli.training.lr_grid.train_grid."
        )
    if config.sequential is not None:
        raise UsageError(
            "--sequential makes several runs, and this is one",
            "Call kdcli.training.sequential.train_sequence; in a sweep, give each student one teacher.",
        )


def _freeze(
    config: StudentConfig,
    method: Method,
    settings: Settings,
    start: Start,
    cache: CacheSet | None,
    teachers: Teachers | None,
    data: ImageData,
    rule: ViewRule,
    pins: Pins,
) -> tuple[Frozen | None, Teachers | None]:
    """The frozen student, if the method compares with one, and the teachers, of which it is none unless asked for."""
    if cache is None or teachers is None or not method.needs.frozen:
        return None, teachers
    require_comparable(method, data, cache)
    views = _views(method, settings, rule, cache)
    frozen = choose_frozen(config, start, cache, method.needs.kinds, data, views, pins.frozen)
    if frozen.teacher is not None and not config.teacher:
        teachers = teachers.without(frozen.teacher.name)
    return frozen, teachers


def _open_sets(config: StudentConfig, data: ImageData, sources: Sources) -> tuple[NamedSet, ...]:
    sets = open_sets(config, data, config.label_space == "joint", sources.data)
    for each, spec in zip(sets[1:], list(train_specs(config).values())[1:], strict=True):
        require_classes(each.data, spec)
    return sets


def _resolved(
    config: StudentConfig, method: Method, settings: Settings, named: Mapping[str, object]
) -> StudentConfig:
    """The configuration as a run records it: every number that its method uses, absolute paths."""
    return config.model_copy(
        update={
            **{name: getattr(settings, name) for name in settable() - unused_by(method)},
            **named,
            "old_new": None,  # it is in generalist_weight now
            "cache": tuple(path.absolute() for path in config.cache),
            "out": config.out.absolute(),
            "data_root": None if config.data_root is None else config.data_root.absolute(),
        }
    )


def _views(method: Method, settings: Settings, rule: ViewRule, cache: CacheSet) -> list[int]:
    """Views that the teachers are asked about."""
    turns = turns_of(settings, rule, splits(settings) or method.needs.sets)
    return sorted({rule.teacher(turn) for turn in range(turns)} & set(range(cache.view_count)))


def _record(
    config: StudentConfig,
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
    matched = () if matching is None else matching.arrays
    said = {} if teachers is None else teachers.arrays(method.needs)
    reads = {name: (*arrays, *matched) for name, arrays in said.items()}
    if frozen is not None and frozen.teacher is not None:
        reads[frozen.teacher.name] = tuple(sorted(method.needs.kinds))
    if lower is not None:
        reads = lower.with_maps(reads)
    if config.stage is not None:
        stage(cache, Needs(reads, rows, tuple(views)), config.stage)
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
