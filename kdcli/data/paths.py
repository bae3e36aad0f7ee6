"""The files that ``SCHEME/REST`` means: one, or all that a folder holds or a pattern matches."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, final

from kdcli.data.base import Opening
from kdcli.errors import BadDataError, NotFoundError
from kdcli.files import beside, storage_errors
from kdcli.reading import open_regular

Reader = Callable[[int, int], bytes]
"""Reads from a place so many bytes."""


@final
@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file in one state.

    Attributes:
        path: absolute, links followed.
        size: bytes.
        modified: nanoseconds.
        inode: of its file system.
    """

    path: str
    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """The file as it is now.

        Raises:
            StorageError: it cannot be looked at.
        """
        real = os.path.realpath(path)
        with storage_errors(path):
            return cls._of(real, Path(real).stat())

    @classmethod
    def _of(cls, path: str, status: os.stat_result) -> "FileStamp":
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def require_same(self, descriptor: int) -> None:
        """Refuse an open file that is not in this state.

        Raises:
            BadDataError: somebody wrote to it, or put another in its place.
        """
        if FileStamp._of(self.path, os.fstat(descriptor)) != self:
            raise BadDataError(f"{self.path} has changed since it was opened", "Run the command again.")

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """What reads so many bytes of the file from a place, fewer at its end.

        Raises:
            BadDataError: it is another file now, or no regular one.
            StorageError: it cannot be read.
        """
        with storage_errors(self.path):
            descriptor = open_regular(Path(self.path), None)
            try:
                self.require_same(descriptor)
                yield partial(_read_at, descriptor)
            finally:
                os.close(descriptor)


def _read_at(descriptor: int, start: int, count: int) -> bytes:
    data = os.pread(descriptor, count, start)
    while len(data) < count and (more := os.pread(descriptor, count - len(data), start + len(data))):
        data += more
    return data


def find_file(opening: Opening) -> Path:
    """The absolute path of the file of ``SCHEME/FILE``, below the data root or here.

    Raises:
        NotFoundError: there is none; what lies beside it is suggested.
        StorageError: it cannot be looked at.
    """
    places = [root / opening.rest for root in (opening.data_root, Path()) if root is not None]
    for place in places:
        with storage_errors(place):
            if place.exists():
                return Path(os.path.normpath(place.absolute()))
    raise NotFoundError(
        f"there is no file {places[-1].absolute()}.{beside(places[-1])}",
        f"Check the path, or give --data-root; a folder of images in a folder called {opening.scheme} is written "
        f"folder/{opening.scheme}/...",
    )


@final
@dataclass(frozen=True, slots=True)
class Found:
    """Files.

    Attributes:
        place: the absolute file, folder or pattern, or the URL, that they were found by.
        where: what a person calls the folder of all.
        base: the folder on this machine that a relative ``names=`` begins in.
        stamps: the files as they are now, by their paths below it, sorted, with / between folders.
        options: of the source.
    """

    place: str
    where: str
    base: Path
    stamps: Mapping[str, FileStamp]
    options: Mapping[str, str]

    @classmethod
    def here(cls, opening: Opening, place: Path, base: Path, names: Iterable[str]) -> Self:
        """Files of a folder.

        Raises:
            StorageError: one cannot be looked at.
        """
        stamps = {name: FileStamp.of(base / name) for name in sorted(names)}
        return cls(place.as_posix(), str(base), base, stamps, opening.options)


def find_files(opening: Opening, ending: str) -> Found:
    """The files that are meant on this machine.

    Args:
        opening: whose rest is a file, a folder, or a pattern with ``*``, ``?``, ``[...]`` and ``**``.
        ending: of the names of files in a folder.

    Raises:
        NotFoundError: there is none.
        StorageError: a folder cannot be read.
    """
    try:
        place = find_file(opening)
    except NotFoundError:
        if not glob.has_magic(opening.rest):
            raise
        return _matching(opening)
    if not place.is_dir():
        return Found.here(opening, place, place.parent, (place.name,))
    with storage_errors(place):
        names = [
            (Path(folder) / name).relative_to(place).as_posix()
            for folder, _, held in os.walk(place)
            for name in held
            if name.lower().endswith(ending) and not name.startswith(".")
        ]
    if not names:
        raise NotFoundError(
            f"there is no {ending} file in {place}", f"Give a {ending} file, or a folder of them."
        )
    return Found.here(opening, place, place, names)


def _matching(opening: Opening) -> Found:
    for root in (opening.data_root, Path()):
        if root is None:
            continue
        place = Path(os.path.normpath(root.absolute() / opening.rest))
        parts = place.parts
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        base, pattern = Path(*parts[:fixed]), "/".join(parts[fixed:])
        with storage_errors(base):
            matched = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207  (names below the folder)
            names = [name for name in matched if (base / name).is_file()]
        if names:
            return Found.here(opening, place, base, names)
    raise NotFoundError(
        f"no file matches {opening.rest}", "Check the pattern, or give --data-root; quote it in a shell."
    )
