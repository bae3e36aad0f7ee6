"""What ``kd soup`` can be told."""

from pathlib import Path
from typing import Annotated, ClassVar, final

from pydantic import Field

from kdcli.options.common import DataOptions, ForwardOptions
from kdcli.options.fields import option


@final
class SoupConfig(DataOptions, ForwardOptions):
    """``kd soup``."""

    command: ClassVar[str] = "soup"

    parents: tuple[str, ...] = option(
        ..., "Students: OUT of kd train-student, or exports.",
        panel="Data", positional=True, metavar="RUN_OR_EXPORT",
    )  # fmt: skip
    weights: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None = option(
        None, "One a student, as in 2,1,1; default: all equal.", panel="Student", comma=True, metavar="W,W"
    )
    recalibrate_bn: str | None = option(
        None, "Estimate BatchNorm's running statistics on these images instead of averaging them.",
        panel="Student", metavar="DATA",
    )  # fmt: skip
    test: str | None = option(
        None, "Data set to test the soup on.", panel="Data", metavar="DATA", there="data"
    )
    out: Path = option(..., "Folder of the soup, an export like OUT/export.", panel="Output", metavar="DIR")
