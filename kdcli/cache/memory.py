"""How much memory a job may take, and memory that its processes share."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import UInt8

from kdcli.cache.mapping import map_bytes

_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this job may still take: of the machine, or of the control group a scheduler put it in."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = page * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError, ValueError):
        return found
    return max(0, min([found, *_group_limits(groups)]))


def _group_limits(groups: list[str]) -> Iterator[int]:
    """What the limits on each control group leave, its parents' included; files it has in memory count as free."""
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage = _GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            try:
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                left = int((place / limit).read_text()) - int((place / usage).read_text())
            except (OSError, ValueError):  # none there, or no limit ("max")
                continue
            yield left + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


@final
class SharedBytes:
    """Memory that a process shares with those it forks or spawns; gone when the last of them ends.

    It has no name, so nothing is left behind by a killed job, and a container's small /dev/shm does not count.

    Args:
        size: in bytes, at least 1.
    """

    def __init__(self, size: int) -> None:
        if "memfd_create" in dir(os):
            descriptor = os.memfd_create("kd-resident")
        else:  # macOS
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.truncate(descriptor, size)
        self._attach(descriptor, size)

    def _attach(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size = descriptor, size
        weakref.finalize(self, os.close, descriptor)
        self.bytes: UInt8[np.ndarray, " size"] = map_bytes(descriptor, size)

    def writable(self) -> mmap.mmap:
        """A map to fill it with."""
        return mmap.mmap(self._descriptor, self.size)

    def __getstate__(self) -> tuple[Any, int]:
        return DupFd(self._descriptor), self.size

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self._attach(state[0].detach(), state[1])
