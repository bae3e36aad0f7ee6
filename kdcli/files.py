"""Files that are whole or absent, and what the operating system refuses about them."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdcli.errors import ClaimedError, KdError, NoSpaceError, StorageError, nearest
from kdcli.runtime import machine


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals about ``path`` into errors with a code and a hint."""
    try:
        yield
    except KdError:
        raise
    except Exception as error:
        known = storage_error(error, path)
        if known is None:
            raise
        raise known from error


def storage_error(error: Exception, path: Path | str) -> NoSpaceError | StorageError | None:
    """What the operating system refused, in Python or in a library that tells it in words; None for all else.

    Args:
        error: an OSError, or what safetensors and HDF5 make of one.
        path: what it was about, if it does not say.
    """
    number, where, reason = None, path, str(error)
    if isinstance(error, OSError):
        number, where, reason = (
            error.errno,
            error.filename2 or error.filename or path,
            error.strerror or reason,
        )
    if isinstance(where, str) and _TEMPORARY.fullmatch(Path(where).name):
        where = path  # the user knows the file, not the name that it has until it is whole
    if number is None and (found := _TOLD.search(reason)):
        number = int(found[1])
        reason = os.strerror(number)
    if number in _FULL:
        return NoSpaceError(
            f"no space left for {where}: {reason}", "Free some space, then run the same command again."
        )
    if number is None and not isinstance(error, OSError):
        return None
    return StorageError(
        f"{where}: {reason}", "Check the path and its permissions, then run the same command again."
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOLD = re.compile(r"(?:os error |errno = )(\d+)")
_UNPUBLISHED = re.compile(r"\..+\.([0-9a-f]{12})-(\d+)-[0-9a-f]{16}\.tmp")
_TEMPORARY = re.compile(r"\..+\.tmp")
_DEAD_SECONDS = 600.0
"""A process of another machine that did not touch its file for this long is dead."""


def real_path(path: Path | str) -> Path:
    """Where a path leads once every link is followed; of links in a circle one of them, where Path.resolve raises."""
    return Path(os.path.realpath(path))


def beside(path: Path, folders: bool = False) -> str:
    """``" Did you mean 'x'?"`` with what lies where a path goes wrong, or an empty string.

    Args:
        path: what is not there.
        folders: whether only a folder can be meant.
    """
    wrong = path
    while not os.path.lexists(wrong.parent):
        wrong = wrong.parent
    try:
        names = sorted(each.name for each in os.scandir(wrong.parent) if each.is_dir() or not folders)
    except OSError:  # no permission, or a file: then nothing is suggested
        return ""
    return nearest(wrong.name, names, "" if wrong.parent == Path() else f"{wrong.parent}/")


def bytes_in(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.stat().st_size for each in files if each.is_file())


def scratch_name() -> str:
    """A new name for an unpublished file; it tells whose it is, so that what a killed process left is known."""
    return f"{machine()}-{os.getpid()}-{os.urandom(8).hex()}"


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that a power cut cannot take them from under what is put in them."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def atomic_write_bytes(path: Path, data: bytes, tmp: Path | None = None) -> None:
    """Write a file that a reader sees whole or not at all, also after a power cut.

    What a killed process left of the same file is removed.

    Args:
        path: the file; its folder exists.
        data: what to write.
        tmp: folder on the same file system for the unpublished file; default: that of the file.
    """
    # The name must be new on every host: two that shared it would write into each other's file.
    temporary = (tmp or path.parent) / f".{path.name}.{scratch_name()}.tmp"
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if tmp is None:
                _sweep(
                    path, now=temporary.stat().st_mtime
                )  # before: what exists already may not be written again
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def _sweep(path: Path, now: float) -> None:
    """Remove what killed processes left of a file that they were writing."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_dead(other, now):
            other.unlink(missing_ok=True)


def _is_dead(unpublished: Path, now: float) -> bool:
    """Whether the process that was writing a file is gone: known on its machine, else told by silence."""
    owner = _UNPUBLISHED.fullmatch(unpublished.name)
    if owner is None:
        return False
    with suppress(FileNotFoundError, PermissionError):  # finished meanwhile; alive, and somebody else's
        if owner[1] != machine():
            return now - unpublished.stat().st_mtime > _DEAD_SECONDS
        try:
            os.kill(int(owner[2]), 0)
        except (ProcessLookupError, OverflowError):
            return True
    return False


_held: set[int] = set()
"""Folders that this process occupies, opened; a process that it forks does not."""


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other processes of kd out of an output folder for the time of the block; a kill ends it, too.

    A file system without locks does not keep anybody out.

    Raises:
        ClaimedError: another process occupies it.
    """
    with storage_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        if not _lock(descriptor):
            raise ClaimedError(
                f"{_holder(descriptor)} is at work in {folder}",
                "Wait until it has ended, or choose another folder.",
            )
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def is_occupied(folder: Path) -> bool:
    """Whether another block of :func:`occupied` holds the folder, of any process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who has locked a folder, where Linux tells it."""
    with suppress(OSError):
        inode = str(os.fstat(descriptor).st_ino)
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return f"process {fields[4]}"
    return "another process"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # NFS locks no folders
        return True
    return True


def holds_files(folder: Path) -> bool:
    """Whether there is anything in a folder but what a killed process of kd left unpublished.

    A process that is killed within :func:`atomic_write_bytes` of a folder's first file leaves that file's temporary
    name alone in it; the folder is as good as empty.
    """
    return any(not _UNPUBLISHED.fullmatch(entry.name) for entry in folder.iterdir())


def atomic_write_text(path: Path, text: str) -> None:
    """:func:`atomic_write_bytes` for text in UTF-8."""
    atomic_write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON, whole or not at all. NaN is not JSON and refused."""
    atomic_write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def create_text(path: Path, text: str, tmp: Path, durable: bool = True) -> bool:
    """:func:`create_bytes` for text in UTF-8."""
    return create_bytes(path, text.encode(), tmp, durable)


def create_bytes(path: Path, data: bytes, tmp: Path, durable: bool = True) -> bool:
    """Create a file that nobody ever sees half-written; False, and nothing changed, when it is there.

    Args:
        path: the file; its folder exists.
        data: what to write.
        tmp: folder on the same file system for the unpublished file.
        durable: also after a power cut.
    """
    temporary = tmp / scratch_name()
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS says so, too, when its answer to the very link that made it was lost.
                return temporary.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            raise StorageError(
                f"{path}: the file system has no hard links ({error.strerror}), by which kd writers tell who "
                "was first",
                "Put the cache on a local disk, NFS, Lustre or GPFS.",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            fsync_folder(path.parent)
    return True


def create_json(path: Path, document: Any, tmp: Path) -> bool:
    """:func:`create_text` for a JSON document. NaN is not JSON and refused."""
    return create_text(path, json.dumps(document, allow_nan=False), tmp)


def sizes_in(path: Path) -> dict[Path, int]:
    """Bytes of a file, or of every file in a folder and below; what is gone meanwhile is left out."""
    walked = () if path.is_symlink() else os.walk(path)
    found = [Path(folder, name) for folder, _, names in walked for name in names]
    sizes = {}
    for file in found or ([] if path.is_dir() and not path.is_symlink() else [path]):
        with suppress(FileNotFoundError):
            sizes[file] = file.lstat().st_size
    return sizes


def available_bytes(path: Path) -> int:
    """Free bytes on the file system of the nearest existing parent of ``path``."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
