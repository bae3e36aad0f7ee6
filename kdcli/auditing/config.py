"""What ``kd audit`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field

from kdcli.options.fields import Mechanical, StepConfig

DISTANCES = {64: 4, 256: 32}
"""Default distance by number of bits: where copies end and other images do not begin yet (docs/audit.md)."""


@final
class AuditConfig(StepConfig):
    """``kd audit``."""

    command: ClassVar[str] = "audit"

    data: str = Field(
        description="Data set to look for near-duplicates of.", json_schema_extra={"positional": True}
    )
    other: str | None = Field(
        None,
        description="Data set to look for them in; default: DATA itself.",
        json_schema_extra={"positional": True},
    )
    distance: int | None = Field(
        None,
        ge=0,
        description="Bits in which the hashes of near-duplicates differ at most; default: 32 of 256, 4 of 64.",
    )
    hash_bits: Literal[64, 256] = Field(256, description="Bits of the perceptual hash.")
    max_pairs: int = Field(
        1_000_000,
        ge=1,
        description="Pairs to list; where there are more, only the nearest one of each image is.",
    )
    write_exclude: Path | None = Field(
        None,
        description="New file for the keys of DATA that have a near-duplicate, for without=FILE.",
        json_schema_extra=Mechanical,
    )
    fail: bool = Field(False, description="Exit with 21 if there is a pair.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
    )

    @property
    def limit(self) -> int:
        """The largest distance of a near-duplicate."""
        return DISTANCES[self.hash_bits] if self.distance is None else self.distance
