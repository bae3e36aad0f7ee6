"""Experiment trackers: accelerate's, each an optional package."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from kdcli.errors import MissingExtraError, UsageError, nearest

EXTRAS = ("tensorboard", "wandb", "mlflow")
"""Trackers that are extras of kd; accelerate knows more, whose packages are installed by their own names."""
_PACKAGES = {"comet_ml": "comet-ml"}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is trained.

    Raises:
        UsageError: accelerate does not know it.
        MissingExtraError: its package is not installed.
    """
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(
                f"unknown tracker '{name}'.{nearest(name, known)}",
                f"accelerate has {', '.join(sorted(known))}.",
            )
        builtin = LOGGER_TYPE_TO_CLASS[name].__module__.startswith("accelerate.")
        if builtin and name not in installed:
            what = f"kdcli[{name}]" if name in EXTRAS else _PACKAGES.get(name, name)
            raise MissingExtraError(
                f"--tracker {name} needs a package that is not installed", f"pip install '{what}'"
            )


@contextmanager
def tracked(accelerator: Accelerator, identity: Mapping[str, Any], out: Path) -> Iterator[None]:
    """Track a run for the time of the block, with the run's identity as its configuration.

    Args:
        accelerator: made with the trackers' names.
        identity: of the run; what is no plain value is written as text.
        out: the output folder; the run is called like it.
    """
    if not accelerator.log_with:
        yield
        return
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in identity.items()
    }
    names = {"wandb": {"name": out.name}, "mlflow": {"run_name": out.name}}
    accelerator.init_trackers("kd", plain, names)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def track_epoch(accelerator: Accelerator, document: Mapping[str, Any]) -> None:
    """Log one line of metrics.jsonl."""
    if accelerator.trackers:
        values = {name: value for name, value in document.items() if isinstance(value, int | float)}
        accelerator.log(values, step=document["steps"])


def track_test(accelerator: Accelerator, test: Mapping[str, float] | None, steps: int) -> None:
    """Log the accuracy after the last step."""
    if test is not None and accelerator.trackers:
        accelerator.log({f"test/{name}": value for name, value in test.items()}, step=steps)
