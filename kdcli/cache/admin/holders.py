"""Who holds the claims of a cache: told from the claims alone, also for a read-only cache."""

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

from kdcli.cache.claims import Claims, read_owner
from kdcli.cache.layout import Layout


@final
@dataclass(frozen=True, slots=True, order=True)
class Writer:
    """A process that holds claims.

    Attributes:
        host, pid, job: which process where.
        alive: what can be known of that from here.
        silent: seconds since its last sign of life.
    """

    host: str
    pid: int
    job: str
    alive: bool
    silent: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        job = f" job {self.job}" if self.job else ""
        return f"{self.host} pid {self.pid}{job}{'' if self.alive else ' (dead)'}"


def claim_holders(layout: Layout, below: str = "") -> dict[Writer, int]:
    """Who holds claims, and how many: of all parts, or those of one teacher."""
    judge, now = Claims(layout), time.time()
    counts: dict[Writer, int] = {}
    silent: dict[Writer, float] = {}
    folder = layout.claims / below
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else ():
        owner = read_owner(path)
        if owner.pid is None:
            continue  # given back since the listing
        writer = Writer(owner.host, owner.pid, owner.job, alive=not judge.is_dead(path))
        with suppress(FileNotFoundError):
            age = max(0.0, now - path.lstat().st_mtime)
            counts[writer] = counts.get(writer, 0) + 1
            silent[writer] = min(age, silent.get(writer, age))
    return {replace(writer, silent=silent[writer]): count for writer, count in counts.items()}
