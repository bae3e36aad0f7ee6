"""``--sweep``, which no single student's configuration has."""

from pathlib import Path

from pydantic import BaseModel

from kdcli.options.fields import option


class SweepOption(BaseModel):
    """What makes ``kd train-student`` train several students; see :mod:`kdcli.training.sweep_file`."""

    sweep: Path | None = option(
        None, "YAML file of several students to train over one stream of images.", panel="Run", metavar="FILE"
    )
