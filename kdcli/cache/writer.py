"""Making a cache and filling it, unit by unit, so that a kill at any instant loses at most a task."""

import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.arrays import WHOLE_ARRAYS
from kdcli.cache.claims import Claims
from kdcli.cache.classifier import Classifier
from kdcli.cache.commits import (
    Commit,
    chunk_files,
    compact,
    drop_record,
    is_compactable,
    read_commit,
    read_commits,
    single_names,
    sizes_agree,
    strange_ids,
    write_commit,
)
from kdcli.cache.filling import Content, Filling
from kdcli.cache.garbage import sweep
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES, Layout, Manifest, Unit, load_manifest, write_manifest
from kdcli.cache.mending import Mending
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.store import Store
from kdcli.cache.watch import WatchedRecords
from kdcli.console import console
from kdcli.errors import Advice, IdentityError, OutputExistsError, StorageError
from kdcli.files import fsync_folder, make_folder, scratch_name, storage_errors

MANY_RECORDS: Final = 1000
"""Single records of a part from which on they are joined before a run goes on."""


def create_cache(
    root: Path, manifest: Manifest, keys: KeyTable, labels: Int64[np.ndarray, " n"] | None
) -> Manifest:
    """Create an empty cache of ``manifest`` at ``root`` by one rename, or return the one that is there.

    Args:
        root: folder of the cache; its parent is made when missing.
        manifest: what the cache is.
        keys: [rows] keys of the samples.
        labels: [rows] class numbers, -1 = unlabelled; None for a data set without labels.

    Returns:
        The manifest on disk: another process may have been faster.

    Raises:
        StorageError: the place cannot be written, or is a file.
        OutputExistsError: the folder is there and holds something else.
    """
    with storage_errors(root):
        if root.is_file():
            raise StorageError(f"{root} is a file, not a cache folder", Advice("file-in-place"))
        make_folder(root.parent)
        if root.is_dir() and any(root.iterdir()):
            if Layout(root).manifest.is_file():
                return load_manifest(root)
            raise OutputExistsError(f"{root} holds other files and is not a kd cache", Advice("place-taken"))
        skeleton = Layout(root.with_name(f".{root.name}.{scratch_name()}.tmp"))
        try:
            build_skeleton(skeleton, manifest, keys, labels)
            skeleton.root.rename(root)
        except OSError:
            if Layout(root).manifest.is_file():
                return load_manifest(root)
            raise
        finally:
            shutil.rmtree(skeleton.root, ignore_errors=True)
        fsync_folder(root.parent)
    return manifest


def build_skeleton(
    layout: Layout, manifest: Manifest, keys: KeyTable, labels: Int64[np.ndarray, " n"] | None
) -> None:
    """Make the folders and files of a cache in which nothing is computed yet."""
    for folder in (layout.root, layout.commits, layout.claims, layout.tmp, layout.verified, layout.teachers):
        folder.mkdir()
    store = Store(layout.root, manifest)
    store.write_metadata(keys)
    write_whole_arrays(store, keys, labels)
    write_manifest(layout, manifest)


def write_whole_arrays(store: Store, keys: KeyTable, labels: Int64[np.ndarray, " n"] | None) -> None:
    """Write keys and labels. A longer array takes the place of a shorter one that it begins with."""
    values = {"key_bytes": keys.blob, "key_offsets": keys.offsets}
    if labels is not None:
        values["labels/class"] = labels
    for name, array in values.items():
        spec = WHOLE_ARRAYS[name]
        path = store.chunk(SAMPLES, name, spec, 0, None)
        make_folder(path.parent)
        store.write(path, array.astype(spec.dtype))
        fsync_folder(path.parent)


@final
class CacheWriter(Filling):
    """Fills a cache in a folder.

    Attributes:
        claims: in files beside it.

    Args:
        root: folder of the cache.
        manifest: what it is.
        mending: a repair's: the units that are written although they have a record, and what they should be.
        timeout: of its claims; default: the cache's.
    """

    claims: Claims

    def __init__(
        self, root: Path, manifest: Manifest, mending: Mending | None = None, timeout: float | None = None
    ) -> None:
        self.store, self._mending = Store(root, manifest), mending
        self.keys = self.store.load_keys()
        self.claims = Claims(self.store.layout, timeout, manifest.claim_timeout)
        self._records: dict[str, WatchedRecords] = {}

    def __enter__(self) -> "CacheWriter":
        with storage_errors(self.layout.root):
            for folder in (self.layout.tmp, self.layout.claims, self.layout.commits):
                folder.mkdir(exist_ok=True)
        self._sweep()
        self.claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.claims.__exit__(*error)
        if error[0] is None:  # others may have died meanwhile
            self._sweep()

    def _sweep(self) -> None:
        with suppress(StorageError):  # another user's litter is none of this run's business
            sweep(self.layout)

    def add_teacher(self, record: TeacherRecord) -> TeacherRecord:
        """See the base."""
        where = str(self.layout.root)
        if record.name in self.teachers:
            self.teachers[record.name].require_same(record, where)
        self.store.add_teacher(record)
        recorded = self.teachers[record.name]
        recorded.require_same(record, where)  # another process may have been faster
        describe(self.layout.root)
        return recorded

    def add_classifier(self, name: str, classifier: Classifier) -> None:
        """See the base."""
        self.store.add_classifier(name, classifier)

    def missing(self, part: str, withdraw: bool = True) -> list[Unit]:
        """See the base."""
        records = self._watched(part)
        for commit in records.look():
            if not self.manifest.holds(commit.block, commit.group):
                continue  # the cache has grown since; that part is the newer writers' work
            self._require_own(commit)
            if not sizes_agree(self.store, commit):
                console.warn(
                    f"{commit.unit}: committed, but its files are missing or short; to be computed again"
                )
                if withdraw:
                    self.withdraw(commit)
                records.forget(commit.unit)
        units = (Unit(part, block, group) for block, group in self.store.units_of(part))
        return [unit for unit in units if not records.is_done(unit)]

    def open_units(self, units: Collection[Unit]) -> tuple[set[Unit], set[Unit]]:
        """See the base: two listings a part, and no file is opened."""
        free: set[Unit] = set()
        claimed: set[Unit] = set()
        for part in {unit.part for unit in units}:
            held = self.claims.names(part)  # first: what is given back from now on is done, or free
            done = single_names(self.layout, part)
            for unit in units:
                if unit.part == part and unit.stem not in done:
                    (claimed if unit.stem in held else free).add(unit)
        return free, claimed

    def _watched(self, part: str) -> WatchedRecords:
        return self._records.setdefault(part, WatchedRecords(self.layout, part))

    def is_done(self, unit: Unit) -> bool:
        """See the base; a unit that is to be mended is not done."""
        if self._mending is not None and unit in self._mending.expected:
            return False
        return self._watched(unit.part).read(unit) is not None

    def recorded_content(self, block: int) -> Content | None:
        """See the base; sizes and checksums are None while only a unit of other views was written so far."""
        for group in range(self.manifest.groups):
            commit = self._watched(SAMPLES).read(Unit(SAMPLES, block, group))
            if commit is None:
                continue
            if group > 0:
                return commit.content, None, None
            if self._mending is not None and commit.unit in self._mending.expected:
                return commit.content, None, None  # its files are damaged
            rows = len(self.manifest.rows_of(block))
            specs = self.specs(SAMPLES)
            found = [
                self.store.backend.map(
                    self.store.chunk(SAMPLES, name, specs[name], block, None),
                    self.manifest.block_rows,
                    specs[name],
                )[:rows].astype(np.int64)
                for name in ("content_size", "content_crc")
            ]
            return commit.content, found[0], found[1]
        if self._mending is None or block not in self._mending.contents:
            return None
        return self._mending.contents[block], None, None

    def dropped(self) -> set[int]:
        """See the base."""
        return {row for commit in read_commits(self.layout, SAMPLES).values() for row, _ in commit.absent}

    def _require_own(self, commit: Commit) -> None:
        found = strange_ids(self.store, commit, self.key_digest(commit.block))
        if found:
            raise IdentityError(
                f"{self.layout.commit(commit.unit)} belongs to another cache",
                Advice("foreign-record", cache=self.layout.root),
                found,
            )

    def withdraw(self, commit: Commit) -> None:
        """Take back the record of a unit whose files are not what it says."""
        with self.claims.alone(commit.part):
            drop_record(self.layout, commit)

    def key_digest(self, block: int) -> str:
        """Digest of the keys of a block."""
        rows = self.manifest.rows_of(block)
        return self.keys.select(np.arange(rows.start, rows.stop)).digest()

    def publish(
        self,
        unit: Unit,
        arrays: Mapping[str, np.ndarray],
        content: str,
        absent: Sequence[tuple[int, str]],
        made: dict[str, Any],
        seconds: float,
    ) -> bool:
        """See the base: data, fsync, rename, then the record."""
        if not self.claims.owns(unit) and (self.claims.is_live(unit) or self.is_done(unit)):
            return False  # this process was taken for dead: what it has is not written over the other's
        commit = Commit(
            cache_id=self.manifest.cache_id,
            part=unit.part,
            part_id=self.store.part_id(unit.part),
            block=unit.block,
            group=unit.group,
            keys=self.key_digest(unit.block),
            content=content,
            arrays={},
            absent=list(absent),
            seconds=round(seconds, 3),
            made={"host": socket.gethostname(), **made},
        )
        if self._mending is not None and not self._may_replace(self._mending, commit, arrays):
            return False
        records = {
            name: [self.store.write(path, chunk) for path, chunk in self._chunks(unit, name, values)]
            for name, values in arrays.items()
        }
        for folder in {self.store.folder(unit.part, name) for name in arrays}:
            with storage_errors(folder):
                fsync_folder(folder)
        if self._mending is not None and self._mending.kept(unit):
            return True
        commit = replace(commit, arrays=records)
        if write_commit(self.layout, commit):
            return True
        self._settle_conflict(commit)
        return False

    def _may_replace(self, mending: Mending, new: Commit, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether a repair may write a unit; a record that does not fit what is accepted goes first."""
        foreseen = {
            name: [self.store.backend.foresee(chunk) for _, chunk in self._chunks(new.unit, name, values)]
            for name, values in arrays.items()
        }
        if not mending.admits(replace(new, arrays=foreseen)):
            return False
        if new.unit in mending.changed and (old := mending.expected[new.unit]) is not None:
            self.withdraw(old)
        return True

    def _chunks(self, unit: Unit, name: str, values: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
        """Files and contents of an array's chunks, in view order."""
        spec = self.specs(unit.part)[name]
        for place, path in enumerate(self.store.chunks_of(unit.part, name, spec, unit.block, unit.group)):
            chunk = np.full((self.manifest.block_rows, *spec.row_shape), spec.fill, spec.dtype)
            chunk[: len(values)] = values[:, place] if spec.per_view else values
            yield path, chunk

    def _settle_conflict(self, mine: Commit) -> None:
        """Somebody committed the same unit: make sure that the bytes on disk are the recorded ones.

        This writer renamed its files before it saw the other's record, so they may have replaced the
        other's. Equal bytes (the normal case) need nothing; else the record follows the disk.
        """
        theirs = read_commit(self.layout, mine.unit)
        if theirs is None or theirs.same_data(mine):
            return
        on_disk: dict[str, list[list[int]]] = {}
        for name, _, path, _, _ in chunk_files(self.store, mine):
            found = self.store.inspect(path)
            on_disk.setdefault(name, []).append([found.size, found.crc])
        if on_disk == theirs.arrays:
            return
        console.warn(f"{mine.unit}: two writers computed different bytes; it will be computed again")
        self.withdraw(theirs)

    def gather(self, part: str) -> None:
        """See the base: many single records are joined, so that a fleet that goes on reads one file, where each of its
        processes would open thousands."""
        if len(single_names(self.layout, part)) > MANY_RECORDS:
            with self.claims.alone(part):
                if len(single_names(self.layout, part)) > MANY_RECORDS:  # another did it meanwhile
                    compact(self.store, part)

    def finish(self, part: str) -> None:
        """See the base: its records are joined; an HDF5 cache gets its index."""
        if is_compactable(self.store, part):
            with self.claims.alone(part):
                compact(self.store, part)
        if self.manifest.backend == "hdf5":
            self._update_index(self.layout.compacted(part))

    def _update_index(self, records: Path) -> None:
        """Write the index anew if it is older than ``records``: also when a kill came between the two."""
        from kdcli.cache.hdf5_index import write_index

        index = self.layout.index
        with storage_errors(index):
            if not records.is_file():
                return
            if index.is_file() and index.stat().st_mtime_ns >= records.stat().st_mtime_ns:
                return
        with self.claims.alone("index"):
            write_index(newest(self.layout.root))


def newest(root: Path) -> Store:
    """A cache as its manifest is now: it may have grown since a writer began, and never shrinks."""
    return Store(root, load_manifest(root))


def describe(root: Path) -> None:
    """Bring the metadata for other tools up to date with the manifest and the teachers on disk."""
    store, before = newest(root), None
    while store.manifest != before:  # grown in between: what was written just now is too short
        store.write_metadata(store.load_keys())
        before, store = store.manifest, newest(root)


def content_digest(sizes: np.ndarray, crcs: np.ndarray) -> str:
    """Digest of the content records of a block's samples."""
    return block_digest(sizes.astype("<i8"), crcs.astype("<u4"))
