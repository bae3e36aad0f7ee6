"""Checking every byte of a cache that means something: ``kd cache verify``.

Everything is compared with what vouches for it: the manifest and the records with their seals, keys and
labels with their digests in the manifest, metadata with what follows from manifest and records, chunks with
their commits. What nothing vouches for does not belong. ``claims/``, ``verified/`` and ``tmp/`` hold nothing
of value, and other files beside them are not kd's.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

import numpy as np

from kdcli.cache.admin.grow import GROWTH
from kdcli.cache.admin.records import (
    LABELS,
    Place,
    damaged_wholes,
    lost_records,
    require_own_bytes,
    scan_commits,
    scan_teachers,
    whole_names,
    whole_path,
)
from kdcli.cache.arrays import array_folder
from kdcli.cache.claims import Claims
from kdcli.cache.classifier import CLASSIFIER
from kdcli.cache.commits import Commit, chunk_files, misfits
from kdcli.cache.damage import Audit, Damage, Gap, chunk_damage, rows_of
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Layout, Manifest, Unit, load_manifest
from kdcli.cache.owned import CHUNK_BYTES, read_own
from kdcli.cache.provenance import require_known
from kdcli.cache.store import Store
from kdcli.console import console
from kdcli.errors import CorruptError, KdError


def audit(root: Path, teachers: Collection[str] = ()) -> Audit:
    """Check a cache, or of its teachers only some.

    Nothing is written. Writers may go on meanwhile: what they have claimed is not looked at.

    Args:
        root: folder of the cache.
        teachers: names; default: all. Manifest, keys, labels and samples are always checked.

    Raises:
        CacheMissingError: there is no cache.
        NotFoundError: the cache has no such teacher.
        CorruptError: it is of a newer format.
        StorageError: it may not be read.
    """
    layout = Layout(root)
    try:
        manifest = load_manifest(root)
        require_own_bytes(read_own(layout.manifest), layout.manifest)
    except CorruptError as error:
        if "this kd reads format" in error.message:
            raise
        reason = error.message.replace(f"{layout.manifest}: ", "").removeprefix(f"{layout.manifest} ")
        return Audit(root, None, (Damage("manifest.json", reason, "restore"),))
    return _Auditor(root, manifest).run(teachers)


@final
class _Auditor:
    """One check of one cache; collects what it finds."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._layout, self._manifest = Layout(root), manifest
        # Listed before the records are read: whatever is there by now has its record on disk, too.
        self._listed = [
            path
            for folder in (self._layout.data(manifest.backend), self._layout.commits, self._layout.teachers)
            for path in sorted(folder.rglob("*"))
            if path.is_symlink() or not path.is_dir()
        ]
        sound, self._damages = scan_teachers(self._layout)
        self._unsound = {damage.part for damage in self._damages if damage.part}
        self._damages += (lost := lost_records(self._layout, sound, self._unsound))
        self._unsound |= {damage.part for damage in lost}
        self._store = Store(root, manifest, sound)
        records = self._layout.teachers.glob("*/*.json"), self._layout.teachers.glob(f"*/{CLASSIFIER}")
        self._vouched = {self._layout.manifest, *(path for found in records for path in found)}
        self._records: dict[str, dict[Place, Commit]] = {}
        self._lost: set[Unit] = set()
        self._key_digests: dict[int, str] = {}
        self._bytes = 0

    def run(self, teachers: Collection[str]) -> Audit:
        """Check everything, or only the named teachers and the samples."""
        known = sorted(self._store.teachers.keys() | self._unsound)
        require_known(teachers, known, self._layout.root)
        keys = self._check_wholes()
        self._check_metadata(keys)
        parts = [
            part
            for part in self._store.parts()
            if part == SAMPLES or not teachers or part.partition("/")[0] in teachers
        ]
        for part in parts:
            self._scan(part)
        self._check_owners(keys)
        self._check_contents()
        self._check_chunks()
        litter = self._check_rest(parts, teachers)
        gaps = list(self._gaps())
        if not gaps and not self._damages and not teachers:
            self._check_index()
        return Audit(
            self._layout.root,
            self._manifest.cache_id,
            tuple(self._damages),
            tuple(gaps),
            tuple(litter),
            1 + sum(path in self._vouched for path in self._listed),
            self._bytes,
            self._records,
        )

    # --- what the manifest and the records of teachers vouch for -----------------------------------

    def _check_wholes(self) -> KeyTable | None:
        """Check keys and labels; the keys, if they are those of the manifest."""
        keys: KeyTable | None = None
        with suppress(KdError):  # what is wrong with them is said below
            keys = self._store.load_keys()
        rows = (0, self._manifest.rows - 1)
        damaged = damaged_wholes(self._store, keys)
        if LABELS not in damaged:
            try:
                self._store.load_labels()
            except CorruptError as error:  # the labels are the manifest's, the classes are not theirs
                self._damages.append(Damage("manifest.json", error.message, "restore"))
        for name, reason in damaged.items():
            file = self._name(whole_path(self._store, name))
            self._damages.append(Damage(file, reason, "rewrite", SAMPLES, name, rows=rows))
        self._vouched |= {whole_path(self._store, name) for name in whole_names(self._store)}
        return keys

    def _check_metadata(self, keys: KeyTable | None) -> None:
        store, growing = self._store, Claims(self._layout).is_live(GROWTH)
        stand_in = KeyTable.from_strings([]) if keys is None else keys
        for name, content in store.backend.metadata(self._manifest, stand_in, store.teachers).items():
            path = store.data / name
            self._vouched.add(path)
            if keys is None and name.startswith(f"{array_folder(SAMPLES, 'key_bytes')}/"):
                continue  # its length is known again once the keys are
            reason = ""
            if not path.is_file():
                # A teacher that was added just now has nothing yet that would have to be described.
                reason = "the file is missing" if any(path.parent.rglob("c.*")) else ""
            elif path.is_symlink() or read_own(path) != content:
                reason = "is not what manifest and records say"
            if reason and not growing:
                self._damages.append(Damage(self._name(path), reason, "rewrite"))

    # --- what the commits vouch for ----------------------------------------------------------------

    def _scan(self, part: str) -> None:
        """Read the records of a part; a unit without a sound one is lost, or was never written."""
        self._records[part], damages = scan_commits(self._store, part)
        self._damages += damages
        self._lost |= {damage.unit for damage in damages if damage.unit is not None}
        self._vouched.add(self._layout.compacted(part))
        self._vouched |= set((self._layout.commits / part).glob("*.json"))

    def _check_owners(self, keys: KeyTable | None) -> None:
        """Refuse records of another cache or teacher.

        Where all of them disagree with one record that names the owner, that one is the stranger.
        """
        records = [commit for found in self._records.values() for commit in found.values()]
        cache_id = self._manifest.cache_id
        if records and all(commit.cache_id != cache_id for commit in records):
            reason = f"its cache_id is {cache_id}, that of all records {records[0].cache_id}"
            self._damages.append(Damage("manifest.json", reason, "restore"))
            self._records = {part: {} for part in self._records}
            return
        for name, teacher in self._store.teachers.items():
            parts = [part for part in self._records if part.partition("/")[0] == name]
            own = [commit for part in parts for commit in self._records[part].values()]
            if (
                own
                and len({commit.part_id for commit in own} | {teacher.id}) == 2
                and own[0].part_id != teacher.id
            ):
                reason = f"its id is {teacher.id}, that of all records {own[0].part_id}"
                self._damages.append(Damage(self._name(self._layout.teacher(name)), reason, "restore", name))
                self._unsound.add(name)
                self._records |= {part: {} for part in parts}
        for part in self._records:
            self._drop(part, keys)

    def _drop(self, part: str, keys: KeyTable | None) -> None:
        """Take the records out that are not of this cache and teacher."""
        for place, commit in list(self._records[part].items()):
            found = misfits(self._store, commit, self._key_digest(keys, commit.block))
            if found:
                del self._records[part][place]
                reason = "; ".join(f"{each.field} is {each.old}, not {each.new}" for each in found)
                self._damages.append(self._record_damage(commit, reason))

    def _key_digest(self, keys: KeyTable | None, block: int) -> str | None:
        if keys is not None and block not in self._key_digests:
            rows = self._manifest.rows_of(block)
            self._key_digests[block] = keys.select(np.arange(rows.start, rows.stop)).digest()
        return self._key_digests.get(block)

    def _record_damage(self, commit: Commit, reason: str) -> Damage:
        single = self._layout.commit(commit.unit)
        path = single if single.is_file() else self._layout.compacted(commit.part)
        self._lost.add(commit.unit)
        rows = rows_of(self._manifest, commit.block)
        return Damage(self._name(path), reason, "recompute", commit.part, "", commit.unit, None, rows)

    def _check_contents(self) -> None:
        """All units of a block must have seen the same images."""
        recorded: dict[int, str] = {}
        for part, commits in self._records.items():  # the samples come first
            for (block, group), commit in list(commits.items()):
                if recorded.setdefault(block, commit.content) != commit.content:
                    del self._records[part][block, group]
                    self._damages.append(self._record_damage(commit, "it is of other images than the others"))

    def _check_chunks(self) -> None:
        total = sum(len(commits) for commits in self._records.values())
        with console.progress(total, "units", "verify") as bar:
            for commits in self._records.values():
                for _, commit in sorted(commits.items()):
                    self._damages += chunk_damage(self._store, commit)
                    for _, _, path, size, _ in chunk_files(self._store, commit):
                        self._vouched.add(path)
                        self._bytes += size
                        if self._store.origin is not None:
                            self._listed.append(path)  # it is in the store
                    bar.advance(1)

    def _check_index(self) -> None:
        """Check the index of an HDF5 cache: only that of a complete one is up to date."""
        if self._manifest.backend == "hdf5" and self._layout.index.is_file():
            from kdcli.cache.hdf5_index import index_of

            if read_own(self._layout.index, CHUNK_BYTES) != index_of(self._store):
                name = self._name(self._layout.index)
                self._damages.append(Damage(name, "is not what the records say", "rewrite"))

    # --- what nothing vouches for ------------------------------------------------------------------

    def _gaps(self) -> Iterator[Gap]:
        for part, commits in self._records.items():
            units = [Unit(part, *place) for place in self._store.units_of(part)]
            missing = sum((u.block, u.group) not in commits and u not in self._lost for u in units)
            if missing and part.partition("/")[0] not in self._unsound:
                yield Gap(part, missing, len(units))

    def _check_rest(self, parts: Sequence[str], teachers: Collection[str]) -> list[str]:
        """Damages for files that do not belong; what interrupted writers left, below the cache."""
        litter = []
        claims, uncommitted = Claims(self._layout), self._uncommitted(parts)
        for path in self._listed:
            owner = self._owner(path)
            if path in self._vouched or owner in self._unsound or (teachers and owner not in teachers):
                continue
            unit = uncommitted.get(path)
            if unit is not None and (unit in self._lost or claims.is_live(unit)):
                continue
            if not path.exists() and not path.is_symlink():
                continue  # gone since it was listed
            if unit is not None or (path.name.startswith(".") and path.name.endswith(".tmp")):
                litter.append(self._name(path))
            else:
                self._damages.append(Damage(self._name(path), "nothing vouches for this file", "remove"))
        return litter

    def _uncommitted(self, parts: Sequence[str]) -> dict[Path, Unit]:
        """The files of units that have no sound record."""
        found = {}
        for part in parts:
            for block, group in self._store.units_of(part):
                if (block, group) in self._records[part]:
                    continue
                unit = Unit(part, block, group)
                for name, spec in self._store.arrays_in(part, group).items():
                    for path in self._store.chunks_of(part, name, spec, block, group):
                        found[path] = unit
        return found

    def _owner(self, path: Path) -> str:
        """The teacher that a file belongs to by its place; empty for all others."""
        for folder in (self._store.data / "teachers", self._layout.commits, self._layout.teachers):
            if path.is_relative_to(folder):
                names = path.relative_to(folder).parts
                return names[0] if len(names) > 1 else ""
        return ""

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._layout.root))
