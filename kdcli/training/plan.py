"""From a configuration to a plan: everything is resolved and checked here, before a model is opened."""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final

import numpy as np
from jaxtyping import Int64

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
from kdcli.objectives.registry import METHODS
from kdcli.runtime import pick_device
from kdcli.training.feed import ViewRule
from kdcli.training.recorded import Recording, require_partners
from kdcli.training.student import resolve_init
from kdcli.training.teachers import Teachers, choose_teachers, joint_id, require_options
from kdcli.types import Ranking

DEFAULT_RECIPE = "imagenet"
_METHOD_OPTIONS = (
    "teacher",
    "ranking",
    "generalist",
    "temperature",
    "label_weight",
    "generalist_weight",
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
        init: ``pretrained``, ``random`` or the spec of the model that the student starts from.
        device: where it runs.
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
    init: str
    device: str

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
            weights={} if teachers is None else teachers.weights,
            settings=self.settings,
            generalist=teachers.generalist.name if teachers and teachers.generalist else None,
            split=bool((self.data.labels < 0).any()),
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


def make_plan(config: TrainConfig, ranking: Ranking | None = None, pins: Pins | None = None) -> Plan:
    """Resolve and check a configuration.

    Args:
        config: what the user asked for.
        ranking: what ``config.ranking`` holds, already read.
        pins: what a run begun earlier understood by all cached teachers and views.

    Raises:
        UsageError: options that contradict each other or the method.
        NotFoundError: a model, data set or teacher that cannot be had.
        BadDataError: data that the method cannot use.
        CacheMissingError: arrays or rows that are not cached, with the command that fills the gap.
        IdentityError: a cache of other images, or a ranking of other teachers.
        DeviceError: no such device, or one that cannot run at this precision.
    """
    method, pins = METHODS[config.method], pins or Pins()
    config = _without_unused(config, method)
    ranking = ranking if "ranking" in method.options else None
    settings = _settings(config, method.defaults)
    require_options(config, method, ranking)
    student = ModelSpec.parse(config.student)
    device = _device(config)
    cache = CacheSet.open(config.cache, config.verify) if config.cache else None
    teachers = None
    if cache is not None and method.needs.kinds:
        teachers = choose_teachers(config, method, settings, cache, ranking, pins.teachers)
    init = resolve_init(config.init, student, teachers.generalist if teachers is not None else None)
    settings = _fit_batchnorm(config, settings, init)
    rule = _views(config, cache, pins.train_views)
    everything = open_data(config.data, data_root=config.data_root, download=config.download)
    data = everything if method.needs.kinds else _labelled(everything)
    recording, data = _record(config, method, settings, data, cache, teachers, rule)
    settings = _fit_negatives(method, settings, len(data))
    if method.needs.labels:
        _require_classes(data, config.data)
    test = _test_data(config)
    config = config.model_copy(
        update={
            **{name: getattr(settings, name) for name in _numbers() - _unused(method)},
            "data": everything.location,
            "test": None if test is None else test.location,
            "student": str(student),
            "init": init,
            "old_new": None,  # it is in generalist_weight now
            "teacher": () if teachers is None else tuple(teachers.records),
            "cache": tuple(path.absolute() for path in config.cache),
            "recipe": rule.views.recipe,
            "out": config.out.absolute(),
            "data_root": None if config.data_root is None else config.data_root.absolute(),
        }
    )
    return Plan(config, method, settings, data, test, rule, recording, teachers, ranking, init, device)


# --- options ----------------------------------------------------------------------------------


def _numbers() -> set[str]:
    return {field.name for field in fields(Settings)} & set(TrainConfig.model_fields)


def _unused(method: Method) -> set[str]:
    return set(_METHOD_OPTIONS) - method.options


def _without_unused(config: TrainConfig, method: Method) -> TrainConfig:
    # Said, not refused: a script that loops over methods gives all of them the same options.
    given = [name for name in _METHOD_OPTIONS if name not in method.options and getattr(config, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        console.note(f"{method.name} does not use {flags}")
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
    known = [str(name) for name in list_optimizers()]
    if settings.optimizer not in known:
        raise UsageError(
            f"unknown optimizer '{settings.optimizer}'.{nearest(settings.optimizer, known)}",
            f"timm has {', '.join(known[:8])} and {len(known) - 8} more.",
        )
    return settings


def _fit_batchnorm(config: TrainConfig, settings: Settings, init: str) -> Settings:
    """Freezing keeps the statistics of the weights a student starts from. Random weights have none."""
    if settings.bn == "train" or config.bn is not None or init != "random":
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


def _device(config: TrainConfig) -> str:
    device = pick_device(config.device)
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
    rule: ViewRule,
) -> tuple[Recording | None, ImageData]:
    """Find the data in the cache, and leave out what the teachers have no outputs for."""
    if cache is None:
        return None, data
    rows = cache.rows_of(data, check_content=False)  # the feed compares the bytes as it decodes them
    views = sorted({rule.teacher(epoch) for epoch in range(settings.epochs)} & set(range(cache.view_count)))
    reads = {} if teachers is None else dict.fromkeys(teachers.weights, sorted(method.needs.kinds))
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


def _test_data(config: TrainConfig) -> ImageData | None:
    if config.test is None:
        return None
    data = open_data(config.test, data_root=config.data_root, download=config.download)
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
