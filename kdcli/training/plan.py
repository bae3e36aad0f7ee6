"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

import functools
import hashlib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import as_pixels, require_same_pixels
from kdcli.cache.staging import Needs
from kdcli.config import TrainConfig
from kdcli.console import console
from kdcli.data.sources import ImageData, open_data
from kdcli.data.views import ViewSet
from kdcli.errors import BadDataError, CacheMissingError, DeviceError, UsageError, nearest
from kdcli.models.spec import ModelSpec
from kdcli.objectives.base import Method, Settings, Setup
from kdcli.objectives.registry import METHODS
from kdcli.runtime import pick_device
from kdcli.training.feed import ViewRule
from kdcli.training.lower import Lower, choose_lower
from kdcli.training.recorded import Recording, require_partners
from kdcli.training.schedule import ONE_CYCLE_WARMUP
from kdcli.training.student import NEAREST_SOURCE, UNTRAINED, Start, resolve_start
from kdcli.training.teachers import Teachers, choose_teachers, joint_id, ranked_records, require_options
from kdcli.training.validation import split_off
from kdcli.types import Ranking

DEFAULT_RECIPE = "imagenet"
_OFF = {"accumulate": 1, "clip_norm": None, "label_smoothing": 0.0, "ema": None}
"""Options of the engine, and the values that leave a run as it is without them."""
_METHOD_OPTIONS = ("teacher", "ranking", "generalist", "temperature", "label_weight", "generalist_weight")


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

    @property
    def init(self) -> str:
        """``pretrained``, ``random``, ``xavier`` or the spec of the model that the student starts from."""
        return self.start.init

    @property
    def num_classes(self) -> int:
        """Width of the student's own classifier."""
        if self.teachers is not None and self.teachers.generalist is not None:
            return int(self.teachers.generalist.num_classes)
        names = self.data.class_names
        return len(names) if names is not None else int(self.data.labels.max()) + 1

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classifier's classes, where known."""
        if self.teachers is not None and self.teachers.generalist is not None:
            return self.teachers.generalist.class_names
        return self.data.class_names

    @property
    def cache_id(self) -> str | None:
        """Identity of the cache (of several: joined by commas)."""
        return None if self.recording is None else joint_id(self.recording.cache.cache_ids)

    def setup(self) -> Setup:
        """What the objective is made from."""
        teachers = self.teachers
        return Setup(
            classes={} if teachers is None else {name: r.num_classes for name, r in teachers.records.items()},
            weights={} if teachers is None else teachers.weights,
            settings=self.settings,
            generalist=teachers.generalist.name if teachers and teachers.generalist else None,
            split=bool((self.data.labels < 0).any()),
        )

    def identity(self) -> dict[str, Any]:
        """What makes this run this run, as JSON: two runs of equal identity have equal results."""
        config, teachers = self.config, self.teachers
        numbers = asdict(self.settings)
        for name in _unused(self.method) & numbers.keys():
            del numbers[name]
        for (
            name,
            off,
        ) in _OFF.items():  # not told of where it does nothing: runs begun before it existed go on
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
            "data": _data_identity(self.data),
            "test": None if self.test is None else _data_identity(self.test),
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
            "select": config.select if self.validation is not None else None,
        }


@final
@dataclass(frozen=True, slots=True)
class Pins:
    """What a run that was begun earlier keeps to, though the cache may hold more by now.

    Attributes:
        teachers: the cached ones it uses.
        train_views: how many training views it cycles through.
    """

    teachers: tuple[str, ...] = ()
    train_views: int | None = None


@final
class Sources:
    """Opens data sets and caches, each of them once: several students share what they read."""

    def __init__(self) -> None:
        self.data = functools.cache(open_data)
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
    config = _without_unused(config, method)
    if config.lr_grid is not None:
        raise UsageError(
            "--lr-grid makes several runs, and this is one", "Call kdcli.training.grid.train_grid."
        )
    ranked, ranking = ranking, ranking if "ranking" in method.options else None
    settings = _settings(config, method.defaults)
    require_options(config, method, ranking)
    student = ModelSpec.parse(config.student)
    device = _device(config, processes)
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
    settings = _fit_batchnorm(config, settings, start.init)
    lower = choose_lower(config, start, cache)
    rule = _views(config, cache, pins.train_views)
    everything = sources.data(config.data, data_root=config.data_root, download=config.download)
    data = everything if method.needs.kinds else _labelled(everything)
    data, validation = split_off(config, method, data)
    recording, data = _record(config, method, settings, data, cache, teachers, lower, rule)
    if method.needs.labels:
        _require_classes(data, config.data)
    test = _test_data(config, sources)
    config = config.model_copy(
        update={
            **{name: getattr(settings, name) for name in _numbers() - _unused(method)},
            "data": everything.location,
            "test": None if test is None else test.location,
            "student": str(student),
            "init": NEAREST_SOURCE if config.init == NEAREST_SOURCE else start.init,
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
    )


# --- options ----------------------------------------------------------------------------------


def _numbers() -> set[str]:
    return {field.name for field in fields(Settings)} & set(TrainConfig.model_fields)


def _unused(method: Method) -> set[str]:
    labels = set() if method.needs.labels else {"label_smoothing"}
    return labels | set(_METHOD_OPTIONS) - method.options


def _without_unused(config: TrainConfig, method: Method) -> TrainConfig:
    # Said, not refused: a script that loops over methods gives all of them the same options.
    unused = _unused(method) - ({"ranking"} if config.init == NEAREST_SOURCE else set())
    names = (*_METHOD_OPTIONS, "label_smoothing")
    given = [name for name in names if name in unused and getattr(config, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        console.note(f"{method.name} does not use {flags}")
    return config.model_copy(update={name: TrainConfig.model_fields[name].default for name in given})


def _settings(config: TrainConfig, defaults: Settings) -> Settings:
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # timm does not declare it

    chosen = {name: getattr(config, name) for name in _numbers() if getattr(config, name) is not None}
    settings = replace(defaults, **chosen)
    if settings.schedule == "one-cycle" and config.warmup is None:
        settings = replace(settings, warmup=ONE_CYCLE_WARMUP)
    known = [str(name) for name in list_optimizers()]
    if settings.optimizer not in known:
        raise UsageError(
            f"unknown optimizer '{settings.optimizer}'.{nearest(settings.optimizer, known)}",
            f"timm has {', '.join(known[:8])} and {len(known) - 8} more.",
        )
    return settings


def _fit_batchnorm(config: TrainConfig, settings: Settings, init: str) -> Settings:
    """Freezing keeps the statistics of the weights a student starts from. Random weights have none."""
    if config.freeze is not None:
        return _fit_frozen(config, settings, init)
    if settings.bn == "train" or config.bn is not None or init not in UNTRAINED:
        return settings
    console.note("the student starts from random weights, so BatchNorm statistics are trained, not frozen")
    return replace(settings, bn="train")


def _fit_frozen(config: TrainConfig, settings: Settings, init: str) -> Settings:
    """A frozen backbone has no statistics to update, and no learning rate."""
    if config.bn == "train" or config.backbone_lr_scale:
        flag = "--bn train" if config.bn == "train" else f"--backbone-lr-scale {config.backbone_lr_scale:g}"
        raise UsageError(
            f"--freeze {config.freeze}, but {flag} would change the backbone", "Leave one of them out."
        )
    if init in UNTRAINED:
        console.warn(f"--freeze {config.freeze} with --init {init}: the heads learn from untrained features")
    return replace(settings, bn="frozen", backbone_lr_scale=0.0)


def _device(config: TrainConfig, processes: int) -> str:
    device = pick_device(config.device)
    if config.device.startswith("cuda:") and processes > 1:
        raise UsageError(
            f"--device {config.device}, but every process of the run takes a device of its own",
            "Use --device auto.",
        )
    if config.amp == "fp16" and not device.startswith("cuda"):
        raise DeviceError(f"--amp fp16 does not train on {device}", "Use --amp bf16 or off.")
    return device


# --- views ------------------------------------------------------------------------------------


def _views(config: TrainConfig, cache: CacheSet | None, pinned: int | None) -> ViewRule:
    if cache is None:
        return ViewRule(ViewSet(0, 1.0, config.recipe or DEFAULT_RECIPE), None)
    views = ViewSet.from_document(cache.view_set)
    cached = cache.view_count - 1
    if pinned is not None and pinned <= cached:
        cached = pinned
    views = replace(views, train_views=cached)
    asked = views if config.recipe is None else replace(views, recipe=config.recipe)
    if config.teacher_view == "eval":
        _require_unmixed(asked)
        return ViewRule(asked, cached, "eval")
    if asked != views:
        raise UsageError(
            f"--recipe {config.recipe}, but the cached views are of recipe {views.recipe}",
            "Leave --recipe out, or take the teachers' clean view for augmented images: --teacher-view eval",
        )
    for member in cache.members:
        require_same_pixels(member.manifest.view_pixels, as_pixels(views.pixels()), member.layout.root)
    if cached == 0:
        console.warn(
            "the cache has only the eval view: every epoch shows the same pixels; "
            "cache --views eval+train:K, or use --teacher-view eval"
        )
    return ViewRule(views, cached)


def _require_unmixed(views: ViewSet) -> None:
    """Only a mixture that the teachers saw too has outputs to learn from."""
    if views.mixes:
        raise UsageError(
            f"recipe {views.recipe} mixes images, and with --teacher-view eval the teachers saw them unmixed",
            "Cache the mixed views (kd cache-teachers --views eval+train:K --recipe ...) and use "
            "--teacher-view same, or add --recipe imagenet here.",
        )


# --- data -------------------------------------------------------------------------------------


def _labelled(data: ImageData) -> ImageData:
    labelled = np.flatnonzero(data.labels >= 0)
    return data if len(labelled) in (0, len(data)) else data.select(labelled)


def _record(
    config: TrainConfig,
    method: Method,
    settings: Settings,
    data: ImageData,
    cache: CacheSet | None,
    teachers: Teachers | None,
    lower: Lower | None,
    rule: ViewRule,
) -> tuple[Recording | None, ImageData]:
    """Find the data in the cache, and leave out what the teachers have no outputs for."""
    if cache is None:
        return None, data
    rows = cache.rows_of(data, check_content=False)  # the feed compares the bytes as it decodes them
    views = sorted({rule.teacher(epoch) for epoch in range(settings.epochs)} & set(range(cache.view_count)))
    kinds: tuple[str, ...] = tuple(sorted(method.needs.kinds))
    reads = {} if teachers is None else dict.fromkeys(teachers.weights, kinds)
    if lower is not None:
        reads = lower.with_maps(reads)
    if config.stage is not None:
        cache.stage(Needs(reads, rows, tuple(views)), config.stage)
    usable = cache.require(reads, rows, views, config.allow_partial)
    if not usable.any():
        raise CacheMissingError(
            f"none of the {len(data)} images of {config.data} has cached outputs",
            "Run kd cache-teachers to its end, then train again.",
        )
    if not usable.all():
        kept = np.flatnonzero(usable)
        data, rows = data.select(kept), rows[kept]
    recording = Recording(cache, rows, {})
    if rule.recorded:
        require_partners(recording, data, rule.views, [view for view in views if view])
    return recording, data


def _require_classes(data: ImageData, name: str) -> None:
    labelled = data.labels[data.labels >= 0]
    present = np.unique(labelled)
    if not len(present):
        raise BadDataError(
            f"{name} has no labels, and this method learns from labels",
            "Use data with labels, or --method consolidation, which needs none.",
        )
    if len(present) == 1:
        only = data.class_names[present[0]] if data.class_names is not None else str(present[0])
        raise BadDataError(
            f"{name} has labelled images of one class only ('{only}')",
            "Give at least two classes to tell apart.",
        )


def _test_data(config: TrainConfig, sources: Sources) -> ImageData | None:
    if config.test is None:
        return None
    data = sources.data(config.test, data_root=config.data_root, download=config.download)
    labelled = _labelled(data)
    if not (labelled.labels >= 0).all():
        raise BadDataError(
            f"--test {config.test} has no labels", "Test on data with labels, or leave --test out."
        )
    return labelled


def _data_identity(data: ImageData) -> dict[str, Any]:
    return {
        "location": data.location,
        "images": len(data),
        "keys": data.keys.digest(),
        "labels": _digest(data.labels),
        "classes": None if data.class_names is None else len(data.class_names),
    }


def _digest(values: Int64[np.ndarray, " n"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<i8").tobytes()).hexdigest()
