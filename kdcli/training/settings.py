"""The numbers of a run: a method's defaults, what was asked for, and what follows from the rest of the run."""

from dataclasses import fields, replace

from kdcli.console import console
from kdcli.errors import BadDataError, DeviceError, UsageError, nearest
from kdcli.methods.base import Method, Settings
from kdcli.runtime import pick_device
from kdcli.training.config import StudentConfig, old_new_weight
from kdcli.training.schedule import ONE_CYCLE_WARMUP
from kdcli.training.student import NEAREST_SOURCE, UNTRAINED

OFF = {"accumulate": 1, "clip_norm": None, "label_smoothing": 0.0, "ema": None}
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
    "kl_weight",
    "kl_direction",
    "top_classes",
    "mcl_tau",
    "mcl_share",
    "mcl_every",
    "frozen",
    "frozen_teacher",
    "loss_convention",
    "mlfd_levels",
    "distill_weight",
    "level_weight",
    "student_tap",
    "teacher_tap",
    "adaptor",
    "map_resize",
)


def settable() -> set[str]:
    """Numbers of a run that a configuration can set."""
    return {field.name for field in fields(Settings)} & set(StudentConfig.model_fields)


def unused_by(method: Method) -> set[str]:
    """Options that change nothing for ``method``."""
    labels = set() if method.needs.labels else {"label_smoothing"}
    return labels | set(_METHOD_OPTIONS) - method.options


def without_unused(config: StudentConfig, method: Method) -> StudentConfig:
    """The configuration without the options that its method does not use, which is said."""
    # Said, not refused: a script that loops over methods gives all of them the same options.
    unused = unused_by(method) - ({"ranking"} if config.init == NEAREST_SOURCE else set())
    names = (*_METHOD_OPTIONS, "label_smoothing")
    given = [name for name in names if name in unused and getattr(config, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        console.note(f"{method.name} does not use {flags}")
    if config.cache and not method.needs.kinds and (method.needs.unlabelled or method.needs.sets):
        console.note(f"{method.name} draws live views and does not use --cache")
        config = config.model_copy(update={"cache": ()})
    return config.model_copy(update={name: StudentConfig.model_fields[name].default for name in given})


def resolve_settings(config: StudentConfig, defaults: Settings) -> Settings:
    """A method's defaults with what the configuration sets.

    Raises:
        UsageError: an unknown optimiser, or two options that set the same number.
    """
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # timm does not declare it

    chosen = {name: getattr(config, name) for name in settable() if getattr(config, name) is not None}
    if config.old_new is not None:
        if config.generalist_weight is not None:
            raise UsageError(
                f"--old-new {config.old_new} and --generalist-weight {config.generalist_weight:g} both set lambda_0",
                "Give one of them: OLD:NEW is --generalist-weight 2 OLD / (OLD + NEW).",
            )
        chosen["generalist_weight"] = old_new_weight(config.old_new)
    if config.mcl_share is not None:
        if config.mcl_tau is not None:
            raise UsageError(
                f"--mcl-share {config.mcl_share:g} and --mcl-tau {config.mcl_tau:g} both set tau",
                "Give one of them.",
            )
        chosen["mcl_tau"] = None
    settings = replace(defaults, **chosen)
    if settings.mcl_every is not None and settings.ema is not None:
        raise UsageError(
            f"--ema {settings.ema:g} averages weights, and so does the slow copy of {config.method}",
            "Leave --ema out; --mcl-tau and --mcl-every say how the slow copy follows.",
        )
    if settings.schedule == "one-cycle" and config.warmup is None:
        settings = replace(settings, warmup=ONE_CYCLE_WARMUP)
    known = [str(name) for name in list_optimizers()]
    if settings.optimizer not in known:
        raise UsageError(
            f"unknown optimizer '{settings.optimizer}'.{nearest(settings.optimizer, known)}",
            f"timm has {', '.join(known[:8])} and {len(known) - 8} more.",
        )
    return settings


def fit_batchnorm(config: StudentConfig, settings: Settings, init: str) -> Settings:
    """Freezing keeps the statistics of the weights a student starts from. Random weights have none."""
    if config.freeze is not None:
        return _fit_frozen(config, settings, init)
    if settings.bn == "train" or config.bn is not None or init not in UNTRAINED:
        return settings
    console.note("the student starts from random weights, so BatchNorm statistics are trained, not frozen")
    return replace(settings, bn="train")


def fit_negatives(method: Method, settings: Settings, images: int) -> Settings:
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


def _fit_frozen(config: StudentConfig, settings: Settings, init: str) -> Settings:
    """A frozen backbone has no statistics to update, and no learning rate."""
    if config.bn == "train" or config.backbone_lr_scale:
        flag = "--bn train" if config.bn == "train" else f"--backbone-lr-scale {config.backbone_lr_scale:g}"
        raise UsageError(
            f"--freeze {config.freeze}, but {flag} would change the backbone", "Leave one of them out."
        )
    if init in UNTRAINED:
        console.warn(f"--freeze {config.freeze} with --init {init}: the heads learn from untrained features")
    return replace(settings, bn="frozen", backbone_lr_scale=0.0)


def resolve_device(config: StudentConfig, processes: int) -> str:
    """Where the run trains.

    Args:
        config: names the device and the precision.
        processes: that share each step.

    Raises:
        UsageError: several processes and one device.
        DeviceError: no such device, or one that cannot run at this precision.
    """
    device = pick_device(config.device)
    if config.device.startswith("cuda:") and processes > 1:
        raise UsageError(
            f"--device {config.device}, but every process of the run takes a device of its own",
            "Use --device auto.",
        )
    if config.amp == "fp16" and not device.startswith("cuda"):
        raise DeviceError(f"--amp fp16 does not train on {device}", "Use --amp bf16 or off.")
    return device
