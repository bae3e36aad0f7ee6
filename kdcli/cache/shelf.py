"""Files on a disk of this machine that are there whole or not at all, shared by its processes.

DIR/
  lock, used                      taken by who makes room; bytes of all copies
  in-use/                         what a process needs for as long as it lives: the kernel knows
  <32 hexadecimal digits>/        copies of one origin: a cache, a folder of shards
    stamps                        how each copy was left, and when it was last named to a reader: a line each time
    tmp/, locks/                  copies that are being made, and who makes them: the kernel knows
    NAME                          a copy; another content has another name

Under a limit the copies that were not used for the longest time go first, but none that is in use. One that is mapped
stays readable, and takes its space until it is unmapped.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Self, final

from kdcli.cache.owned import RECORDS_BYTES, stamp_of
from kdcli.console import size
from kdcli.errors import Advice, NoSpaceError, UsageError
from kdcli.files import atomic_write_text, available_bytes, make_folder, scratch_name, storage_errors
from kdcli.reading import read_text

STREAMS: Final = 16
"""Most files that are read at a time: one connection alone does not fill a line."""
KEPT: Final = 0.9
"""Share of the limit that is kept when it is reached, so that not every copy has to make room."""
_ORIGIN: Final = re.compile("[0-9a-f]{32}")
_LONG: Final = 2**20
"""Bytes of stamps from which on those of removed copies are left out."""
_UNFINISHED: Final = 2**63
"""Later than any use: of copies that are being made."""
_IN_USE: Final[list[int]] = []
"""Descriptors by which this process, and what is forked from it, holds names in ``in-use``."""


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


@final
class Shelf:
    """The copies of one origin."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.place = stage, stage.folder / name
        self._known: dict[str, str] = {}

    def prepare(self) -> None:
        """Make the folders; remove what killed processes left half made."""
        with storage_errors(self.place):
            for name in ("tmp", "locks"):
                make_folder(self.place / name)
            tmp, locks = self.place / "tmp", self.place / "locks"
            for name in {path.name for folder in (tmp, locks) for path in folder.iterdir()}:
                with suppress(BlockingIOError), _held(locks / name, wait=False):
                    (tmp / name).unlink(missing_ok=True)

    def require_space(self, total: int) -> None:
        """Refuse so many bytes more than the disk has.

        Raises:
            NoSpaceError: they do not fit.
        """
        free = available_bytes(self.place)
        if total > free:
            raise NoSpaceError(
                f"{size(total)} are to be copied to {self.place}, where {size(free)} are free",
                Advice("small-stage"),
            )

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those without a copy as it was left."""
        missing = [name for name in names if not self._is_here(name)]
        if missing:
            self._known = {name: stamp for name, (stamp, _) in _read_stamps(self.place).items()}
        return [name for name in missing if not self._is_here(name)]

    def use(self, name: str) -> Path | None:
        """The copy for who is about to open it, as it was left by who made it: it is the last to be removed now."""
        if self.lacking([name]):
            return None
        with suppress(FileNotFoundError):
            self._note(name, stamp_of(self.place / name))
        return self.place / name

    def _is_here(self, name: str) -> bool:
        try:
            return stamp_of(self.place / name) == self._known.get(name)
        except FileNotFoundError:
            return False

    def _note(self, name: str, stamp: str) -> None:
        self._known[name] = stamp
        with (self.place / "stamps").open("a") as stamps:  # one write: other processes add to it, too
            stamps.write(f"{name}\t{stamp}\t{time.time_ns()}\n")

    def make(self, name: str, count: int, fill: Callable[[BinaryIO], None]) -> int:
        """Make a copy, or wait for who is making it.

        Args:
            name: of the copy.
            count: its bytes.
            fill: writes them.

        Returns:
            Bytes copied: 0 where another process was faster.

        Raises:
            NoSpaceError, StorageError: the disk is full, or cannot be written.
        """
        target, flat = self.place / name, name.replace("/", "+")
        temporary = self.place / "tmp" / flat
        with storage_errors(target), _held(self.place / "locks" / flat):
            if not self.lacking([name]):
                return 0
            try:
                with temporary.open("wb") as file:
                    self._make_room(file.fileno(), count)
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                temporary.unlink(missing_ok=True)  # a full disk refuses even the name
                raise
            make_folder(target.parent)
            temporary.replace(target)
            with suppress(FileNotFoundError):  # another process that needed room has removed it already
                self._note(name, stamp_of(target))
        return count

    # --- under a limit ----------------------------------------------------------------------------

    def _make_room(self, descriptor: int, count: int) -> None:
        """Take the space of a copy, if other copies have to go for it."""
        folder, limit = self.stage.folder, self.stage.limit
        with _alone(folder):
            try:
                used = int(read_text(folder / "used", 64))
            except (OSError, ValueError):
                used = sum(each.size for each in _copies_in(folder))
            if limit is not None and used + count > limit:
                used = _evict(folder, int(limit * KEPT) - count)
            os.truncate(descriptor, count)  # counts from now on, whoever looks
            (folder / "used").write_text(str(used + count))


def keep(stage: Stage, sizes: Mapping[Path, int]) -> None:
    """Let no copy of these be removed for as long as this process, or one that is forked from it, lives.

    Args:
        stage: where they are.
        sizes: bytes of each, by its path below the stage; they need not be there yet.

    Raises:
        UsageError: together with what other processes keep they are more than the limit.
    """
    folder, limit = stage.folder, stage.limit
    with storage_errors(folder):
        make_folder(folder / "in-use")
        with _alone(folder):
            others = {path: count for path, count in _kept(folder).items() if path not in sizes}
            needed = sum(sizes.values())
            if limit is not None and needed + sum(others.values()) > limit:
                beside = f", beside {size(sum(others.values()))} that are in use" if others else ""
                raise UsageError(
                    f"the stage may hold {size(limit)}, and {size(needed)} are read and have to be kept on this "
                    f"disk{beside}",
                    Advice("stage-limit"),
                )
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(folder / "in-use" / scratch_name(), flags, 0o666)
            _IN_USE.append(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with os.fdopen(os.dup(descriptor), "w") as file:
                file.writelines(
                    f"{count}\t{path.relative_to(folder).as_posix()}\n" for path, count in sizes.items()
                )


def _kept(folder: Path) -> dict[Path, int]:
    """What processes that live keep, and its bytes; what the others did is forgotten."""
    found: dict[Path, int] = {}
    for each in (folder / "in-use").iterdir() if (folder / "in-use").is_dir() else ():
        try:
            with _held(each, wait=False):
                continue
        except BlockingIOError:
            pass
        for line in read_text(each, RECORDS_BYTES).splitlines():
            count, _, name = line.partition("\t")
            found[folder / name] = int(count)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Among those who make room."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    kept = _kept(folder)
    found = sorted(_copies_in(folder), key=lambda copy: copy.used)
    left = sum(copy.size for copy in found)
    for copy in found:
        if left <= target:
            break
        if copy.used < _UNFINISHED and copy.path not in kept:
            copy.path.unlink(missing_ok=True)
            left -= copy.size
    for place in _places_in(folder):
        if (place / "stamps").is_file() and (place / "stamps").stat().st_size > _LONG:
            lines = [(n, *line) for n, line in _read_stamps(place).items() if (place / n).is_file()]
            atomic_write_text(
                place / "stamps", "".join(f"{n}\t{stamp}\t{used}\n" for n, stamp, used in lines)
            )
    return left


def _places_in(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if _ORIGIN.fullmatch(each.name)]


def _copies_in(folder: Path) -> Iterator[_Copy]:
    """Every copy, and what is being made."""
    for place in _places_in(folder):
        stamps = _read_stamps(place)
        for parent, _, names in os.walk(place):
            for path in (Path(parent, name) for name in names):
                name = path.relative_to(place).as_posix()
                if name == "stamps" or name.startswith("locks/"):
                    continue
                with suppress(FileNotFoundError):  # removed or renamed meanwhile
                    used = _UNFINISHED if name.startswith("tmp/") else stamps.get(name, ("", 0))[1]
                    yield _Copy(path, path.lstat().st_size, used)


def _read_stamps(place: Path) -> dict[str, tuple[str, int]]:
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
