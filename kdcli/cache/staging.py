"""Bringing the chunks that a run will read nearer: into the page cache, or onto a disk of this node.

A chunk that the cache adds or replaces later has no copy of its name, so the next job brings it; what a job needs and
has no copy of is read from the cache itself. Copies: see :mod:`kdcli.cache.copies`.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from kdcli.cache.backends.base import HEADER_BYTES
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.copies import Copies, is_recorded
from kdcli.cache.memory import available_memory
from kdcli.cache.needs import Needs
from kdcli.cache.origin import ChunkFile
from kdcli.cache.owned import CHUNK_BYTES, open_own, read_own, repair_hint
from kdcli.cache.reader import CacheReader
from kdcli.cache.shelf import Stage
from kdcli.console import console, size
from kdcli.errors import CorruptError
from kdcli.files import storage_errors

_STREAMS = 4
"""Files read at once: a network disk gives one stream only a part of what it has."""
_PIECE = 8 * 2**20

Item = TypeVar("Item")
Result = TypeVar("Result")


def _chunks(cache: CacheSet, needs: Needs) -> Iterator[tuple[CacheReader, ChunkFile]]:
    for number, member in enumerate(cache.members):
        first, stop = cache.offsets[number : number + 2]
        yield from ((member, chunk) for chunk in needs.chunks(member, first, stop))


# --- into the page cache ------------------------------------------------------------------------


def prewarm(cache: CacheSet, needs: Needs) -> int:
    """Read every chunk file of ``needs`` once, from its start to its end, and say how fast that went.

    Returns:
        Bytes read.
    """
    paths = [member.source(chunk) for member, chunk in _chunks(cache, needs)]
    with storage_errors(paths[0] if paths else ""):
        total = sum(path.stat().st_size for path in paths)
        if total > available_memory():
            console.warn(
                f"prewarm: {size(total)} do not fit into the {size(available_memory())} of memory "
                "that are available; the kernel will drop a part again"
            )
        started = time.perf_counter()
        with console.progress(max(1, total // 10**6), "MB", "prewarm") as bar:
            for count in _several(_read_through, paths):
                bar.advance(count // 10**6)
    seconds = max(time.perf_counter() - started, 1e-9)
    rate = f"{seconds:.1f} s ({size(int(total / seconds))}/s)"
    console.note(f"prewarm: {size(total)} in {len(paths)} files read in {rate}")
    return total


def _several(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, of a few calls at a time; the first error drops the calls that did not begin."""
    pool = ThreadPoolExecutor(_STREAMS)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _read_through(path: Path) -> int:
    buffer, size = memoryview(bytearray(_PIECE)), 0
    with os.fdopen(open_own(path), "rb", buffering=0) as file:
        if "posix_fadvise" in dir(os):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            size += count
    return size


# --- onto a disk of this node -------------------------------------------------------------------


def stage(cache: CacheSet, needs: Needs, folder: Path, gigabytes: float | None = None) -> int:
    """Copy the chunks of ``needs`` that have no copy in ``folder`` yet, and read from the copies from now on.

    A cache in a store is left alone: its chunks are copied when they are required, wherever it is read.

    Every copy is compared with its record before it gets its name (copies that are there already, too, where
    the cache is always verified), so nothing is verified besides.

    Args:
        cache: whose members then read the copies.
        needs: what will be read; what is not written yet is left out.
        folder: on a disk of this node; it may serve many caches and many jobs at once.
        gigabytes: most that all copies in it may take.

    Returns:
        Bytes copied.

    Raises:
        CorruptError: bytes of the cache are not the recorded ones.
        NoSpaceError: the copies do not fit.
        StorageError: the folder cannot be written.
    """
    copied, started, recheck = 0, time.perf_counter(), cache.verify == "always"
    wanted: dict[CacheReader, list[ChunkFile]] = {m: [] for m in cache.members if m.store.origin is None}
    for member, chunk in _chunks(cache, needs):
        if member.store.origin is None:
            wanted[member].append(chunk)
    for member, chunks in wanted.items():
        copies = Copies(Stage.told(folder, gigabytes), member.manifest.cache_id, member.store.backend)
        copied += copies.fill(chunks, partial(_read, member), "stage", recheck)
        member.staged = copies.place
    if not wanted:
        return 0
    cache.verify = "never"
    seconds = max(time.perf_counter() - started, 1e-9)
    console.note(
        f"staged in {folder}: {size(copied)} copied in {seconds:.1f} s ({size(int(copied / seconds))}/s)"
        if copied
        else f"staged in {folder} already"
    )
    return copied


def _read(member: CacheReader, chunk: ChunkFile) -> bytes:
    data = read_own(chunk.path, CHUNK_BYTES + HEADER_BYTES)
    if not is_recorded(member.store.backend, data, chunk):
        raise CorruptError(f"{chunk.path}: its bytes are not the recorded ones", repair_hint(chunk.path))
    return data
