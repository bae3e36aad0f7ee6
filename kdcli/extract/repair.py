"""The step behind ``kd cache repair``: what is damaged is computed or written again, byte for byte.

What follows from the rest of the cache (metadata, keys, labels, the index) is written again, files that do
not belong are removed, and damaged units are computed by the pipeline that made them. What comes out must be
what their records say, else it is refused; only a unit whose own record is damaged gets a new one. The manifest
and the records of teachers say what the cache is; they cannot be made again.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.records import scan_commits
from kdcli.cache.commits import as_lines
from kdcli.cache.damage import Audit, Damage, summary
from kdcli.cache.garbage import sweep
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES, Layout, Unit, load_manifest
from kdcli.cache.matching import class_numbers
from kdcli.cache.mending import Mending
from kdcli.cache.provenance import require_known
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.cache.writer import CacheWriter, describe, newest, write_whole_arrays
from kdcli.console import console
from kdcli.documents import to_document
from kdcli.errors import ClaimedError, CorruptError, IdentityError, KdError, NotFoundError, StoppedEarly
from kdcli.extract.rerun import Sources, as_it_ran, open_images, open_views, open_workers
from kdcli.files import atomic_write_text, storage_errors
from kdcli.registry import recorded
from kdcli.results import Result
from kdcli.runtime import stop_signals, worker_count
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData

Value = TypeVar("Value")


@final
@dataclass(frozen=True, slots=True)
class RepairResult(Result):
    """What a repair did.

    Attributes:
        found: the damage that there was.
        left: the damage that there still is.
        changed: units that came out otherwise than recorded, and in what.
        accepted: these were written all the same.
    """

    root: Path
    found: tuple[Damage, ...]
    left: tuple[Damage, ...]
    changed: dict[Unit, list[Difference]]
    accepted: bool

    @property
    def refusal(self) -> KdError | None:
        """Why not everything is repaired; None when it is."""
        if not self.left:
            return None
        if self.changed and not self.accepted:
            unit, differences = next(iter(self.changed.items()))
            more = f" and {len(self.changed) - 1} more" if len(self.changed) > 1 else ""
            return IdentityError(
                f"{self.root}: {unit}{more} came out otherwise than recorded and stays as it is",
                "Run it where the cache was made (device, versions, threads); or give --accept to put the new "
                "outputs in the place of the recorded ones.",
                differences,
            )
        return ClaimedError(
            f"{self.root}: still damaged: {summary(self.left)}",
            "Other writers hold what is left, or something damages the cache again: let them finish, then "
            "run this again.",
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        left = {damage.file for damage in self.left}
        document = {
            "cache": str(self.root),
            "ok": not self.left,
            "repaired": [damage.document() for damage in self.found if damage.file not in left],
            "left": [damage.document() for damage in self.left],
            "changed": [
                {
                    "part": unit.part, "block": unit.block, "group": unit.group, "accepted": self.accepted,
                    "differences": [to_document(each) for each in found],
                }
                for unit, found in self.changed.items()
            ],
        }  # fmt: skip
        return document | (self.refusal.document() if self.refusal else {})


def repair_cache(root: Path, sources: Sources, accept: bool = False) -> RepairResult:
    """Repair a cache. Nothing but what is damaged is computed, decoded or written.

    Args:
        root: folder of the cache.
        sources: where images and teachers are now.
        accept: put outputs that differ from the record in its place.

    Raises:
        CacheMissingError: there is no cache.
        CorruptError: its manifest, or the record of a teacher, is damaged.
        NotFoundError: images or teachers are not to be had.
        IdentityError: they are not the recorded ones; nothing of what they concern was touched.
        StoppedEarly: after a signal; what is repaired is kept.
    """
    found = audit(root)
    sweep(Layout(root))  # of a repair that was killed, even when all was repaired
    if found.ok:
        return RepairResult(root, (), (), {}, accept)
    _require_hope(found)
    _clear_way(found)
    _mend_wholes(root, found.damages, sources)
    units = sorted({d.unit for d in found.damages if d.unit is not None}, key=str)
    changed: dict[Unit, list[Difference]] = {}
    if units:
        changed = _recompute(root, found, units, sources, accept)
    _tidy(root, found)
    after = audit(root)
    for gap in after.gaps:
        console.note(str(gap))
    return RepairResult(root, found.damages, after.damages, changed, accept)


def _require_hope(found: Audit) -> None:
    hopeless = tuple(damage for damage in found.damages if damage.remedy == "restore")
    if hopeless:
        alone = Audit(found.root, found.cache_id, hopeless)
        try:
            alone.require_ok()
        except CorruptError as error:
            raise CorruptError(f"{error.message}; it cannot be made again", error.hint) from error


def _clear_way(found: Audit) -> None:
    """Remove folders that lie where a file is to be written, and what lies among records and is none: nothing can open
    the cache before."""
    records = Layout(found.root).teachers
    for path, damage in {found.root / damage.file: damage for damage in found.damages}.items():
        folder = path.is_dir() and not path.is_symlink()
        stray = damage.remedy == "remove" and path.parent.parent == records
        if not stray and (damage.remedy == "remove" or not folder):
            continue
        console.note(f"removing {path}: {damage.reason if stray else 'a folder in place of a file'}")
        with storage_errors(path):
            shutil.rmtree(path) if folder else path.unlink(missing_ok=True)


# --- units ----------------------------------------------------------------------------------------


def _recompute(
    root: Path, found: Audit, units: Sequence[Unit], sources: Sources, accept: bool
) -> dict[Unit, list[Difference]]:
    """Compute damaged units again; those that came out otherwise than recorded. Opens everything before it
    touches anything."""
    lost = {damage.unit for damage in found.damages if damage.unit is not None and not damage.array}
    records = {c.unit: c for commits in found.records.values() for c in commits.values()}
    contents = {commit.block: commit.content for commit in records.values()}
    expected = {unit: None if unit in lost else records.get(unit) for unit in units}
    mending = Mending(expected, contents, accept)
    held = CacheReader(root)
    # Images of a cache that grew are told by their recorded sizes: not by those that are damaged.
    held.go_by(SAMPLES, (c for c in found.records[SAMPLES].values() if c.unit not in expected))
    require_known(sources.teachers, held.teachers, root)
    names = list(dict.fromkeys(unit.teacher for unit in units if unit.part != SAMPLES))
    images, views = open_images(held, sources), open_views(held)
    with as_it_ran([held.teachers[name] for name in names]), stop_signals() as stop:
        workers = open_workers(held, sources, names, images)
        with CacheWriter(root, held.manifest, mending) as writer:
            _drop_damaged_records(writer, found, lost)
            from kdcli.extract.pipeline import Resources, TaskRunner

            resources = Resources(worker_count(sources.workers), stop, grace=20.0)
            TaskRunner(writer, images, views, workers, resources, drop_bad=True).run(units)
            if stop:
                raise StoppedEarly(
                    "stopped by a signal; what is repaired is kept",
                    f"Go on: kd cache repair {quote(str(root))}",
                )
            for part in dict.fromkeys(unit.part for unit in units):
                writer.finish(part)
    return mending.changed


def _drop_damaged_records(writer: CacheWriter, found: Audit, lost: set[Unit]) -> None:
    """Take out records that cannot be read, or are of something else; what they were of is computed anew."""
    root = writer.layout.root
    for part in dict.fromkeys(damage.part for damage in found.damages if damage.part and not damage.array):
        with writer.claims.alone(part), storage_errors(root):
            for damage in found.damages:
                path = root / damage.file
                if damage.part == part and path.parent == writer.layout.commits / part:
                    path.unlink(missing_ok=True)
            _rewrite_compacted(writer.store, part, lost)


def _rewrite_compacted(store: Store, part: str, lost: set[Unit]) -> None:
    """Write the compacted records of a part again, without those that are damaged or lost."""
    path = store.layout.compacted(part)
    if not os.path.lexists(path):
        return
    sound = scan_commits(store, part)[0].values()
    keep = [commit for commit in sound if commit.unit not in lost]
    if keep:
        atomic_write_text(path, as_lines(keep))
    else:
        path.unlink()


# --- the rest ------------------------------------------------------------------------------------


def _tidy(root: Path, found: Audit) -> None:
    """Write what follows from the rest of the cache, and remove what does not belong."""
    with CacheWriter(root, load_manifest(root)) as writer:
        for damage in found.damages:
            path = root / damage.file
            if damage.remedy == "remove" and os.path.lexists(path):
                console.note(f"removing {path}: {damage.reason}")
                with storage_errors(path), suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            elif damage.remedy == "rewrite" and damage.part and not damage.array:
                with writer.claims.alone(damage.part):
                    _rewrite_compacted(writer.store, damage.part, set())
        describe(root)
    store = newest(root)
    if store.layout.index.is_file():
        from kdcli.cache.hdf5_index import write_index

        write_index(store)


# --- keys and labels ------------------------------------------------------------------------------


def _mend_wholes(root: Path, damages: Sequence[Damage], sources: Sources) -> None:
    """Write keys and labels again if one of them is damaged: from themselves where only their wrapping is, else
    from the data set. The digests in the manifest say whether they are the right ones.

    Raises:
        IdentityError: the data set has other keys or labels than the cache; nothing was written.
        NotFoundError: it is not to be had.
    """
    if not any(d.part == SAMPLES and d.remedy == "rewrite" and d.array for d in damages):
        return
    store = Store(root, load_manifest(root))
    keys, labels = _if_sound(store.load_keys), _if_sound(store.load_labels)
    if keys is None or labels is None:
        console.note(f"cache {root}: keys and labels from the data set")
        keys, labels = _from_data(store, sources)
    write_whole_arrays(store, keys, None if store.manifest.data.labels is None else labels)


def _if_sound(load: Callable[[], Value]) -> Value | None:
    try:
        return load()
    except CorruptError:
        return None


def _from_data(store: Store, sources: Sources) -> tuple[KeyTable, Int64[np.ndarray, " n"]]:
    """Keys and labels of all rows, in the order in which the cache grew."""
    manifest = store.manifest
    keys, labels = KeyTable.from_strings([]), np.empty(0, np.int64)
    for number, segment in enumerate(manifest.segments):
        data = _open(sources, segment.location)
        data = data.select(np.flatnonzero(keys.find(data.keys) < 0))
        padding = manifest.segment_rows(number).start - len(keys)
        nothing = KeyTable(np.empty(0, np.uint8), np.zeros(max(0, padding) + 1, np.int64))
        keys = KeyTable.concatenate([keys, nothing, data.keys])
        labels = np.concatenate([labels, np.full(max(0, padding), -1), _labels(store, data)])
    recorded, found = manifest.data, block_digest(labels.astype("<i8"))
    differences = [Difference("keys", recorded.keys, keys.digest())] if keys.digest() != recorded.keys else []
    if recorded.labels not in (None, found):
        differences.append(Difference("labels", recorded.labels, found))
    if differences:
        raise IdentityError(
            f"{store.layout.root}: its keys or labels are damaged, and the data set has others now",
            "Restore the data set as it was, or say where it is: --data SPEC",
            differences,
        )
    return keys, labels


def _open(sources: Sources, location: str) -> "ImageData":
    from kdcli.data.sources import open_data

    try:
        return open_data(sources.data or recorded(location), data_root=sources.data_root)
    except NotFoundError as error:
        raise NotFoundError(error.message, "Say where the images are now: --data SPEC") from error


def _labels(store: Store, data: "ImageData") -> Int64[np.ndarray, " n"]:
    """The labels of a data set as the class numbers of the cache."""
    cached, own = store.manifest.data.class_names, data.class_names
    if cached is None or own is None or not set(own) <= set(cached):
        return np.full(len(data), -1)  # other labels: the digest refuses them
    numbers: Int64[np.ndarray, " n"] = class_numbers(own, cached)[data.labels]
    return numbers
