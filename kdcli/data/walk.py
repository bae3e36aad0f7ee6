"""A walk through a folder: the keys of its images, and what was come by that is none.

* Hidden files are skipped. Folders that systems make (``@eaDir``, ``$RECYCLE.BIN``, ...) are left out, and counted.
* Images that are no samples are counted: by their ending, and by their first bytes where a name has no ending.
* A pipe, a socket or a device that is called like an image is a sample, and a bad one; so is a folder without images.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from kdcli.data.formats import ARCHIVES, EXTENSIONS, HEAD_BYTES, STRANGE, VIDEOS, format_of, lacking
from kdcli.data.names import alike
from kdcli.errors import BadDataError
from kdcli.reading import open_regular

SYSTEM: Final = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found", "found.000", "__macosx", ".ipynb_checkpoints", ".appledouble"),
        *(".trashes", ".trash-0", ".trash-1000", ".spotlight-v100", ".fseventsd", ".snapshot", ".thumbnails"),
    }
)  # fmt: skip
"""Folders of file servers, recycle bins and notebooks, in lower case."""


@final
@dataclass(slots=True)
class Tally:
    """Things of one kind.

    Attributes:
        kinds: how many there are, by what they are called.
        example: the first one's key.
        tops: how many there are in each folder at the top of the walk; '' is the top itself.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    example: str = ""
    tops: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, key: str, top: str) -> None:
        """Count one."""
        self.kinds[kind] += 1
        self.example = self.example or key
        self.tops[top] += 1

    def __len__(self) -> int:
        return self.kinds.total()


@final
@dataclass(slots=True)
class Walk:
    """A walk below a folder.

    Attributes:
        root: the folder.
        prefix: what of it is walked: empty, or a sub folder and a slash.
        endings: of samples.
        strange: images by their ending that are no samples.
        nameless: images by their first bytes, whose names have no ending.
        system: folders of systems.
        archives: files that may hold images.
        videos: files that hold frames.
        unread: samples that this installation cannot read, by their format.
        alike: pairs of names in one folder that look the same: see :func:`~kdcli.data.names.alike`.
        hollow: folders at the top without a sample.
    """

    root: Path
    prefix: str = ""
    endings: frozenset[str] = EXTENSIONS
    strange: Tally = field(default_factory=Tally)
    nameless: Tally = field(default_factory=Tally)
    system: Tally = field(default_factory=Tally)
    archives: Tally = field(default_factory=Tally)
    videos: Tally = field(default_factory=Tally)
    unread: Tally = field(default_factory=Tally)
    alike: list[tuple[str, str]] = field(default_factory=list)
    hollow: list[str] = field(default_factory=list)

    def keys(self) -> Iterator[str]:
        """Keys of all images, in plain string order.

        Raises:
            BadDataError: a folder is within itself by a link, or a name is not UTF-8.
            OSError: a folder cannot be read.
        """
        folder = self.root / self.prefix
        here = _identity(folder)
        for name, is_folder in self._entries(folder, self.prefix, ""):
            if not is_folder:
                yield self.prefix + name
                continue
            held = 0
            for key in self._below(folder / name, f"{self.prefix}{name}/", name, frozenset({here})):
                held += 1
                yield key
            if not held:
                self.hollow.append(name)

    def _below(self, folder: Path, prefix: str, top: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        here = _identity(folder)
        if here in above:
            raise BadDataError(f"{folder} is a link to a folder that contains it", "Remove the link.")
        held = False
        for name, is_folder in self._entries(folder, prefix, top):
            if not is_folder:
                held = True
                yield prefix + name
                continue
            for key in self._below(folder / name, f"{prefix}{name}/", top, above | {here}):
                held = True
                yield key
        if not held and _ending(folder.name) in self.endings:
            yield prefix[:-1]  # a folder called like an image: a sample that cannot be read

    def _entries(self, folder: Path, prefix: str, top: str) -> list[tuple[str, bool]]:
        """Visible sub folders and images, so ordered that a walk yields keys in plain string order."""
        found: list[tuple[str, bool]] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") and name.lower() not in SYSTEM:
                    continue
                is_folder = _is_folder(entry)
                if is_folder:
                    if name.lower() in SYSTEM:
                        self.system.add(name, prefix + name, top)
                    else:
                        found.append((_checked(name, folder), True))
                elif (ending := _ending(name)) in self.endings:
                    found.append((_checked(name, folder), False))
                    if (kind := lacking(ending)) is not None:
                        self.unread.add(kind, prefix + name, top)
                else:
                    self._pass_by(entry, prefix, top)
        self.alike += [(prefix + one, prefix + other) for one, other in alike(name for name, _ in found)]
        return sorted(found, key=lambda item: f"{item[0]}/" if item[1] else item[0])

    def _pass_by(self, entry: "os.DirEntry[str]", prefix: str, top: str) -> None:
        """Count a file that is no sample, if it may be an image or hold some."""
        name, ending = entry.name, _ending(entry.name)
        if ending in STRANGE:
            self.strange.add(ending, prefix + name, top)
        elif name.lower().endswith(ARCHIVES):
            self.archives.add(ending, prefix + name, top)
        elif ending in VIDEOS:
            self.videos.add(ending, prefix + name, top)
        elif not ending and (kind := _sniffed(entry.path)) is not None:
            self.nameless.add(kind, prefix + name, top)


def sample_folders(folder: Path, endings: frozenset[str] = EXTENSIONS) -> list[str]:
    """Names of the sub folders that hold a sample at any depth."""
    here = frozenset({_identity(folder)})
    walk = Walk(folder, endings=endings)
    return [
        name
        for name, is_folder in walk._entries(folder, "", "")
        if is_folder and next(walk._below(folder / name, "", name, here), None) is not None
    ]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: whoever opens it says so
        return False


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  (1M names)


def _sniffed(path: str) -> str | None:
    with suppress(OSError, BadDataError):  # what cannot be read, or is no file, is not known to be an image
        descriptor = open_regular(Path(path), 1 << 62)
        try:
            return format_of(os.read(descriptor, HEAD_BYTES))
        finally:
            os.close(descriptor)
    return None


def _checked(name: str, folder: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadDataError(f"{folder}: the file name {name!r} is not UTF-8", "Rename the file.") from error
    return name
