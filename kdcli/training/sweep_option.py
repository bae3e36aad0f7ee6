"""``--sweep``, which no single student's configuration has."""

from pathlib import Path
from typing import Any

from kdcli.engines.config import EngineOptions
from kdcli.options.fields import option


class SweepOption(EngineOptions):
    """What makes ``kd train-student`` train several students; see :mod:`kdcli.training.sweep_file`."""

    sweep: Path | None = option(
        None, "YAML file of several students to train over one stream of images.", panel="Run", metavar="FILE"
    )


def engine_of(options: dict[str, Any]) -> EngineOptions | None:
    """Take the options of an engine out of those of a sweep; None where none is asked for.

    Raises:
        ConfigError: they do not belong together.
    """
    given = {name: options.pop(name) for name in EngineOptions.model_fields if name in options}
    engine = EngineOptions(**given)
    return None if engine.engine is None else engine
