"""Bringing the chunks that a run will read nearer: into the page cache, or onto a disk of this node.

DIR/<cache_id>/
  lock                          held by the one job of the node that copies; it says which
  stamps                        how each copy was left, a line each
  tmp/                          copies that are not checked yet
  teachers/t/logits/c.3.0.CRC   a copy of c.3.0, named by the recorded checksum

A copy is there whole and checked, or not at all. A chunk that the cache adds or replaces later has no copy
of its name, so the next job brings it; what a job needs and has no copy of is read from the cache itself.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.arrays import sample_arrays
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES
from kdcli.cache.memory import available_memory
from kdcli.cache.owned import RECORDS_BYTES, open_own, repair_hint, stamp_of
from kdcli.cache.reader import CacheReader, ChunkFile
from kdcli.console import console, size
from kdcli.errors import Advice, CorruptError, NoSpaceError
from kdcli.files import available_bytes, storage_errors
from kdcli.reading import read_text

_STREAMS = 4
"""Files read at once: a network disk gives one stream only a part of what it has."""
_PIECE = 8 * 2**20
_PATIENCE = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")


@final
@dataclass(frozen=True, slots=True)
class Needs:
    """What a run will read of a cache.

    Attributes:
        reads: teacher -> its arrays; those of the samples are always among it.
        rows: global rows.
        views: numbers of views.
    """

    reads: Mapping[str, Collection[str]]
    rows: Int64[np.ndarray, " n"]
    views: tuple[int, ...]

    def arrays(self, member: CacheReader) -> Iterator[tuple[str, str]]:
        """(teacher or samples, array) of everything that ``member`` has of it."""
        yield from ((SAMPLES, name) for name in sample_arrays(member.manifest))
        for teacher, names in self.reads.items():
            if teacher in member.teachers:
                yield from ((teacher, name) for name in names)

    def chunks(self, cache: CacheSet) -> Iterator[tuple[CacheReader, ChunkFile]]:
        """Every written chunk that holds some of it."""
        for number, member in enumerate(cache.members):
            first, stop = cache.offsets[number : number + 2]
            rows = self.rows[(self.rows >= first) & (self.rows < stop)] - first
            for teacher, array in self.arrays(member):
                for chunk in member.chunk_files(teacher, array, rows, self.views):
                    yield member, chunk


# --- into the page cache ------------------------------------------------------------------------


def prewarm(cache: CacheSet, needs: Needs) -> int:
    """Read every chunk file of ``needs`` once, from its start to its end, and say how fast that went.

    Returns:
        Bytes read.
    """
    paths = [member.source(chunk) for member, chunk in needs.chunks(cache)]
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


def stage(cache: CacheSet, needs: Needs, folder: Path) -> int:
    """Copy the chunks of ``needs`` that have no copy in ``folder`` yet, and read from the copies from now on.

    Every copy is compared with its record before it gets its name (copies that are there already, too, where
    the cache is always verified), so nothing is verified besides.

    Args:
        cache: whose members then read the copies.
        needs: what will be read; what is not written yet is left out.
        folder: on a disk of this node; it may serve many caches and many jobs at once.

    Returns:
        Bytes copied.

    Raises:
        CorruptError: bytes of the cache are not the recorded ones.
        NoSpaceError: the copies do not fit.
        StorageError: the folder cannot be written.
    """
    copied, started, recheck = 0, time.perf_counter(), cache.verify == "always"
    wanted: dict[CacheReader, list[ChunkFile]] = {member: [] for member in cache.members}
    for member, chunk in needs.chunks(cache):
        wanted[member].append(chunk)
    for member, chunks in wanted.items():
        place = folder.absolute() / member.manifest.cache_id
        with storage_errors(place):
            (place / "tmp").mkdir(parents=True, exist_ok=True)
            if recheck or _lacking(place, chunks):
                with _only_job(place):
                    copied += _fill(member, place, chunks, recheck)
        member.staged = place
    cache.verify = "never"
    seconds = max(time.perf_counter() - started, 1e-9)
    console.note(
        f"staged in {folder}: {size(copied)} copied in {seconds:.1f} s ({size(int(copied / seconds))}/s)"
        if copied
        else f"staged in {folder} already"
    )
    return copied


def _lacking(place: Path, chunks: list[ChunkFile]) -> list[ChunkFile]:
    """Chunks without a copy as it was left: whatever touches a copy changes its stamp."""
    stamps = _read_stamps(place)
    lacking = []
    for chunk in chunks:
        try:
            stamp = stamp_of(place / chunk.copy_name)
        except FileNotFoundError:
            stamp = ""
        if not stamp or stamps.get(chunk.copy_name) != stamp:
            lacking.append(chunk)
    return lacking


def _read_stamps(place: Path) -> dict[str, str]:
    """Stamps of the copies that were checked, the later ones count; without them all are made again."""
    path = place / "stamps"
    text = read_text(path, RECORDS_BYTES) if path.is_file() else ""
    return {name: stamp for name, _, stamp in (line.partition("\t") for line in text.split("\n"))}


@contextmanager
def _only_job(place: Path) -> Iterator[None]:
    """Wait until no other job of this node copies the same cache; the kernel frees the lock of a dead one."""
    with (place / "lock").open("a+") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    file.seek(0)
                    holder = "".join(c for c in file.read(200) if c.isprintable()) or "another job"
                    console.note(
                        f"{holder} is staging into {place}; waiting for it (or stop it, or stage elsewhere)"
                    )
                waiting = True
                time.sleep(_PATIENCE)
        file.truncate(0)
        file.write(f"{socket.gethostname()} pid {os.getpid()}")
        file.flush()
        yield


def _fill(member: CacheReader, place: Path, chunks: list[ChunkFile], recheck: bool) -> int:
    for left in (place / "tmp").iterdir():
        left.unlink()  # of a job that was killed: nobody else is copying now
    if recheck:
        _drop_damaged(member, place, chunks)
    missing = _lacking(place, chunks)
    total, free = sum(chunk.size for chunk in missing), available_bytes(place)
    if total > free:
        raise NoSpaceError(
            f"{size(total)} of {member.layout.root} are to be staged, and {place} has {size(free)} free",
            Advice("small-stage"),
        )
    with console.progress(len(missing), "chunks", "stage") as bar, (place / "stamps").open("a") as stamps:
        for line in _several(lambda chunk: _copy(member, place, chunk), missing):
            stamps.write(line)
            stamps.flush()  # what a killed job copied is not copied again
            bar.advance(1)
    return total


def _drop_damaged(member: CacheReader, place: Path, chunks: list[ChunkFile]) -> None:
    for chunk in chunks:
        copy = place / chunk.copy_name
        if copy.is_file() and not _as_recorded(member, copy, chunk):
            copy.unlink()


def _copy(member: CacheReader, place: Path, chunk: ChunkFile) -> str:
    """Make a checked copy; its line in the list of stamps."""
    target = place / chunk.copy_name
    temporary = place / "tmp" / os.urandom(8).hex()
    with storage_errors(target):
        shutil.copyfile(chunk.path, temporary)
        if not _as_recorded(member, temporary, chunk):
            temporary.unlink()
            raise CorruptError(f"{chunk.path}: its bytes are not the recorded ones", repair_hint(chunk.path))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        return f"{chunk.copy_name}\t{stamp_of(target)}\n"


def _as_recorded(member: CacheReader, path: Path, chunk: ChunkFile) -> bool:
    found = member.store.inspect(path)
    return (found.size, found.crc, found.sound) == (chunk.size, chunk.crc, True)
