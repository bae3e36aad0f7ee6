"""What packing, unpacking and merging share: committed units, sound bytes, and results that appear whole."""

import ctypes
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from kdcli.cache.admin.audit import audit
from kdcli.cache.classifier import Classifier
from kdcli.cache.commits import Commit, as_lines, read_commits
from kdcli.cache.garbage import is_abandoned
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Layout, Manifest
from kdcli.cache.owned import repair_hint, require_outside_caches
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.cache.writer import build_skeleton
from kdcli.console import console, size
from kdcli.documents import to_document
from kdcli.errors import Advice, CorruptError, NoSpaceError, OutputExistsError
from kdcli.files import (
    atomic_write_text,
    available_bytes,
    fsync_folder,
    make_folder,
    scratch_name,
    sizes_in,
    storage_errors,
)
from kdcli.results import Result, Table

_HERE: Final = -100
_EXCHANGE: Final = 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2."""


_LEGEND = {"part": "an output of a teacher", "of": "blocks of images"}


@final
@dataclass(frozen=True, slots=True)
class Moved(Result):
    """What was packed, unpacked or merged.

    Attributes:
        path: what was made.
        parts: per part the units that are in it, and those that it has when it is complete.
    """

    path: Path
    cache_id: str
    backend: str
    parts: dict[str, tuple[int, int]]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return all(done == total for done, total in self.parts.values())

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **to_document(self, "path", "cache_id", "backend"),
            "bytes": sum(sizes_in(self.path).values()),
            "complete": self.complete,
            "parts": {part: {"done": done, "total": total} for part, (done, total) in self.parts.items()},
        }

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        return (parts_table(self.parts),)


def parts_table(parts: Mapping[str, tuple[int, int]]) -> Table:
    """Units of each part: how many there are, of how many."""
    rows = [(part, *counts) for part, counts in parts.items()]
    return Table(("part", "done", "of"), rows, legend=_LEGEND)


def committed(reader: CacheReader, part: str) -> list[Commit]:
    """The records of a part, in order.

    Raises:
        CorruptError: the files of a finished unit are missing or short. Readers take its rows for missing and a
            job computes them again; a copy must not leave them out without a word.
    """
    recorded = read_commits(reader.layout, part)  # first: others may be adding to it
    sound = reader.commits(part)
    for place, commit in sorted(recorded.items()):
        if place not in sound and reader.manifest.holds(*place):
            raise CorruptError(
                f"{reader.layout.root}: {commit.unit} is committed, but its files are missing or short",
                Advice("fill-first"),
            )
    return [sound[place] for place in sorted(sound)]


def require_sound(store: Store, path: Path, size: int, crc: int, name: object) -> None:
    """Read a chunk and compare it with its record.

    Raises:
        CorruptError: naming ``name``.
    """
    found = store.inspect(path)
    if (found.size, found.crc) != (size, crc) or not found.sound:
        raise CorruptError(f"{name}: its bytes are not those that were committed", repair_hint(path))


def units(store: Store, commits: dict[str, list[Commit]]) -> dict[str, tuple[int, int]]:
    """Per part, how many units there are of how many."""
    return {part: (len(found), len(list(store.units_of(part)))) for part, found in commits.items()}


def require_space(path: Path, needed: int) -> None:
    """Refuse before hours of copying what cannot fit.

    Raises:
        NoSpaceError: fewer bytes than ``needed`` are free where ``path`` will be.
    """
    free = available_bytes(path.absolute().parent)
    if needed > free:
        raise NoSpaceError(
            f"{path} needs {size(needed)}, and {size(free)} are free there",
            "Free some space, or give a path on another file system.",
        )


# --- caches -----------------------------------------------------------------------------------


def require_new(target: Path) -> None:
    """Refuse a place where something is.

    Raises:
        OutputExistsError: it is a file, or a folder that is not empty.
    """
    with storage_errors(target):
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise OutputExistsError(f"{target} exists already", "Give a new or empty folder.")


def same_cache(target: Path, manifest: Manifest, teachers: Iterable[TeacherRecord]) -> CacheReader | None:
    """The cache at ``target`` if it has this manifest and these teachers."""
    if not Layout(target).manifest.is_file():
        return None
    there = CacheReader(target)
    alike = there.manifest == manifest and there.teachers == {record.name: record for record in teachers}
    return there if alike else None


def made_before(there: CacheReader, commits: Mapping[str, list[Commit]]) -> Moved | None:
    """What a call made that was killed when it was done: a cache of these very units, every byte as recorded."""
    found = {part: committed(there, part) for part in there.store.parts()}
    for part, mine in found.items():
        theirs = {commit.unit: commit for commit in commits[part]}
        if theirs.keys() != {commit.unit for commit in mine}:
            return None
        if not all(commit.same_data(theirs[commit.unit]) for commit in mine):
            return None
    root = there.layout.root
    if not audit(root).ok:
        return None
    say_made_before(root)
    return Moved(root, there.manifest.cache_id, there.manifest.backend, units(there.store, found))


def say_made_before(target: Path) -> None:
    """Tell it, and remove what the call that made it left when it was killed."""
    _sweep(target)
    console.note(f"{target} is what this makes already")


def start_cache(
    root: Path,
    manifest: Manifest,
    keys: KeyTable,
    labels: Any,
    teachers: Iterable[TeacherRecord],
    classifiers: Mapping[str, Classifier],
) -> Store:
    """An empty cache with its teachers and their classifiers, to be filled by somebody who has the bytes already."""
    layout = Layout(root)
    with storage_errors(root):
        build_skeleton(layout, manifest, keys, labels)
        store = Store(root, manifest)
        for record in teachers:
            store.add_teacher(record)
            if record.name in classifiers:
                store.add_classifier(record.name, classifiers[record.name])
        store.write_metadata(keys)
    return store


def classifiers_in(stores: Iterable[Store], teachers: Iterable[TeacherRecord]) -> dict[str, Classifier]:
    """The classifiers that any of some caches keeps of these teachers."""
    names = {record.name for record in teachers}
    found: dict[str, Classifier] = {}
    for store in stores:
        for name in names & store.teachers.keys() - found.keys():
            if (classifier := store.classifier(name)) is not None:
                found[name] = classifier
    return found


def finish_cache(store: Store, commits: dict[str, list[Commit]]) -> None:
    """Write the records of what was filled in, and for HDF5 the index."""
    for part, found in commits.items():
        if found:
            path = store.layout.compacted(part)
            with storage_errors(path):
                make_folder(path.parent)
            atomic_write_text(path, as_lines(found))
    if store.manifest.backend == "hdf5" and any(commits.values()):
        from kdcli.cache.hdf5_index import write_index

        write_index(store)


def parts_of(teachers: Iterable[TeacherRecord]) -> list[str]:
    """The samples, and every kind that is kept of these teachers."""
    return [SAMPLES, *(f"{record.name}/{kind}" for record in teachers for kind in record.outputs)]


# --- whole or not at all ----------------------------------------------------------------------


@contextmanager
def published(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to, renamed to ``target`` when the block ends well, and removed when it does not.

    Raises:
        UsageError: ``target`` is inside a cache.
        OutputExistsError: something appeared at ``target`` meanwhile.
    """
    require_outside_caches(target)
    temporary = target.with_name(f".{target.name}.{scratch_name()}.tmp")
    try:
        with storage_errors(target):
            make_folder(target.absolute().parent)
            _sweep(target)
        yield temporary
        with storage_errors(target):
            _sync(temporary)
            _rename(temporary, target, overwrite)
            fsync_folder(target.parent)
            _sweep(target, ".old")
    finally:
        _remove(temporary)


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    try:
        if temporary.is_dir():
            if overwrite and target.exists():
                _swap(temporary, target)
            else:
                temporary.rename(target)  # refused where a folder is not empty
        elif overwrite:
            temporary.replace(target)
        else:
            os.link(temporary, target)  # a rename would replace a file without a word
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputExistsError(f"{target} exists already", "Give another path.") from error
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another, which then has the temporary name. Where the system cannot do both at
    once, a kill in between leaves the other under a name of its own until one is in its place again."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(temporary), os.fsencode(target)
    if hasattr(libc, "renameat2") and not libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE):
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    _remove(old)


def _sweep(target: Path, ending: str = ".tmp") -> None:
    """Remove what a killed process left of an earlier try: it may be as large as a whole cache."""
    for path in target.absolute().parent.glob(f".{glob.escape(target.name)}.*{ending}"):
        if is_abandoned(path, time.time()):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a new file, or all files and folders of a new folder, durable."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync_file(Path(folder, name))
        fsync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
