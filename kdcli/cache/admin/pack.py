"""A whole cache in one file, and back, bit by bit.

The file has the cache's arrays as real arrays (uncommitted rows are the fill value) and, below ``kd/``, what
makes a cache of them: ``cache.json`` (manifest and teachers), ``commits/<part>`` (its records, one a line) and
``crc32c/<array>`` (crc32c of the raw rows of every chunk, in blocks x views). docs/format.md specifies it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kdcli.cache.admin.containers import (
    PACK_AGAIN,
    Container,
    Place,
    create,
    kind_of,
    open_container,
    require_compression,
)
from kdcli.cache.admin.moving import (
    Moved,
    committed,
    finish_cache,
    parts_of,
    published,
    require_new,
    require_sound,
    require_space,
    start_cache,
    units,
)
from kdcli.cache.arrays import WHOLE_ARRAYS, ArrayExtent, array_extents, array_folder, whole_arrays
from kdcli.cache.backends.base import checksum
from kdcli.cache.commits import Commit, as_lines, block_digest, chunk_files, parse_commit
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, BackendName, Manifest
from kdcli.cache.provenance import ArraySpec, TeacherRecord, seal, unseal
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.console import console
from kdcli.errors import BadDataError, CorruptError, KdError, NotFoundError, OutputExistsError, nearest

RECORDS = "kd/cache.json"
CRC = ArraySpec((), "<u4", per_view=False)


@final
class Packed(BaseModel):
    """``kd/cache.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packed: Literal[1] = 1
    manifest: Manifest
    teachers: tuple[TeacherRecord, ...]


@final
@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk is in a packed file: rows past the end of the array are not in it."""

    folder: str
    place: Place
    spec: ArraySpec
    rows: int


def _chunk(manifest: Manifest, commit: Commit, array: str, view: int | None, spec: ArraySpec) -> Chunk:
    start = commit.block * manifest.block_rows
    stop = min(start + manifest.block_rows, manifest.rows)
    place = slice(start, stop) if view is None else (slice(start, stop), view)
    return Chunk(array_folder(commit.part, array), place, spec, stop - start)


def _crc_shape(extent: ArrayExtent, blocks: int) -> tuple[int, ...]:
    return (blocks, extent.shape[1]) if extent.spec.per_view else (blocks,)


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
        OutputExistsError: something is at ``target``.
        CorruptError: bytes of the cache are not those that were committed.
    """
    compression = require_compression(target, compress)
    _require_free(target, overwrite)
    reader = CacheReader(root)
    chosen = _chosen(reader, teachers)
    commits = {part: committed(reader, part) for part in parts_of(chosen)}
    if compression == "none":
        require_space(target, _total_bytes(commits))
    with published(target, overwrite) as temporary, create(kind_of(target), temporary, compression) as box:
        _pack_all(reader, box, chosen, commits)
    return Moved(target, reader.manifest.cache_id, reader.manifest.backend, units(reader.store, commits))


def _require_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists already", "Give another name, or --overwrite.")
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
    for name in names:
        if name not in known:
            raise NotFoundError(
                f"no teacher '{name}' in {reader.layout.root}.{nearest(name, known)}",
                f"Cached teachers: {', '.join(known) or 'none yet'}.",
            )
    return [record for name, record in known.items() if not names or name in names]


def _total_bytes(commits: dict[str, list[Commit]]) -> int:
    found = (commit for part in commits.values() for commit in part)
    return sum(size for commit in found for records in commit.arrays.values() for size, _ in records)


def _total_chunks(commits: dict[str, list[Commit]]) -> int:
    return sum(len(records) for found in commits.values() for c in found for records in c.arrays.values())


def _pack_all(
    reader: CacheReader,
    box: Container,
    teachers: list[TeacherRecord],
    commits: dict[str, list[Commit]],
) -> None:
    manifest, store = reader.manifest, reader.store
    extents = list(array_extents(manifest, reader.keys, {record.name: record for record in teachers}))
    crcs = {extent.folder: np.zeros(_crc_shape(extent, manifest.blocks), np.uint32) for extent in extents}
    for extent in extents:
        box.declare(extent)
        if extent.whole:
            box.write(extent.folder, slice(None), store.whole(extent.name, extent.shape[0]))
    with console.progress(_total_chunks(commits), "chunks", "pack") as bar:
        for part, found in commits.items():
            for commit in found:
                _pack_unit(store, commit, box, crcs)
                bar.advance(sum(map(len, commit.arrays.values())))
            box.put_text(f"kd/commits/{part}", as_lines(found))
    for extent in extents:
        if not extent.whole:
            box.put(f"kd/crc32c/{extent.folder}", crcs[extent.folder])
    records = Packed(manifest=manifest, teachers=tuple(teachers)).model_dump(mode="json")
    box.put_text(RECORDS, json.dumps(seal(records)))


def _pack_unit(store: Store, commit: Commit, box: Container, crcs: dict[str, np.ndarray]) -> None:
    specs = store.specs(commit.part)
    for array, view, path, size, crc in chunk_files(store, commit):
        require_sound(store, path, size, crc, path)
        chunk = _chunk(store.manifest, commit, array, view, specs[array])
        values = store.backend.map(path, store.manifest.block_rows, chunk.spec)
        past_end = values[chunk.rows :]
        if past_end.tobytes() != np.full_like(past_end, chunk.spec.fill).tobytes():
            raise CorruptError(f"{path} holds values in rows past the end", "Compute this block again.")
        box.write(chunk.folder, chunk.place, values[: chunk.rows])
        crcs[chunk.folder][commit.block if view is None else (commit.block, view)] = checksum(
            values.tobytes()
        )


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
        OutputExistsError: something is at ``target``.
        CorruptError: bytes are not those that were packed.
    """
    require_new(target)
    with open_container(packed) as box:
        records = _read_records(box)
        manifest = records.manifest
        if backend is not None:
            manifest = manifest.model_copy(update={"backend": backend})
        commits = {part: _read_commits(box, part) for part in parts_of(records.teachers)}
        require_space(target, _total_bytes(commits))
        keys, labels = _read_samples(box, manifest)
        with published(target) as root:
            store = start_cache(root, manifest, keys, labels, records.teachers)
            remade = _unpack_all(box, store, commits, records.manifest.backend)
            finish_cache(store, remade)
    return Moved(target, manifest.cache_id, manifest.backend, units(store, remade))


def _read_records(box: Container) -> Packed:
    if RECORDS not in box:
        raise BadDataError(f"{box.path} is no packed cache", "Give what kd cache pack wrote.")
    try:
        document = json.loads(box.text(RECORDS))
        version = document.get("packed") if isinstance(document, dict) else None
        if isinstance(version, int) and version > 1:
            raise CorruptError(f"{box.path}: packed in form {version}, this kd reads form 1", "Update kd.")
        records = Packed.model_validate(unseal(document, f"{box.path}: {RECORDS}"))
    except (ValidationError, ValueError) as error:
        if isinstance(error, CorruptError):
            raise CorruptError(error.message, PACK_AGAIN) from error
        raise CorruptError(f"{box.path}: {RECORDS} is damaged", PACK_AGAIN) from error
    for record in records.teachers:
        _require_inside(box, record)
    return records


def _require_inside(box: Container, record: TeacherRecord) -> None:
    """Names become paths: none may lead out of the cache."""
    names = [record.name, *record.outputs, *(output.name for output in record.outputs.values())]
    paths = [name for output in record.outputs.values() for name in output.arrays]
    if any("/" in name for name in names) or {"", ".", ".."} & {
        p for n in [*names, *paths] for p in n.split("/")
    }:
        raise CorruptError(f"{box.path}: a teacher's name or array is no name", "Do not use this file.")


def _read_commits(box: Container, part: str) -> list[Commit]:
    name = f"kd/commits/{part}"
    try:
        return [parse_commit(line, box.path / name) for line in box.text(name).splitlines()]
    except CorruptError as error:
        raise CorruptError(error.message, PACK_AGAIN) from error


def _read_samples(box: Container, manifest: Manifest) -> tuple[KeyTable, np.ndarray | None]:
    def whole(name: str) -> np.ndarray:
        return box.read(array_folder(SAMPLES, name), slice(None), WHOLE_ARRAYS[name])

    keys = KeyTable(whole("key_bytes"), whole("key_offsets"))
    if not keys.is_sound() or keys.digest() != manifest.data.keys:
        raise CorruptError(f"{box.path}: its keys are not those of its manifest", PACK_AGAIN)
    if "labels/class" not in whole_arrays(manifest, keys):
        return keys, None
    labels = whole("labels/class")
    if block_digest(labels) != manifest.data.labels:
        raise CorruptError(f"{box.path}: its labels are not those of its manifest", PACK_AGAIN)
    return keys, labels


def _unpack_all(
    box: Container, store: Store, commits: dict[str, list[Commit]], packed_backend: BackendName
) -> dict[str, list[Commit]]:
    remade: dict[str, list[Commit]] = {part: [] for part in commits}
    exact = (
        packed_backend == store.manifest.backend == "zarr"
    )  # HDF5's headers may differ between its versions
    with console.progress(_total_chunks(commits), "chunks", "unpack") as bar:
        for part, found in commits.items():
            crcs = _read_crcs(box, store, part)
            places = set(store.units_of(part))
            for commit in found:
                _require_fits(box, store, part, commit, places)
                arrays = _unpack_unit(box, store, commit, crcs)
                if exact and arrays != commit.arrays:
                    raise CorruptError(f"{box.path}: {commit.unit} is not what was committed", PACK_AGAIN)
                remade[part].append(replace(commit, arrays=arrays))
                places.remove((commit.block, commit.group))
                bar.advance(sum(map(len, arrays.values())))
    return remade


def _read_crcs(box: Container, store: Store, part: str) -> dict[str, np.ndarray]:
    found = {}
    for name, spec in store.specs(part).items():
        row = (store.views(part),) if spec.per_view else ()
        table = f"kd/crc32c/{array_folder(part, name)}"
        found[name] = box.read(table, slice(None), replace(CRC, row_shape=row))
        if len(found[name]) != store.manifest.blocks:
            raise CorruptError(f"{box.path}: {table} is not of {store.manifest.blocks} blocks", PACK_AGAIN)
    return found


def _require_fits(
    box: Container, store: Store, part: str, commit: Commit, places: set[tuple[int, int]]
) -> None:
    """A record must be of this cache, of a unit that it has, and of that unit's chunks."""
    ids = (store.manifest.cache_id, part, store.part_id(part))
    fits = (commit.cache_id, commit.part, commit.part_id) == ids and (commit.block, commit.group) in places
    if fits:
        views = len(store.manifest.views_of(commit.group, store.views(part)))
        specs = store.arrays_in(part, commit.group)
        expected = {name: views if spec.per_view else 1 for name, spec in specs.items()}
        fits = {name: len(records) for name, records in commit.arrays.items()} == expected
    if not fits:
        raise CorruptError(f"{box.path}: the record of {commit.unit} belongs elsewhere", PACK_AGAIN)


def _unpack_unit(
    box: Container, store: Store, commit: Commit, crcs: dict[str, np.ndarray]
) -> dict[str, list[list[int]]]:
    specs = store.specs(commit.part)
    written: dict[str, list[list[int]]] = {name: [] for name in commit.arrays}
    for array, view, path, _, _ in chunk_files(store, commit):
        chunk = _chunk(store.manifest, commit, array, view, specs[array])
        rows = box.read(chunk.folder, chunk.place, chunk.spec)
        values = np.full(
            (store.manifest.block_rows, *chunk.spec.row_shape), chunk.spec.fill, chunk.spec.dtype
        )
        if len(rows) == chunk.rows:
            values[: chunk.rows] = rows
        recorded = crcs[array][commit.block if view is None else (commit.block, view)]
        if len(rows) != chunk.rows or checksum(values.tobytes()) != recorded:
            of_view = "" if view is None else f" view {view}"
            raise CorruptError(
                f"{box.path}: {chunk.folder} block {commit.block}{of_view} is not what was packed", PACK_AGAIN
            )
        written[array].append(store.write(path, values))
    return written
