"""What lies in a cache: regular files and real folders, each in its place. No link in a cache is followed.

A cache may come from anybody. Through a link in it, whoever made it would have another one's files read, written
over or removed; so a link is refused, wherever it leads. The cache's own folder may be reached by one.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kdcli.errors import Advice, CorruptError, UsageError
from kdcli.files import real_path, storage_errors
from kdcli.reading import DOCUMENT_BYTES, open_regular, parse_json, read_bytes

RECORDS_BYTES: Final = 2**32
"""Most bytes of the joined records of a part: some millions of them."""
CHUNK_BYTES: Final = 2**34
"""Most bytes of a chunk; kd aims at 16 MB."""


def repair_hint(source: object) -> Advice:
    """To repair the cache that ``source``, a file or the cache itself, is in."""
    folders = [source, *source.parents] if isinstance(source, Path) else []
    root = next((folder for folder in folders if (folder / "manifest.json").is_file()), "CACHE")
    return Advice("repair", cache=root)


def read_own(path: Path, most: int = DOCUMENT_BYTES, hint: str | Advice = "") -> bytes:
    """The bytes of a file of a cache.

    Args:
        path: the file.
        most: bytes that it may have.
        hint: what to do about what is no file; default: repair the cache.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
        CorruptError: it is no regular file, or larger than ``most``.
    """
    try:
        with storage_errors(path), _hinted(path, hint):
            return read_bytes(path, most, CorruptError, links=False)
    except OSError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from error
        raise


def open_own(path: Path) -> int:
    """A descriptor of a chunk.

    Raises:
        OSError: the operating system refuses.
        CorruptError: it is no regular file, or too large.
    """
    with _hinted(path):
        return open_regular(path, CHUNK_BYTES, CorruptError, links=False)


@contextmanager
def _hinted(path: Path, hint: str | Advice = "") -> Iterator[None]:
    """Say what to do about a file of a cache that is none; its cache is looked for only then."""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(error.message, hint or repair_hint(path)) from error


def read_own_json(path: Path, hint: Any) -> Any:
    """The JSON document in a file of a cache.

    Raises:
        StorageError: it is not there, or cannot be read.
        CorruptError: it is no regular file, or no such document.
    """
    with storage_errors(path):
        return parse_json(read_own(path, hint=hint), path, CorruptError, hint)


def regular_size(path: Path) -> int:
    """Bytes of a file of a cache; -1 of what is no regular file.

    Raises:
        OSError: it cannot be looked at, or is not there.
    """
    status = os.lstat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def stamp_of(path: Path) -> str:
    """Size, modification time, change time and inode of a file: whoever writes to it, or puts another in its place,
    changes one of them. Times can be set back, the change time by nobody but the system's clock.

    Raises:
        OSError: it cannot be looked at, or is not there.
    """
    status = os.lstat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def looks_like_cache(folder: Path) -> bool:
    """Whether a folder is a cache, or the remains of one: told by its names, nothing is opened."""
    marks = ("manifest.json", "data.zarr", "data.hdf5")
    return os.path.lexists(folder / "commits") and any(os.path.lexists(folder / mark) for mark in marks)


def require_outside_caches(target: Path) -> None:
    """Refuse to make anything inside a cache.

    Raises:
        UsageError: a folder above ``target`` is a cache.
    """
    place = real_path(target.absolute().parent)
    for folder in (place, *place.parents):
        if looks_like_cache(folder):
            raise UsageError(
                f"{target} would be inside the cache {folder}", "Give a path outside every cache."
            )


def require_unlinked(root: Path, folders: Iterable[Path]) -> None:
    """Refuse a cache in which a folder, or one above it, is a link.

    Args:
        root: the cache's folder.
        folders: in it; they need not exist.

    Raises:
        CorruptError: naming the link.
        StorageError: a folder cannot be looked at.
    """
    seen = {root}
    for folder in folders:
        for place in (folder, *folder.parents):
            if place in seen:
                break
            seen.add(place)
            with storage_errors(place):
                leads = place.readlink() if place.is_symlink() else None
            if leads is not None:
                raise CorruptError(
                    f"{place} is a link to {leads}; no file or folder of a cache may be one",
                    "Put what it leads to in its place, or remove the link.",
                )
