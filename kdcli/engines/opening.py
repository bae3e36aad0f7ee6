"""From ``--engine`` to the engine."""

from pathlib import Path

from kdcli.engines.base import Engine
from kdcli.engines.config import EngineOptions
from kdcli.engines.local import LocalEngine


def open_engine(options: EngineOptions, folder: Path) -> Engine:
    """The engine that was asked for; its package is imported now.

    Args:
        options: which.
        folder: of this run's logs.

    Raises:
        MissingExtraError: its package is not installed.
        KdError: it cannot be reached, or does not know what it is told.
    """
    if options.engine == "submitit":
        from kdcli.engines.slurm import SlurmEngine

        return SlurmEngine(options, folder)
    if options.engine == "ray":
        from kdcli.engines.on_ray import RayEngine

        return RayEngine(options)
    return LocalEngine(options)
