"""A whole cache in one file, and back, bit by bit.

The file has the cache's arrays as real arrays, as a Zarr cache stores them (uncommitted rows are the fill value)
and, below ``kd/``, what makes a cache of them: ``cache.json`` (manifest and teachers) and ``commits/<part>`` (its
records, one a line, with sizes and checksums of Zarr chunks). docs/format.md specifies it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, final

import numpy as np
from pydantic import BaseModel, ConfigDict

from kdcli.cache.admin.containers import (
    Compression,
    Container,
    create,
    open_container,
    require_compression,
)
from kdcli.cache.admin.moving import (
    Moved,
    classifiers_in,
    committed,
    finish_cache,
    made_before,
    parts_of,
    published,
    require_new,
    require_sound,
    require_space,
    same_cache,
    say_made_before,
    start_cache,
    units,
)
from kdcli.cache.admin.zips import PACK_AGAIN
from kdcli.cache.arrays import ArrayExtent, array_extents, whole_extent
from kdcli.cache.classifier import Classifier, parse_classifier
from kdcli.cache.commits import Commit, as_lines, chunk_files, misfits, parse_commit
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import BackendName, Layout, Manifest
from kdcli.cache.provenance import TeacherRecord, require_known, seal, unseal
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import BACKENDS, Store, require_classes
from kdcli.console import console
from kdcli.documents import from_document
from kdcli.errors import (
    Advice,
    BadDataError,
    CorruptError,
    KdError,
    OutputExistsError,
)
from kdcli.reading import parse_json

RECORDS = "kd/cache.json"
Extents = dict[tuple[str, str], ArrayExtent]
"""Every array by part and name."""
Write = Callable[[ArrayExtent, int, int | None, np.ndarray], None]
Put = Callable[[Path, np.ndarray], list[int]]
"""What is done with a chunk: size and checksum of its file, written or foreseen."""


@final
class Packed(BaseModel):
    """``kd/cache.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packed: Literal[1] = 1
    compress: Compression
    manifest: Manifest
    teachers: tuple[TeacherRecord, ...]


def _extents(manifest: Manifest, keys: KeyTable, teachers: Iterable[TeacherRecord]) -> Extents:
    found = array_extents(manifest, keys, {record.name: record for record in teachers})
    return {(extent.part, extent.name): extent for extent in found}


def _total_bytes(commits: dict[str, list[Commit]]) -> int:
    found = (commit for part in commits.values() for commit in part)
    return sum(size for commit in found for records in commit.arrays.values() for size, _ in records)


def _total_chunks(commits: dict[str, list[Commit]]) -> int:
    return sum(len(records) for found in commits.values() for c in found for records in c.arrays.values())


# --- packing ----------------------------------------------------------------------------------


def pack(
    root: Path,
    target: Path,
    teachers: Sequence[str] = (),
    compress: str = "none",
    overwrite: bool = False,
) -> Moved:
    """Write what is committed of a cache into one file, checking every byte against its record.

    Args:
        root: the cache.
        target: ``.h5``, ``.zarr`` or ``.zarr.zip``.
        teachers: names of those to take along; default: all.
        compress: none, gzip, or (Zarr) zstd.
        overwrite: replace a packed cache that is at ``target``.

    Raises:
        UsageError: the ending or compression is none.
        NotFoundError: no such teacher.
        OutputExistsError: something is at ``target``, and not what this call made before it was killed.
        CorruptError: bytes of the cache are not those that were committed.
    """
    compression = require_compression(target, compress)
    if overwrite:
        _require_ours(target)
    reader = CacheReader(root)
    chosen = _chosen(reader, teachers)
    commits = {part: committed(reader, part) for part in parts_of(chosen)}
    moved = Moved(target, reader.manifest.cache_id, reader.manifest.backend, units(reader.store, commits))
    if target.exists() and not overwrite:
        records = Packed(compress=compression, manifest=reader.manifest, teachers=tuple(chosen))
        if not _is_packed(reader, target, records, commits):
            raise OutputExistsError(f"{target} exists already", Advice("pack-exists"))
        say_made_before(target)
        return moved
    if compression == "none":
        require_space(target, _total_bytes(commits))
    with published(target, overwrite) as temporary, create(temporary, target, compression) as box:
        _pack_all(reader, box, chosen, commits)
    return moved


def _is_packed(reader: CacheReader, target: Path, records: Packed, commits: dict[str, list[Commit]]) -> bool:
    """Whether a packed cache holds just this, every byte: a call made it that was killed when it was done."""
    store, zarr = reader.store, BACKENDS["zarr"]
    extents = _extents(records.manifest, reader.keys, records.teachers)
    try:
        with open_container(target) as box:
            if _read_records(box) != records:
                return False
            _read_samples(box, records.manifest)
            if not _same_classifiers(_read_classifiers(box, records), reader.store, records.teachers):
                return False
            for part, found in commits.items():
                packed = _read_commits(box, store, part)
                if packed != [_pack_unit(store, commit, extents, lambda *_: None) for commit in found]:
                    return False
                for commit in packed:
                    _unpack_unit(box, store, extents, commit, lambda _, values: zarr.foresee(values))
    except KdError:
        return False
    return True


def _require_ours(target: Path) -> None:
    if not target.exists():
        return
    try:
        with open_container(target) as box:
            ours = RECORDS in box
    except KdError:
        ours = False
    if not ours:
        raise OutputExistsError(
            f"{target} is no packed cache", "Give another name: kd replaces only its own."
        )


def _chosen(reader: CacheReader, names: Sequence[str]) -> list[TeacherRecord]:
    known = reader.teachers
    require_known(names, known, reader.layout.root)
    return [record for name, record in known.items() if not names or name in names]


def _pack_all(
    reader: CacheReader, box: Container, teachers: list[TeacherRecord], commits: dict[str, list[Commit]]
) -> None:
    manifest, store = reader.manifest, reader.store
    extents = _extents(manifest, reader.keys, teachers)
    for extent in extents.values():
        box.declare(extent)
        if extent.whole:
            box.write(extent, 0, None, store.whole(extent.name, extent.rows))
    with console.progress(_total_chunks(commits), "chunks", "pack") as bar:
        for part, found in commits.items():
            packed = []
            for commit in found:
                packed.append(_pack_unit(store, commit, extents, box.write))
                bar.advance(sum(map(len, commit.arrays.values())))
            box.put_bytes(f"kd/commits/{part}", as_lines(packed).encode())
    for name, classifier in classifiers_in([store], teachers).items():
        box.put_bytes(_classifier(name), classifier.to_bytes(store.teachers[name].id))
    records = Packed(compress=box.compression, manifest=manifest, teachers=tuple(teachers))
    box.put_bytes(RECORDS, json.dumps(seal(records.model_dump(mode="json"))).encode())


def _pack_unit(store: Store, commit: Commit, extents: Extents, write: Write) -> Commit:
    """Check a unit's chunks and give each to ``write``; its record, with sizes and checksums as a Zarr cache has."""
    arrays: dict[str, list[list[int]]] = {name: [] for name in commit.arrays}
    for array, view, path, size, crc in chunk_files(store, commit):
        require_sound(store, path, size, crc, path)
        extent = extents[commit.part, array]
        values = store.backend.map(path, extent.rows, extent.spec)
        past_end = values[extent.shape[0] - commit.block * extent.rows :]
        if past_end.tobytes() != np.full_like(past_end, extent.spec.fill).tobytes():
            raise CorruptError(f"{path} holds values in rows past the end", "Compute this block again.")
        write(extent, commit.block, view, values)
        arrays[array].append(BACKENDS["zarr"].foresee(values))
    return replace(commit, arrays=arrays)


# --- unpacking --------------------------------------------------------------------------------


def unpack(packed: Path, target: Path, backend: BackendName | None = None) -> Moved:
    """Make a cache of a packed one, checking every byte.

    Args:
        packed: what :func:`pack` wrote.
        target: folder of the new cache.
        backend: how it stores its chunks; default: as the packed cache did. Then every file of its arrays, its
            commit records, manifest and teacher records are what they were; with the other backend the
            records have the sizes and checksums of the new files.

    Raises:
        BadDataError: ``packed`` is no packed cache.
        OutputExistsError: something is at ``target``, and not what this call made before it was killed.
        CorruptError: bytes are not those that were packed.
    """
    if not Layout(target).manifest.is_file():
        require_new(target)
    with open_container(packed) as box:
        records = _read_records(box)
        manifest = records.manifest
        if backend is not None:
            manifest = manifest.model_copy(update={"backend": backend})
        store = Store(target, manifest, {record.name: record for record in records.teachers})
        commits = {part: _read_commits(box, store, part) for part in store.parts()}
        keys, labels = _read_samples(box, manifest)
        classifiers = _read_classifiers(box, records)
        extents = _extents(manifest, keys, records.teachers)
        if (there := same_cache(target, manifest, records.teachers)) is not None:
            foreseen = _unpack_all(
                box, store, extents, commits, lambda _, values: store.backend.foresee(values)
            )
            if (made := made_before(there, foreseen)) is not None:
                return made
        require_new(target)
        require_space(target, _total_bytes(commits))
        with published(target) as root:
            store = start_cache(root, manifest, keys, labels, records.teachers, classifiers)
            remade = _unpack_all(box, store, extents, commits, store.write)
            finish_cache(store, remade)
    return Moved(target, manifest.cache_id, manifest.backend, units(store, remade))


def _read_records(box: Container) -> Packed:
    if RECORDS not in box:
        raise BadDataError(f"{box.path} is no packed cache", Advice("not-packed"))
    where = f"{box.path}: {RECORDS}"
    document = parse_json(box.bytes_of(RECORDS), where, CorruptError, PACK_AGAIN)
    version = document.get("packed") if isinstance(document, dict) else None
    if isinstance(version, int) and version > 1:
        raise CorruptError(f"{box.path}: packed in form {version}, this kd reads form 1", Advice("update"))
    records = from_document(Packed, unseal(document, where, PACK_AGAIN), where, CorruptError, PACK_AGAIN)
    if len({record.name for record in records.teachers}) < len(records.teachers):
        raise CorruptError(f"{where}: teachers: two have the same name", PACK_AGAIN)
    box.compression = records.compress
    return records


def _classifier(name: str) -> str:
    """What the classifier of a teacher is called in a packed cache."""
    return f"kd/classifiers/{name}"


def _read_classifiers(box: Container, records: Packed) -> dict[str, Classifier]:
    """The classifiers of the teachers, each that of its teacher, by name."""
    found = {}
    for record in records.teachers:
        if (place := _classifier(record.name)) in box:
            try:
                found[record.name] = parse_classifier(box.bytes_of(place), f"{box.path}: {place}", record)
            except CorruptError as error:
                raise CorruptError(error.message, PACK_AGAIN) from error
    return found


def _same_classifiers(packed: dict[str, Classifier], store: Store, teachers: Iterable[TeacherRecord]) -> bool:
    own = classifiers_in([store], teachers)
    files = [
        {name: each.to_bytes(store.teachers[name].id) for name, each in found.items()}
        for found in (packed, own)
    ]
    return files[0] == files[1]


def _read_commits(box: Container, store: Store, part: str) -> list[Commit]:
    """The records of a part: each of this cache, of a unit of it, of that unit's chunks and of their sizes."""
    name, zarr = f"kd/commits/{part}", BACKENDS["zarr"]
    specs = store.specs(part)
    sizes = {array: zarr.file_size(store.manifest.block_rows, spec) for array, spec in specs.items()}
    found = []
    try:
        places = set(store.units_of(part))
        for line in box.bytes_of(name).splitlines():
            commit = parse_commit(line, box.path / name)
            fits = commit.part == part and (commit.block, commit.group) in places
            if (
                not fits
                or misfits(store, commit)
                or any(
                    size != sizes[array] for array, records in commit.arrays.items() for size, _ in records
                )
            ):
                raise CorruptError(f"{box.path}: the record of {commit.unit} belongs elsewhere")
            places.remove((commit.block, commit.group))
            found.append(commit)
    except CorruptError as error:
        raise CorruptError(error.message, PACK_AGAIN) from error
    return found


def _read_samples(box: Container, manifest: Manifest) -> tuple[KeyTable, np.ndarray | None]:
    def whole(name: str, length: int) -> np.ndarray:
        return box.read(whole_extent(name, length), 0, None)

    offsets = whole("key_offsets", manifest.rows + 1)
    keys = KeyTable(whole("key_bytes", max(0, int(offsets[-1]))), offsets)
    if not keys.is_sound() or keys.digest() != manifest.data.keys:
        raise CorruptError(f"{box.path}: its keys are not those of its manifest", PACK_AGAIN)
    if manifest.data.labels is None:
        return keys, None
    labels = whole("labels/class", manifest.rows)
    if block_digest(labels) != manifest.data.labels:
        raise CorruptError(f"{box.path}: its labels are not those of its manifest", PACK_AGAIN)
    require_classes(labels, manifest, box.path)
    return keys, labels


def _unpack_all(
    box: Container, store: Store, extents: Extents, commits: dict[str, list[Commit]], put: Put
) -> dict[str, list[Commit]]:
    remade: dict[str, list[Commit]] = {part: [] for part in commits}
    with console.progress(_total_chunks(commits), "chunks", "unpack") as bar:
        for part, found in commits.items():
            for commit in found:
                remade[part].append(_unpack_unit(box, store, extents, commit, put))
                bar.advance(sum(map(len, commit.arrays.values())))
    return remade


def _unpack_unit(box: Container, store: Store, extents: Extents, commit: Commit, put: Put) -> Commit:
    """Check a unit's chunks and give each to ``put``; its record, with their sizes and checksums in this cache."""
    arrays: dict[str, list[list[int]]] = {name: [] for name in commit.arrays}
    for array, view, path, size, crc in chunk_files(store, commit):
        extent = extents[commit.part, array]
        place = f"{extent.folder} block {commit.block}{'' if view is None else f' view {view}'}"
        try:
            values = box.read(extent, commit.block, view)
        except CorruptError as error:
            raise CorruptError(f"{error.message} ({place})", PACK_AGAIN) from error
        if BACKENDS["zarr"].foresee(values) != [size, crc]:
            raise CorruptError(f"{box.path}: {place} is not what was packed", PACK_AGAIN)
        arrays[array].append(put(path, values))
    return replace(commit, arrays=arrays)
