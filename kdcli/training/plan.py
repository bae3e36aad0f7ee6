"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

import functools
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import as_pixels, require_same_pixels
from kdcli.cache.staging import Needs
from kdcli.config import TrainConfig, old_new_weight
from kdcli.console import console
from kdcli.data.sources import ImageData, open_data
from kdcli.data.views import ViewSet
from kdcli.errors import BadDataError, CacheMissingError, DeviceError, UsageError, nearest
from kdcli.models.spec import ModelSpec
from kdcli.objectives.base import Method, Settings, Setup
from kdcli.objectives.fixmatch import strong_recipe
from kdcli.objectives.registry import METHODS
from kdcli.runtime import pick_device
from kdcli.training.feed import ViewRule
from kdcli.training.lower import Lower, choose_lower
from kdcli.training.recorded import Recording, require_partners
from kdcli.training.schedule import ONE_CYCLE_WARMUP
from kdcli.training.sets import (
    NamedSet,
    data_identity,
    labelled_only,
    open_sets,
    open_test,
    require_both,
    require_classes,
    require_sets,
    train_specs,
)
from kdcli.training.student import NEAREST_SOURCE, UNTRAINED, Start, resolve_start
from kdcli.training.teachers import Teachers, choose_teachers, joint_id, ranked_records, require_options
from kdcli.training.validation import split_off
from kdcli.types import Ranking

DEFAULT_RECIPE = "imagenet"
_OFF = {"accumulate": 1, "clip_norm": None, "label_smoothing": 0.0, "ema": None}
"""Options of the engine, and the values that leave a run as it is without them."""
_METHOD_OPTIONS = (
    "teacher",
    "ranking",
    "generalist",
    "temperature",
    "label_weight",
    "generalist_weight",
    "unlabelled_ratio",
    "unlabelled_includes_labelled",
    "unlabelled_weight",
    "threshold",
    "strong_recipe",
    "label_space",
    "old_new",
    "crd_weight",
    "crd_negatives",
    "crd_temperature",
    "crd_dim",
    "crd_momentum",
)


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
    def turns(self) -> int:
        """Passes over the data of which the views may be shown."""
        return _turns(self.settings, self.rule, self.split or bool(self.sets))

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

    def setup(self, student_width: int = 0) -> Setup:
        """What the objective is made from.

        Args:
            student_width: of the student's pooled features; only known once it is open, only CRD asks.
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
            "select": config.select if self.validation is not None else None,
            **self._identity_of_streams(),
        }

    def _identity_of_streams(self) -> dict[str, Any]:
        # Keys that runs with one batch a step do not have: those begun before them go on.
        found: dict[str, Any] = {}
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
    require_sets(config, method)
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
    rule = _views(config, method, cache, pins.train_views)
    strong = _strong_views(config, rule) if "strong_recipe" in method.options else None
    main = next(iter(train_specs(config).values()), config.first_data)
    everything = sources.data(main, data_root=config.data_root, download=config.download)
    data = everything if method.needs.kinds or method.needs.unlabelled else labelled_only(everything)
    data, validation = split_off(config, method, data)
    recording, data = _record(config, method, settings, data, cache, teachers, lower, rule)
    settings = _fit_negatives(method, settings, len(data))
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
            **{name: getattr(settings, name) for name in _numbers() - _unused(method)},
            "data": tuple(f"{each.name}={each.data.location}" for each in sets) or everything.location,
            "test": tuple(f"{each.name}={each.test.location}" for each in sets if each.test) or None
            if sets
            else test and test.location,
            "student": str(student),
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
    if config.cache and not method.needs.kinds and (method.needs.unlabelled or method.needs.sets):
        console.note(f"{method.name} draws live views and does not use --cache")
        config = config.model_copy(update={"cache": ()})
    return config.model_copy(update={name: TrainConfig.model_fields[name].default for name in given})


def _settings(config: TrainConfig, defaults: Settings) -> Settings:
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # timm does not declare it

    chosen = {name: getattr(config, name) for name in _numbers() if getattr(config, name) is not None}
    if config.old_new is not None:
        if config.generalist_weight is not None:
            raise UsageError(
                f"--old-new {config.old_new} and --generalist-weight {config.generalist_weight:g} both set lambda_0",
                "Give one of them: OLD:NEW is --generalist-weight 2 OLD / (OLD + NEW).",
            )
        chosen["generalist_weight"] = old_new_weight(config.old_new)
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


def _fit_negatives(method: Method, settings: Settings, images: int) -> Settings:
    """An image has n - 1 others to be contrasted with."""
    if "crd_negatives" not in method.options or settings.crd_negatives < images:
        return settings
    if images < 2:
        raise BadDataError(
            f"{method.name} contrasts images with each other, and there is one image only",
            "Give more images, or use a method without CRD.",
        )
    console.note(
        f"CRD: {images - 1} negatives instead of {settings.crd_negatives}, as there are {images} images"
    )
    return replace(settings, crd_negatives=images - 1)


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


def _views(config: TrainConfig, method: Method, cache: CacheSet | None, pinned: int | None) -> ViewRule:
    if cache is None:
        return ViewRule(ViewSet(0, 1.0, config.recipe or method.recipe), None)
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


def _strong_views(config: TrainConfig, rule: ViewRule) -> ViewSet:
    """FixMatch's strong views: by default the weak crop and flip, then RandAugment and Cutout."""
    recipe = config.strong_recipe or str(strong_recipe(rule.views.rule))
    strong = ViewSet(0, 1.0, recipe)
    for views in (rule.views, strong):
        if views.mixes:
            raise UsageError(
                f"recipe {views.recipe} mixes images, and fixmatch compares two views of one image",
                "Choose a --recipe and a --strong-recipe without MixUp and CutMix.",
            )
    return strong


def _require_unmixed(views: ViewSet) -> None:
    """Only a mixture that the teachers saw too has outputs to learn from."""
    if views.mixes:
        raise UsageError(
            f"recipe {views.recipe} mixes images, and with --teacher-view eval the teachers saw them unmixed",
            "Cache the mixed views (kd cache-teachers --views eval+train:K --recipe ...) and use "
            "--teacher-view same, or add --recipe imagenet here.",
        )


# --- data -------------------------------------------------------------------------------------


def _splits(settings: Settings) -> bool:
    return settings.unlabelled_ratio is not None or bool(settings.unlabelled_includes_labelled)


def _turns(settings: Settings, rule: ViewRule, several: bool) -> int:
    """The shorter of several streams is passed more often than there are epochs: any cached view may come."""
    return max(settings.epochs, rule.cached or 0) if several else settings.epochs


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
    turns = _turns(settings, rule, _splits(settings) or method.needs.sets)
    views = sorted({rule.teacher(turn) for turn in range(turns)} & set(range(cache.view_count)))
    kinds: tuple[str, ...] = tuple(sorted(method.needs.kinds))
    reads = {} if teachers is None else dict.fromkeys(teachers.weights, kinds)
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
