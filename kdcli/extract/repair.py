"""The step behind ``kd cache repair``: what is damaged is computed or written again, byte for byte.

What follows from the rest of the cache (metadata, keys, labels, the index) is written again, files that do
not belong are removed, and damaged units are computed by the pipeline that made them. Their records stay:
what comes out must be what they say, else it is refused. Only a unit whose own record is damaged gets a
new one. The manifest and the records of teachers say what the cache is; they cannot be made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, final

from kdcli.cache.admin.audit import audit
from kdcli.cache.admin.records import scan_commits
from kdcli.cache.commits import as_lines
from kdcli.cache.damage import Audit, Damage, summary
from kdcli.cache.layout import SAMPLES, Layout, Unit, load_manifest
from kdcli.cache.mending import Mending
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.cache.writer import CacheWriter, describe, newest
from kdcli.console import console
from kdcli.errors import ClaimedError, CorruptError, IdentityError, KdError, StoppedEarly
from kdcli.extract.rebuild import mend_wholes
from kdcli.extract.rerun import Sources, as_it_ran, open_images, open_views, open_workers
from kdcli.files import atomic_write_text, storage_errors
from kdcli.runtime import stop_signals, worker_count
from kdcli.types import Difference


@final
@dataclass(frozen=True, slots=True)
class RepairResult:
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
                    "differences": [{"field": d.field, "old": d.old, "new": d.new} for d in found],
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
    if found.ok:
        return RepairResult(root, (), (), {}, accept)
    _require_hope(found)
    mend_wholes(root, found.damages, sources)
    units = sorted({d.unit for d in found.damages if d.unit is not None}, key=str)
    changed: dict[Unit, list[Difference]] = {}
    if units:
        changed = _Rerun(root, found, units, sources, accept).run()
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


@final
class _Rerun:
    """Computes damaged units again. Opens everything before it touches anything."""

    def __init__(
        self, root: Path, found: Audit, units: Sequence[Unit], sources: Sources, accept: bool
    ) -> None:
        self._root, self._found, self._units, self._sources = root, found, units, sources
        self._lost = {d.unit for d in found.damages if d.unit is not None and not d.array}
        records = {c.unit: c for commits in found.records.values() for c in commits.values()}
        contents = {c.block: c.content for c in records.values()}
        expected = {unit: None if unit in self._lost else records.get(unit) for unit in units}
        self._mending = Mending(expected, contents, accept)

    def run(self) -> dict[Unit, list[Difference]]:
        """Do it; the units that came out otherwise than recorded."""
        held = CacheReader(self._root)
        # Images of a cache that grew are told by their recorded sizes: not by those that are damaged.
        held._commits[SAMPLES] = {
            place: commit
            for place, commit in self._found.records[SAMPLES].items()
            if commit.unit not in self._mending.expected
        }
        self._sources.require_known(held.teachers, self._root)
        names = list(dict.fromkeys(unit.teacher for unit in self._units if unit.part != SAMPLES))
        images, views = open_images(held, self._sources), open_views(held)
        with as_it_ran([held.teachers[name] for name in names]), stop_signals() as stop:
            workers = open_workers(held, self._sources, names, images)
            with CacheWriter(self._root, held.manifest, self._mending) as writer:
                self._drop_damaged_records(writer)
                from kdcli.extract.pipeline import TaskRunner

                runner = TaskRunner(
                    writer, images, views, workers, drop_bad=True,
                    processes=worker_count(self._sources.workers), stop=stop, grace=20.0,
                )  # fmt: skip
                runner.run(self._units)
                if stop:
                    raise StoppedEarly(
                        "stopped by a signal; what is repaired is kept",
                        f"Go on: kd cache repair {quote(str(self._root))}",
                    )
                for part in dict.fromkeys(unit.part for unit in self._units):
                    writer.finish(part)
        return self._mending.changed

    def _drop_damaged_records(self, writer: CacheWriter) -> None:
        """Take out records that cannot be read, or are of something else; what they were of is computed anew."""
        for part in dict.fromkeys(d.part for d in self._found.damages if d.part and not d.array):
            with writer.claims.alone(part), storage_errors(self._root):
                for damage in self._found.damages:
                    path = self._root / damage.file
                    if damage.part == part and path.parent == self._root / "commits" / part:
                        path.unlink(missing_ok=True)
                rewrite_compacted(writer.store, part, self._lost)


def rewrite_compacted(store: Store, part: str, lost: "set[Unit]") -> None:
    """Write the compacted records of a part again, without those that are damaged or lost."""
    path = store.layout.compacted(part)
    if not path.is_file():
        return
    sound = scan_commits(store, part)[0].values()
    keep = [commit for commit in sound if commit.unit not in lost]
    if keep:
        atomic_write_text(path, as_lines(keep))
    else:
        path.unlink()


def _tidy(root: Path, found: Audit) -> None:
    """Write what follows from the rest of the cache, and remove what does not belong."""
    layout, manifest = Layout(root), load_manifest(root)
    with CacheWriter(root, manifest) as writer:
        for damage in found.damages:
            path = root / damage.file
            if damage.remedy == "remove":
                console.note(f"removing {path}: {damage.reason}")
                with storage_errors(path):
                    path.unlink(missing_ok=True)
            elif damage.remedy == "rewrite" and damage.part and not damage.array:
                with writer.claims.alone(damage.part):
                    rewrite_compacted(writer.store, damage.part, set())
        describe(root)
    if manifest.backend == "hdf5" and layout.index.is_file():
        from kdcli.cache.backends.hdf5_index import write_index

        write_index(newest(root))
