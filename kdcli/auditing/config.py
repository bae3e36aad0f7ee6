"""What ``kd audit`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from kdcli.options.common import DataOptions, WorkersOption
from kdcli.options.fields import option

DISTANCES = {64: 4, 256: 32}
"""Default distance by number of bits: where copies end and other images do not begin yet (docs/audit.md)."""


@final
class AuditConfig(DataOptions, WorkersOption):
    """``kd audit``."""

    command: ClassVar[str] = "audit"

    data: str = option(
        ..., "Data set to look for near-duplicates of; a bare path is a folder.",
        panel="Data", positional=True, metavar="DATA_A", there="data",
    )  # fmt: skip
    other: str | None = option(
        None, "Data set to look for them in; default: DATA_A itself.",
        panel="Data", positional=True, metavar="DATA_B",
    )  # fmt: skip
    distance: int | None = option(
        None, "Bits in which hashes may differ; default: 32 of 256, 4 of 64. 0: equal hashes only.",
        panel="Method", ge=0, le=256,
    )  # fmt: skip
    hash_bits: Literal[64, 256] = option(
        256, "Bits of the perceptual hash; imagehash's own are 64.", panel="Method"
    )
    max_pairs: int = option(
        1_000_000,
        "List all pairs up to so many, else the nearest one of each image.",
        panel="Output",
        ge=1,
        le=10**9,
    )
    write_exclude: Path | None = option(
        None, "New file for the keys of DATA_A's duplicates; DATA_A@without=FILE leaves them out.",
        panel="Output", metavar="FILE", mechanical=True,
    )  # fmt: skip
    fail: bool = option(False, "Exit with 21 if there is a pair.", panel="Output", mechanical=True)

    @property
    def limit(self) -> int:
        """The largest distance of a near-duplicate."""
        return DISTANCES[self.hash_bits] if self.distance is None else self.distance
