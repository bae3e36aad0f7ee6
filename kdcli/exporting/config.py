"""What ``kd export`` can be told."""

from pathlib import Path
from typing import ClassVar, final

from kdcli.options.common import HubOptions
from kdcli.options.fields import option


@final
class ExportPushConfig(HubOptions):
    """``kd export push``."""

    command: ClassVar[str] = "export push"

    run: Path = option(
        ..., "OUT of kd train-student, finished.", panel="Data", positional=True, there="anything"
    )
    to: str = option(
        ...,
        "hf://ORG/NAME; it is made when it is not there.",
        panel="Output",
        positional=True,
        metavar="DEST",
    )
