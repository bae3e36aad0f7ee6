"""What ``kd data check`` can be told."""

from pathlib import Path
from typing import ClassVar, final

from kdcli.options.common import DataOptions, WorkersOption
from kdcli.options.fields import option


@final
class CheckConfig(DataOptions, WorkersOption):
    """``kd data check``."""

    command: ClassVar[str] = "data check"

    data: str = option(
        ..., "Data set to check: SOURCE[@key=value,...]; a bare path is a folder.",
        panel="Data", positional=True, metavar="DATA", there="data",
    )  # fmt: skip
    test: str | None = option(
        None, "Data set that models are to be tested on: looks for images and classes of one that the other has.",
        panel="Data", there="data",
    )  # fmt: skip
    least: int = option(10, "Name classes with fewer images than these.", panel="Method", ge=1, le=2**30)
    write_exclude: Path | None = option(
        None, "New file for the keys of DATA that should go: unreadable, duplicates, images of --test; "
        "DATA@without=FILE leaves them out.",
        panel="Output", metavar="FILE", mechanical=True,
    )  # fmt: skip
