"""Files that are whole or absent, and what the operating system refuses about them."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdcli.errors import KdError, NoSpaceError, StorageError
from kdcli.runtime import machine


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals about ``path`` into errors with a code and a hint."""
    try:
        yield
    except KdError:
        raise
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"no space left for {where}: {reason}", "Free some space, then run the same command again."
            ) from error
        raise StorageError(
            f"{where}: {reason}", "Check the path and its permissions, then run the same command again."
        ) from error


_UNPUBLISHED = re.compile(r"\..+\.[0-9a-f]{12}-\d+-[0-9a-f]{16}\.tmp")


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
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def atomic_write_bytes(path: Path, data: bytes, tmp: Path | None = None) -> None:
    """Write a file that a reader sees whole or not at all, also after a power cut.

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
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


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
    """Create a file that nobody ever sees half-written; False, and nothing changed, when it is there.

    Args:
        path: the file; its folder exists.
        text: what to write.
        tmp: folder on the same file system for the unpublished file.
        durable: also after a power cut.
    """
    temporary = tmp / scratch_name()
    with storage_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
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


def available_gb(path: Path) -> float:
    """Free space, in GB, on the file system of the nearest existing parent of ``path``."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9
