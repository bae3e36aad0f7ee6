"""The engine's numbers of a run: a method's defaults, what was asked for, and what follows from the rest of the run."""

from dataclasses import fields, replace
from typing import Any

from kdcli.console import console
from kdcli.errors import DeviceError, UsageError, nearest
from kdcli.methods.base import Method, Settings
from kdcli.options.learning import LearningOptions
from kdcli.precision import resolve_amp
from kdcli.runtime import pick_device
from kdcli.training.config import StudentConfig
from kdcli.training.schedule import FINAL_SHARE, ONE_CYCLE_WARMUP
from kdcli.training.start import NEAREST_SOURCE, UNTRAINED
from kdcli.types import AmpChoice, AmpName


def settable() -> set[str]:
    """Numbers of a run that a configuration can set."""
    return {field.name for field in fields(Settings)} & set(StudentConfig.model_fields)


def unused_by(config: StudentConfig, method: Method) -> set[str]:
    """Options of every run that change nothing for ``method``."""
    unused, needs = set(), method.needs_of(config.options)
    if method.label_head(config.options) is None:
        unused.add("label_smoothing")
        if needs.several_labels:  # others would take a combination of labels for a class: refused
            unused.add("multi_label")
    if not needs.kinds:
        unused.add("teacher")
    if not method.ranked and config.init != NEAREST_SOURCE:
        unused.add("ranking")
    return unused


def without_unused(config: StudentConfig, method: Method) -> StudentConfig:
    """The configuration without the options that its method does not use, which is said."""
    # Said, not refused: a script that loops over methods gives all of them the same options.
    unused = [name for name in sorted(unused_by(config, method)) if getattr(config, name)]
    given = [*unused, *(name for name, value in config.aside.items() if value)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        console.warn(f"{method.name} does not use {flags}")
    changes = {name: StudentConfig.model_fields[name].default for name in unused}
    needs = method.needs_of(config.options)
    live = needs.unlabelled or (needs.sets and config.train_from is None)
    if config.cache and not needs.kinds and live:
        console.warn(f"{method.name} draws live views and does not use --cache")
        changes["cache"] = ()
    return config.model_copy(update={**changes, "aside": {}})


FROM_RANDOM: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "decay_all": False,
    "schedule": "cosine",
    "warmup": 0.05,
    "backbone_lr_scale": 1.0,
    "bn": "train",
}
"""Of a student that starts from random weights, with a method whose own numbers are for trained ones. Ours, as of P2's
methods: sklearn's digits at 32 px, resnet10t, xe-kl, 6 epochs, 3 seeds: .93 .91 .94; with P3's numbers .32 .37."""


def numbers_of(method: Method, trained: bool) -> Settings:
    """A method's defaults, for a student that starts from trained or from random weights."""
    return method.defaults if trained or not method.tunes else replace(method.defaults, **FROM_RANDOM)


def resolve_settings(config: LearningOptions, defaults: Settings) -> Settings:
    """A method's defaults with what the configuration sets.

    Raises:
        UsageError: an unknown optimiser, or a final rate of a schedule that has none to choose.
    """
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # timm does not declare it

    names = {field.name for field in fields(Settings)} & set(type(config).model_fields)
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings = replace(defaults, **chosen)
    if settings.schedule == "one-cycle":
        if config.warmup is None:
            settings = replace(settings, warmup=ONE_CYCLE_WARMUP)
        if settings.final_lr_share is None:
            settings = replace(settings, final_lr_share=FINAL_SHARE)
    elif config.final_lr_share is not None:
        raise UsageError(
            f"--final-lr-share says where --schedule one-cycle ends, and the schedule is {settings.schedule}",
            "Leave it out, or add --schedule one-cycle.",
        )
    known = [str(name) for name in list_optimizers()]
    if settings.optimizer not in known:
        raise UsageError(
            f"unknown optimizer '{settings.optimizer}'.{nearest(settings.optimizer, known)}",
            f"timm has {', '.join(known[:8])} and {len(known) - 8} more.",
        )
    return settings


def fit_start(config: StudentConfig, method: Method, settings: Settings, init: str) -> Settings:
    """A method's numbers for the weights that the student starts from: random ones need other rates."""
    if init in UNTRAINED and method.tunes:
        paper = method.paper.partition(",")[0]
        console.note(f"the student starts from random weights: kd's rates for these, not those of {paper}")
        settings = resolve_settings(config, numbers_of(method, trained=False))
    return fit_batchnorm(config, settings, init)


def fit_batchnorm(config: StudentConfig, settings: Settings, init: str) -> Settings:
    """Freezing keeps the statistics of the weights a student starts from. Random weights have none."""
    if config.freeze is not None:
        return _fit_frozen(config, settings, init)
    if settings.bn == "train" or config.bn is not None or init not in UNTRAINED:
        return settings
    console.note("the student starts from random weights, so BatchNorm statistics are trained, not frozen")
    return replace(settings, bn="train")


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


def resolve_device(
    device_name: str, asked: AmpChoice, processes: int = 1, recorded: object = None
) -> tuple[str, AmpName]:
    """Where the run trains, and at which precision.

    Args:
        device_name: as it was asked for.
        asked: the precision, likewise.
        processes: that share each step.
        recorded: precision of the run that is gone on with, if any.

    Raises:
        UsageError: several processes and one device.
        DeviceError: no such device, or one that cannot run at this precision.
    """
    device = pick_device(device_name)
    if device_name.startswith("cuda:") and processes > 1:
        raise UsageError(
            f"--device {device_name}, but every process of the run takes a device of its own",
            "Use --device auto.",
        )
    amp = resolve_amp(asked, device, recorded)
    if amp == "fp16" and not device.startswith("cuda"):
        raise DeviceError(f"--amp fp16 does not train on {device}", "Use --amp bf16 or off.")
    return device, amp
