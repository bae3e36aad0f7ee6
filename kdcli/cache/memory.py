"""Files mapped into memory without an open descriptor, memory that processes share, and how much a job may take.

Python's ``mmap`` keeps a duplicate of the descriptor for as long as a map lives: at ``ulimit -n 256`` a
reader of ten teachers would map and unmap chunks all the time (992 maps were the most at 1024: measured).
The kernel needs no descriptor once a file is mapped, so these maps are made by libc and closed at once.
"""

import ctypes
import functools
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Int64, UInt8

_GROUPS = Path("/sys/fs/cgroup")
_FAILED: Final = ctypes.c_void_p(-1).value
_MOST_MAPS: Final = Path("/proc/sys/vm/max_map_count")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = address
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc


def map_bytes(path: Path | int, size: int) -> UInt8[np.ndarray, " size"]:
    """Map the first ``size`` bytes of a file, read-only; the map ends when nothing refers to it any more.

    Args:
        path: the file, or a descriptor of it, which stays the caller's.
        size: at least 1, at most the size of the file.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        if not isinstance(path, int):
            os.close(descriptor)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    buffer = (ctypes.c_ubyte * size).from_address(address)
    release = weakref.finalize(buffer, _libc().munmap, address, size)
    release.atexit = False  # a thread may still read while the interpreter ends
    mapped: UInt8[np.ndarray, " size"] = np.frombuffer(memoryview(buffer), np.uint8)
    mapped.flags.writeable = False
    return mapped


def max_maps() -> int:
    """Chunks to keep mapped: an eighth of what the kernel allows a process."""
    try:
        return max(16, int(_MOST_MAPS.read_text()) // 8)
    except (OSError, ValueError):
        return 8192


def prefetch(items: np.ndarray, places: Int64[np.ndarray, " n"]) -> None:
    """Ask the kernel to read some items of a map, all at once; their first touch then waits for one of
    many reads in flight, where plain page faults are read one after the other.

    Args:
        items: 1-D, mapped by :func:`map_bytes`.
        places: which of them.
    """
    starts = items.ctypes.data + places.astype(np.int64) * items.itemsize
    pages = starts // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _libc().madvise
    for page, length in zip(pages.tolist(), (starts + items.itemsize - pages).tolist(), strict=True):
        advise(page, length, mmap.MADV_WILLNEED)


# --- what a job may take, and what its processes share ---------------------------------------------


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
