"""One cache out of several of the same data: shards that workers without a shared disk made, or other teachers."""

import errno
import filecmp
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from kdcli.cache.admin.moving import (
    Moved,
    classifiers_in,
    committed,
    finish_cache,
    made_before,
    published,
    require_new,
    require_sound,
    require_space,
    same_cache,
    start_cache,
    units,
)
from kdcli.cache.commits import Commit, chunk_files
from kdcli.cache.layout import Layout, Manifest
from kdcli.cache.pixels import PIXEL_TOLERANCE, pixel_drift
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.console import console
from kdcli.errors import Advice, CorruptError, IdentityError, UsageError
from kdcli.files import real_path, sizes_in, storage_errors
from kdcli.types import Difference, differences

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def merge(inputs: Sequence[Path], target: Path) -> Moved:
    """Make one cache of the units of several; all inputs stay as they are.

    Chunk files are linked where the file system can, else copied; each is read and checked against its record.
    Records are made anew: the result is another cache, with an id of its own.

    Args:
        inputs: caches of the same data, views and blocks. A teacher may be in any of them.
        target: folder of the new cache.

    Raises:
        UsageError: fewer than two inputs, or one twice.
        IdentityError: they differ in a field, or in the bytes of a unit that several have.
        CorruptError: bytes of an input are not those that were committed.
        OutputExistsError: something is at ``target``, and not what this call made before it was killed.
    """
    if len(inputs) < 2 or len({real_path(path) for path in inputs}) < len(inputs):
        raise UsageError("merging needs two caches or more, each given once", Advice("merge"))
    if not Layout(target).manifest.is_file():
        require_new(target)
    readers = [CacheReader(path) for path in inputs]
    for other in readers[1:]:
        _require_same_data(readers[0], other)
    teachers = _joint_teachers(readers)
    first = readers[0]
    manifest = _merged_manifest(readers)
    if (made := _made_before(readers, manifest, teachers, target)) is not None:
        return made
    require_new(target)
    with published(target) as root:
        with storage_errors(target):
            copied = [reader.store.data for reader in readers if not _same_disk(reader, target)]
            require_space(target, sum(sum(sizes_in(folder).values()) for folder in copied))
        labels = None if manifest.data.labels is None else first.labels
        classifiers = classifiers_in([reader.store for reader in readers], teachers)
        store = start_cache(root, manifest, first.keys, labels, teachers, classifiers)
        merged = _Merger(readers, store).run()
        finish_cache(store, merged)
    return Moved(target, manifest.cache_id, manifest.backend, units(store, merged))


def _made_before(
    readers: Sequence[CacheReader], manifest: Manifest, teachers: Sequence[TeacherRecord], target: Path
) -> Moved | None:
    """What is at ``target`` if it is this very merge; its id is one of its own."""
    if not Layout(target).manifest.is_file():
        return None
    own_id = CacheReader(target).manifest.cache_id
    there = same_cache(target, manifest.model_copy(update={"cache_id": own_id}), teachers)
    if there is None:
        return None
    merger = _Merger(readers, there.store)
    held = {part: merger.holders(part) for part in there.store.parts()}
    return made_before(
        there, {part: [found[0][1] for found in places.values()] for part, places in held.items()}
    )


def _same_disk(reader: CacheReader, target: Path) -> bool:
    return reader.layout.root.stat().st_dev == target.absolute().parent.stat().st_dev


# --- the same data and teachers ---------------------------------------------------------------


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What the inputs must agree in. Where the data was may differ: each worker has its own disk."""
    return {
        "backend": manifest.backend,
        "block_rows": manifest.block_rows,
        "segments": [segment.rows for segment in manifest.segments],
        "view_groups": list(manifest.view_groups),
        "param_names": list(manifest.param_names),
        "view_set": manifest.view_set,
        "data": manifest.data.gate(),
    }


def _require_same_data(first: CacheReader, other: CacheReader) -> None:
    found = differences(_identity(first.manifest), _identity(other.manifest))
    drift = pixel_drift(first.manifest.view_pixels, other.manifest.view_pixels)
    if drift > PIXEL_TOLERANCE:
        found.append(Difference("view_pixels", "recorded pixels", f"up to {drift}/255 apart"))
    if found:
        raise IdentityError(
            f"{other.layout.root} is not of the same data and form as {first.layout.root}",
            Advice("merge-alike"),
            found,
        )
    if drift:
        console.warn(
            f"{other.layout.root} was made with pixels up to {drift}/255 apart from {first.layout.root}'s"
        )


def _joint_teachers(readers: Sequence[CacheReader]) -> list[TeacherRecord]:
    """The teachers of all inputs, each with the kinds that any of them keeps."""
    found: dict[str, tuple[TeacherRecord, Path]] = {}
    for reader in readers:
        root = reader.layout.root
        for name, record in reader.teachers.items():
            known, where = found.setdefault(name, (record, root))
            try:
                known.require_same(record, str(where))
            except IdentityError as error:
                raise IdentityError(
                    f"{root} and {where} hold different teachers '{name}'",
                    "Leave one of them out, or make it again under another name.",
                    error.differences,
                ) from error
            outputs = {**known.outputs, **record.outputs}
            found[name] = known.model_copy(update={"outputs": outputs}), where
    return [record for record, _ in found.values()]


def _merged_manifest(readers: Sequence[CacheReader]) -> Manifest:
    first = readers[0].manifest
    ids = [reader.manifest.cache_id for reader in readers]
    created = {**first.created, "merged_from": ids}
    return first.model_copy(update={"cache_id": secrets.token_hex(16), "created": created})


# --- units ------------------------------------------------------------------------------------


@final
class _Merger:
    """Takes each unit from the first input that has it, after comparing all that have it."""

    def __init__(self, readers: Sequence[CacheReader], store: Store) -> None:
        self._readers, self._store = readers, store
        self._contents: dict[int, tuple[str, Path]] = {}

    def run(self) -> dict[str, list[Commit]]:
        """The records of all units that any input has."""
        held = {part: self.holders(part) for part in self._store.parts()}
        merged: dict[str, list[Commit]] = {}
        with console.progress(sum(map(len, held.values())), "units", "merge") as bar:
            for part, places in held.items():
                merged[part] = []
                for place in sorted(places):
                    merged[part].append(self._take(places[place]))
                    bar.advance(1)
        return merged

    def holders(self, part: str) -> dict[tuple[int, int], list[tuple[CacheReader, Commit]]]:
        """Who has each unit of a part, and the records of it."""
        found: dict[tuple[int, int], list[tuple[CacheReader, Commit]]] = {}
        for reader in self._readers:
            if part in reader.store.parts():
                for commit in committed(reader, part):
                    found.setdefault((commit.block, commit.group), []).append((reader, commit))
        return found

    def _take(self, holders: list[tuple[CacheReader, Commit]]) -> Commit:
        for reader, commit in holders:
            self._require_same_images(reader, commit)
            _require_same_unit(holders[0], (reader, commit))
        source, recorded = holders[0]
        store, manifest = self._store, self._store.manifest
        commit = replace(recorded, cache_id=manifest.cache_id, part_id=store.part_id(recorded.part))
        theirs = [(reader, chunk_files(reader.store, other)) for reader, other in holders]
        for _, _, path, size, crc in chunk_files(store, commit):
            originals = [next(files)[2] for _, files in theirs]
            _link_or_copy(originals[0], path)
            require_sound(store, path, size, crc, originals[0])
            for (reader, _), original in zip(theirs[1:], originals[1:], strict=True):
                require_sound(reader.store, original, size, crc, original)
                if not filecmp.cmp(path, original, shallow=False):
                    raise CorruptError(
                        f"{commit.unit} has other bytes in {reader.layout.root} than in {source.layout.root}",
                        "Leave one of them out.",
                    )
        return commit

    def _require_same_images(self, reader: CacheReader, commit: Commit) -> None:
        """A block's images must be the same ones in every unit of every input."""
        content, where = self._contents.setdefault(commit.block, (commit.content, reader.layout.root))
        if content != commit.content:
            rows = self._store.manifest.rows_of(commit.block)
            raise IdentityError(
                f"the images of rows {rows.start}-{rows.stop - 1} (block {commit.block}) are others in "
                f"{reader.layout.root} than in {where}",
                "Make both from the same files, or leave one out.",
                [Difference(f"{commit.unit}: content", content, commit.content)],
            )


def _require_same_unit(first: tuple[CacheReader, Commit], other: tuple[CacheReader, Commit]) -> None:
    (reader, mine), (other_reader, theirs) = first, other
    found = [
        Difference(name, getattr(mine, name), getattr(theirs, name))
        for name in ("keys", "absent")
        if getattr(mine, name) != getattr(theirs, name)
    ]
    for array in dict.fromkeys([*mine.arrays, *theirs.arrays]):
        if mine.arrays.get(array) != theirs.arrays.get(array):
            found.append(Difference(array, mine.arrays.get(array), theirs.arrays.get(array)))
    if found:
        raise IdentityError(
            f"{mine.unit} is not the same in {other_reader.layout.root} as in {reader.layout.root}",
            Advice("merge-other-bytes"),
            found,
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """Both names for one file where that can be: chunks are replaced, never changed in place."""
    with storage_errors(target):
        try:
            _link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(source, target)


_link = os.link
