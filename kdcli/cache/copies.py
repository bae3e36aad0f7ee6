"""Checked copies of chunks on a disk of this machine, shared by its processes.

DIR/
  lock, used                      taken by who makes room; bytes of all copies
  <cache_id>/
    stamps                        how each copy was left, and when it was last named to a reader: a line each time
    tmp/, locks/                  copies that are being made, and who makes them: the kernel knows
    teachers/t/logits/c.3.0.CRC   a copy of c.3.0, named by the recorded checksum

A copy is there whole and checked, or not at all. Under a limit the copies that were not used for the longest time go
first. One that is mapped stays readable, and takes its space until it is unmapped; one that goes between its naming
and its mapping is made again by who was to map it.
"""

import fcntl
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, final

from kdcli.cache.backends.base import HEADER_BYTES, Backend
from kdcli.cache.origin import ChunkFile
from kdcli.cache.owned import CHUNK_BYTES, RECORDS_BYTES, read_own, stamp_of
from kdcli.console import console, size
from kdcli.errors import Advice, NoSpaceError, UsageError
from kdcli.files import atomic_write_text, available_bytes, make_folder, storage_errors
from kdcli.reading import read_text

STREAMS: Final = 16
"""Most chunks that are read at a time: one connection alone does not fill a line."""
_MEMORY: Final = 2**30
"""Bytes of the chunks that are in memory at a time; at least one is."""
_CACHE_ID: Final = re.compile("[0-9a-f]{32}")
_KEPT: Final = 0.9
"""Share of the limit that is kept when it is reached, so that not every copy has to make room."""
_LONG: Final = 2**20
"""Bytes of stamps from which on those of removed copies are left out."""
_UNFINISHED: Final = 2**63
"""Later than any use: of copies that are being made."""


def _default_folder() -> Path:
    from platformdirs import user_cache_path

    return Path(os.environ.get("KD_STAGE") or user_cache_path("kd") / "stage").absolute()


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """Where copies are, and how many.

    Attributes:
        folder: on a disk of this machine; default: $KD_STAGE, or one in the user's cache folder.
        limit: bytes that all copies there may take together; None: what the disk has.
    """

    folder: Path = field(default_factory=_default_folder)
    limit: int | None = None

    @classmethod
    def told(cls, folder: Path | None = None, gigabytes: float | None = None) -> Self:
        """By options."""
        limit = None if gigabytes is None else int(gigabytes * 1e9)
        return cls(limit=limit) if folder is None else cls(folder.absolute(), limit)


Read = Callable[[ChunkFile], bytes]


def is_recorded(backend: Backend, data: bytes, chunk: ChunkFile) -> bool:
    """Whether these bytes of a chunk are those that were committed."""
    found = backend.judge(data)
    return (found.size, found.crc, found.sound) == (chunk.size, chunk.crc, True)


@final
class Copies:
    """The copies of one cache."""

    def __init__(self, stage: Stage, cache_id: str, backend: Backend) -> None:
        self.stage, self.place, self._backend = stage, stage.folder / cache_id, backend
        self._known: dict[str, str] = {}

    def fill(self, chunks: Sequence[ChunkFile], read: Read, title: str = "", recheck: bool = False) -> int:
        """Make the copies that are lacking, as many as the limit lets stay, several at a time.

        Args:
            chunks: what will be read, in any order.
            read: the bytes of one, compared with its record.
            title: of the progress; empty: none is shown.
            recheck: also read the copies that are here, and make those again that are not as recorded.

        Returns:
            Bytes copied.

        Raises:
            UsageError: the limit is smaller than a chunk.
            NoSpaceError: they do not fit on the disk.
        """
        chunks = self._within_limit(chunks, bool(title))
        with storage_errors(self.place):
            missing = self.lacking(chunks)
        if not recheck and not missing:
            return 0
        self.prepare()
        if recheck:
            self._drop_damaged(chunks)
            missing = self.lacking(chunks)
        self._require_space(sum(chunk.size for chunk in missing))
        copied, largest = 0, max((chunk.size for chunk in missing), default=1)
        random.shuffle(missing)  # processes that begin together share the work
        bar = console.progress(len(missing), "chunks", title) if title and missing else nullcontext()
        pool = ThreadPoolExecutor(max(1, min(STREAMS, _MEMORY // max(1, largest))), "kd-copy")
        with bar as shown:
            try:
                for future in as_completed([pool.submit(self.make, chunk, read) for chunk in missing]):
                    copied += future.result()
                    if shown is not None:
                        shown.advance(1, copied=size(copied))
            finally:
                pool.shutdown(cancel_futures=True)
        return copied

    def _within_limit(self, chunks: Sequence[ChunkFile], told: bool) -> Sequence[ChunkFile]:
        """The first of them that fit together."""
        limit = self.stage.limit
        if limit is None:
            return chunks
        most, used, fit = int(limit * _KEPT), 0, []
        for chunk in chunks:
            if chunk.size > most:
                raise UsageError(
                    f"--stage-limit {limit / 1e9:g}: a chunk of this cache has {size(chunk.size)}",
                    "Give a higher --stage-limit.",
                )
            used += chunk.size
            if used <= most:
                fit.append(chunk)
        if told and used > most:
            console.warn(
                f"{size(used)} will be read, and --stage-limit lets {size(most)} stay on this disk: the rest is "
                "fetched again whenever it is read"
            )
        return fit

    def _require_space(self, total: int) -> None:
        free = available_bytes(self.place)
        if total > free:
            raise NoSpaceError(
                f"{size(total)} are to be copied to {self.place}, where {size(free)} are free",
                Advice("small-stage"),
            )

    def _drop_damaged(self, chunks: Sequence[ChunkFile]) -> None:
        for chunk in chunks:
            copy = self.place / chunk.copy_name
            if copy.is_file() and not is_recorded(
                self._backend, read_own(copy, CHUNK_BYTES + HEADER_BYTES), chunk
            ):
                copy.unlink()

    def prepare(self) -> None:
        """Make the folders; remove what killed processes left half made."""
        with storage_errors(self.place):
            for name in ("tmp", "locks"):
                make_folder(self.place / name)
            for path in (self.place / "tmp").iterdir():
                with suppress(BlockingIOError), _held(self.place / "locks" / path.name, wait=False):
                    path.unlink(missing_ok=True)

    def lacking(self, chunks: Iterable[ChunkFile]) -> list[ChunkFile]:
        """Those without a copy as it was left."""
        missing = [chunk for chunk in chunks if not self._is_here(chunk)]
        if missing:
            self._known = {name: stamp for name, (stamp, _) in read_stamps(self.place).items()}
        return [chunk for chunk in missing if not self._is_here(chunk)]

    def find(self, chunk: ChunkFile) -> Path | None:
        """The copy, as it was left by who checked it; None: there is none."""
        return None if self.lacking([chunk]) else self.place / chunk.copy_name

    def use(self, chunk: ChunkFile) -> Path | None:
        """:meth:`find`, for who is about to map it: it is the last to be removed now."""
        found = self.find(chunk)
        if found is not None:
            with suppress(FileNotFoundError):
                self._note(chunk, stamp_of(found))
        return found

    def _is_here(self, chunk: ChunkFile) -> bool:
        try:
            return stamp_of(self.place / chunk.copy_name) == self._known.get(chunk.copy_name)
        except FileNotFoundError:
            return False

    def _note(self, chunk: ChunkFile, stamp: str) -> None:
        self._known[chunk.copy_name] = stamp
        with (self.place / "stamps").open("a") as stamps:  # one write: other processes add to it, too
            stamps.write(f"{chunk.copy_name}\t{stamp}\t{time.time_ns()}\n")

    def make(self, chunk: ChunkFile, read: Read) -> int:
        """Make a copy, or wait for who is making it.

        Args:
            chunk: of this cache.
            read: see :meth:`fill`.

        Returns:
            Bytes copied: 0 where another process was faster.

        Raises:
            NoSpaceError, StorageError: the disk is full, or cannot be written.
        """
        target = self.place / chunk.copy_name
        name = chunk.copy_name.replace("/", "+")
        temporary = self.place / "tmp" / name
        with storage_errors(target), _held(self.place / "locks" / name):
            if self.find(chunk) is not None:
                return 0
            data = read(chunk)
            try:
                with temporary.open("wb") as file:
                    self._make_room(file.fileno(), len(data))
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                temporary.unlink()
                raise
            make_folder(target.parent)
            temporary.replace(target)
            self._note(chunk, stamp_of(target))
        return len(data)

    # --- under a limit ----------------------------------------------------------------------------

    def _make_room(self, descriptor: int, count: int) -> None:
        """Take the space of a copy, if other copies have to go for it."""
        folder, limit = self.stage.folder, self.stage.limit
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                used = int(read_text(folder / "used", 64))
            except (OSError, ValueError):
                used = sum(each.size for each in _copies_in(folder))
            if limit is not None and used + count > limit:
                used = _evict(folder, int(limit * _KEPT) - count)
            os.truncate(descriptor, count)  # counts from now on, whoever looks
            (folder / "used").write_text(str(used + count))


@final
@dataclass(frozen=True, slots=True)
class _Copy:
    path: Path
    size: int
    used: int


def _evict(folder: Path, target: int) -> int:
    """Remove copies until at most ``target`` bytes are left, those first that were not used for the longest time.

    Returns:
        Bytes that are left.
    """
    found = sorted(_copies_in(folder), key=lambda copy: copy.used)
    left = sum(copy.size for copy in found)
    for copy in found:
        if left <= target:
            break
        if copy.used < _UNFINISHED:
            copy.path.unlink(missing_ok=True)
            left -= copy.size
    for place in _places_in(folder):
        if (place / "stamps").is_file() and (place / "stamps").stat().st_size > _LONG:
            kept = [(n, *line) for n, line in read_stamps(place).items() if (place / n).is_file()]
            atomic_write_text(place / "stamps", "".join(f"{n}\t{stamp}\t{used}\n" for n, stamp, used in kept))
    return left


def _places_in(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if _CACHE_ID.fullmatch(each.name)]


def _copies_in(folder: Path) -> Iterator[_Copy]:
    """Every copy, and what is being made."""
    for place in _places_in(folder):
        stamps = read_stamps(place)
        for parent, _, names in os.walk(place):
            for path in (Path(parent, name) for name in names):
                name = path.relative_to(place).as_posix()
                if name == "stamps" or name.startswith("locks/"):
                    continue
                with suppress(FileNotFoundError):  # removed or renamed meanwhile
                    used = _UNFINISHED if name.startswith("tmp/") else stamps.get(name, ("", 0))[1]
                    yield _Copy(path, path.lstat().st_size, used)


def read_stamps(place: Path) -> dict[str, tuple[str, int]]:
    """Stamp and last use of the copies that were checked; the later lines count."""
    path = place / "stamps"
    text = read_text(path, RECORDS_BYTES) if path.is_file() else ""
    lines = (line.split("\t") for line in text.split("\n"))
    return {line[0]: (line[1], int(line[2])) for line in lines if len(line) == 3 and line[2].isdecimal()}


@contextmanager
def _held(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold what a file stands for alone; the file goes with the block. The kernel lets go for a dead process.

    Raises:
        BlockingIOError: another process holds it, and it is not to be waited for.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is_at(descriptor, path):  # it was removed while we waited
                continue
            try:
                yield
            finally:
                path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
