"""``kd cache pull``: a cache, or a part of one, out of a store, every byte checked before it has its name.

What lies in a store may be anybody's: its records pass the gates of a cache on this disk before anything is made of
them, its metadata is made anew here, and of other names nothing is taken. A target is a sound cache at every moment:
empty, then with the units that came so far.
"""

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, final

import numpy as np

from kdcli.cache.admin.grow import Growth, has_grown_from, publish_growth, sole_growth
from kdcli.cache.admin.moving import (
    Moved,
    classifiers_in,
    committed,
    parts_of,
    published,
    require_space,
    start_cache,
    units,
)
from kdcli.cache.arrays import WHOLE_ARRAYS
from kdcli.cache.backends.base import HEADER_BYTES
from kdcli.cache.classifier import Classifier
from kdcli.cache.commits import Commit, chunk_files, parse_commit, read_commits, write_commit
from kdcli.cache.keytable import block_digest
from kdcli.cache.layout import SAMPLES, Layout, Manifest, Unit, load_manifest
from kdcli.cache.owned import CHUNK_BYTES, RECORDS_BYTES
from kdcli.cache.provenance import TeacherRecord, require_known
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.cache.stores.gates import names_record, require_own
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.places import Place
from kdcli.cache.stores.transfer import copy_all, is_as_recorded, record_name, unit_bytes
from kdcli.cache.writer import CacheWriter
from kdcli.console import console, counted
from kdcli.errors import (
    Advice,
    CacheMissingError,
    CorruptError,
    IdentityError,
    NotFoundError,
    OutputExistsError,
    UsageError,
)
from kdcli.files import atomic_write_bytes, fsync_folder, make_folder, scratch_name, storage_errors
from kdcli.outputs import STATS

_AGAIN: Final = Advice("push-again")
_VIEWS: Final = re.compile(r"eval(?:\+train:(\d{1,9}))?")


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What to pull; nothing chosen: all.

    Attributes:
        teachers: names.
        keep: kinds, as ``logits`` or ``maps:layer4``; statistics come with logits and top-k.
        views: ``eval``, or ``eval+train:K`` for the first K training views.
    """

    teachers: Collection[str] = ()
    keep: Collection[str] = ()
    views: str | None = None

    def groups(self, manifest: Manifest) -> int:
        """How many groups of views.

        Raises:
            UsageError: the views are none.
            NotFoundError: the cache has fewer.
        """
        if self.views is None:
            return manifest.groups
        found = _VIEWS.fullmatch(self.views)
        if found is None:
            raise UsageError(f"'{self.views}' is no choice of views", "Give eval or eval+train:K.")
        count = 1 + int(found[1] or 0)
        if count > manifest.views:
            raise NotFoundError(
                f"{self.views}: the cache has {counted(manifest.views - 1, 'training views')}",
                Advice("fewer-views"),
            )
        return manifest.groups_of(count)

    def records(self, known: dict[str, TeacherRecord], where: str) -> list[TeacherRecord]:
        """The teachers, each with the kinds to keep of it.

        Raises:
            NotFoundError: there is no such teacher, or no such kind of any of them.
        """
        require_known(self.teachers, known, where)
        records = [record for name, record in known.items() if not self.teachers or name in self.teachers]
        names = {word: _names(records, word) for word in self.keep}
        for word, found in names.items():
            if not found:
                kept = dict.fromkeys(str(each.output) for r in records for each in r.outputs.values())
                raise NotFoundError(f"{word} is not kept in {where}", f"Kept there: {', '.join(kept)}.")
        if not self.keep:
            return records
        wanted = set().union(*names.values())
        kept_of = [
            {k: o for k, o in r.outputs.items() if k in wanted or _beside(r, k, wanted)} for r in records
        ]
        return [r.keeping(outputs) for r, outputs in zip(records, kept_of, strict=True) if outputs]


def _names(records: list[TeacherRecord], word: str) -> set[str]:
    every = [each for record in records for each in record.outputs.values()]
    return {
        e.name for e in every if word in (e.name, e.kind, str(e.output), str(e.output).removesuffix("@eval"))
    }


def _beside(record: TeacherRecord, kind: str, wanted: set[str]) -> bool:
    return kind == STATS and bool(wanted & {"logits", "topk"} & record.outputs.keys())


def pull(url: str, target: Path, choice: Choice) -> Moved:
    """Copy a cache, or a part of it, from a store.

    Args:
        url: where from; see :func:`~kdcli.cache.stores.opening.open_place`.
        target: a new folder, or what was pulled of this cache before: it is completed.
        choice: what to pull.

    Raises:
        UsageError: the URL names no place.
        NotFoundError: there is no such teacher, kind or view.
        CacheMissingError: there is no cache, or its first push has not ended.
        CorruptError: what is there is none, or its bytes are not those that were committed.
        IdentityError: the cache at ``target`` is of the same origin and went another way.
        OutputExistsError: something else is at ``target``.
        StorageError: the store refuses, or does not answer.
    """
    place = open_place(url)
    with described(place, target) as source:
        records = choice.records(source.store.teachers, place.name)
        groups = choice.groups(source.manifest)
        classifiers = classifiers_in([source.store], records)
        _prepare(source, target, records, classifiers)
    with CacheWriter(target, load_manifest(target)) as writer:
        for record in records:
            writer.add_teacher(record)
            if record.name in classifiers:
                writer.add_classifier(record.name, classifiers[record.name])
        parts = parts_of(records)
        Puller(place, writer).run(parts, groups)
        for part in parts:
            writer.finish(part)
    reader = CacheReader(target)
    found = {part: committed(reader, part) for part in reader.store.parts()}
    manifest = reader.manifest
    return Moved(target, manifest.cache_id, manifest.backend, units(reader.store, found))


# --- what a cache is ------------------------------------------------------------------------------


@contextmanager
def described(place: Place, target: Path) -> Iterator[CacheReader]:
    """Manifest, keys, labels and teachers in a folder beside ``target`` that goes with the block, checked as any
    cache's.

    Raises:
        CacheMissingError: there is no cache.
        CorruptError: what is there is none.
    """
    folder = target.with_name(f".{target.name}.{scratch_name()}.tmp")
    try:
        with storage_errors(target):
            make_folder(folder)
        try:
            _fetch(place, "manifest.json", folder)
            manifest = load_manifest(folder)
            for name in place.sizes("teachers"):
                if names_record(name):
                    _fetch(place, name, folder)
            bare = Store(folder, manifest)
            for name in (
                "key_bytes",
                "key_offsets",
                *(() if manifest.data.labels is None else ("labels/class",)),
            ):
                path = bare.chunk(SAMPLES, name, WHOLE_ARRAYS[name], 0, None)
                _fetch(place, path.relative_to(folder).as_posix(), folder, CHUNK_BYTES)
            reader = CacheReader(folder)
            for name in reader.teachers:
                reader.store.classifier(name)
        except (CorruptError, IdentityError) as error:
            raise CorruptError(error.message.replace(str(folder), place.name), _AGAIN) from error
        yield reader
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(place: Place, name: str, folder: Path, most: int | None = None) -> None:
    try:
        data = place.read(name) if most is None else place.read(name, most)
    except FileNotFoundError:
        if name != "manifest.json":
            raise CorruptError(f"{place.name}/{name} is not there", _AGAIN) from None
        raise CacheMissingError(
            f"there is no cache at {place.name} (no manifest.json)",
            Advice("push-first"),
        ) from None
    make_folder((folder / name).parent)
    atomic_write_bytes(folder / name, data)


def _prepare(
    source: CacheReader, target: Path, records: list[TeacherRecord], classifiers: dict[str, Classifier]
) -> None:
    """Make the target an empty cache, or see that what is there is this one, and let it grow as the other did."""
    manifest = source.manifest
    labels = None if manifest.data.labels is None else source.labels
    if not Layout(target).manifest.is_file():
        try:
            with published(target) as root:
                start_cache(root, manifest, source.keys, labels, records, classifiers)
        except OutputExistsError:
            if not Layout(target).manifest.is_file():  # else another pull was faster
                raise
    own = load_manifest(target)
    if own.cache_id != manifest.cache_id:
        raise OutputExistsError(f"{target} holds another cache", "Give a new folder.")
    if has_grown_from(own, manifest):
        return
    if not has_grown_from(manifest, own) or not _begin_alike(source, own):
        raise IdentityError(
            f"{target} and the cache in the store have grown apart", "Pull it into a new folder."
        )
    with sole_growth(target) as claims:
        publish_growth(claims, Store(target, own), Growth(manifest, source.keys, labels))


def _begin_alike(source: CacheReader, own: Manifest) -> bool:
    """Whether the first samples of a cache that grew are those that it had."""
    keys = source.keys.select(np.arange(own.rows))
    labels = source.labels[: own.rows].astype("<i8")
    return keys.digest() == own.data.keys and own.data.labels in (None, block_digest(labels))


# --- units ----------------------------------------------------------------------------------------


@final
class Puller:
    """Fetches units that are missing here and have a record there."""

    def __init__(self, place: Place, writer: CacheWriter) -> None:
        self._place, self._writer, self._store = place, writer, writer.store
        self._joined: dict[Unit, Commit] = {}
        self._contents: dict[int, str] = {}
        self._lock = Lock()
        self._busy = 0

    def run(self, parts: list[str], groups: int) -> None:
        """Fetch what is missing of these parts, in the first groups of views."""
        found: list[Unit] = []
        for part in parts:
            for commit in read_commits(self._store.layout, part).values():
                self._contents.setdefault(commit.block, commit.content)
            missing = [unit for unit in self._writer.missing(part) if unit.group < groups]
            if missing:
                recorded = self._recorded(part)
                found += [unit for unit in missing if unit in self._joined or record_name(unit) in recorded]
        require_space(self._store.layout.root, sum(unit_bytes(self._store, unit) for unit in found))
        copy_all("pull", found, self._store, self._pull)
        if self._busy:
            console.note(
                f"{counted(self._busy, 'units')} are being written by others; run this again when they are done"
            )

    def _recorded(self, part: str) -> Collection[str]:
        """Names of the records of a part; those that are joined in one file are kept."""
        name = f"commits/{part}.jsonl"
        with suppress(FileNotFoundError):
            for line in self._place.read(name, RECORDS_BYTES).splitlines():
                commit = parse_commit(line, f"{self._place.name}/{name}", _AGAIN)
                self._joined[commit.unit] = commit
        return self._place.sizes(f"commits/{part}")

    def _pull(self, unit: Unit) -> int:
        claims, store = self._writer.claims, self._store
        commit = self._record(unit)
        if not claims.acquire(unit):
            with self._lock:
                self._busy += 1
            return 0
        try:
            if self._writer.is_done(unit):
                return 0
            taken = 0
            for _, _, path, size, crc in chunk_files(store, commit):
                atomic_write_bytes(path, self._chunk(commit, path, size, crc), store.layout.tmp)
                taken += size
            for folder in {store.folder(unit.part, name) for name in commit.arrays}:
                fsync_folder(folder)
            write_commit(store.layout, commit)
            return taken
        finally:
            claims.release([unit])

    def _record(self, unit: Unit) -> Commit:
        """The record of a unit: of this cache, this unit, its chunks, their sizes, and images that the block has."""
        store, name = self._store, f"{self._place.name}/{record_name(unit)}"
        commit = self._joined.get(unit)
        if commit is None:
            commit = parse_commit(self._read(record_name(unit)), name, _AGAIN)
        require_own(store, commit, unit, self._writer.key_digest(unit.block), name)
        with self._lock:
            if self._contents.setdefault(unit.block, commit.content) != commit.content:
                raise IdentityError(
                    f"{name} is of other images than {store.layout.root} has in block {unit.block}",
                    "Pull it into a new folder.",
                )
        return commit

    def _chunk(self, commit: Commit, path: Path, size: int, crc: int) -> bytes:
        name = path.relative_to(self._store.layout.root).as_posix()
        data = self._read(name, CHUNK_BYTES + HEADER_BYTES)
        if not is_as_recorded(self._store, data, size, crc):
            raise CorruptError(
                f"{self._place.name}/{name}: its bytes are not those that were committed",
                Advice("push-changed"),
            )
        return data

    def _read(self, name: str, most: int = 2**28) -> bytes:
        try:
            return self._place.read(name, most)
        except FileNotFoundError:
            raise CorruptError(f"{self._place.name}/{name} is recorded, but gone", _AGAIN) from None
