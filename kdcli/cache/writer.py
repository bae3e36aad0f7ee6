"""Making a cache and filling it, unit by unit, so that a kill at any instant loses at most a task."""

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.claims import Claims
from kdcli.cache.commits import (
    Commit,
    block_digest,
    compact,
    done_mask,
    read_commit,
    read_commits,
    sizes_agree,
    write_commit,
)
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Layout, Manifest, Unit, load_manifest
from kdcli.cache.provenance import ArraySpec, TeacherRecord, canonical_sha256
from kdcli.cache.reader import SAMPLE_ARRAYS, load_keys, load_teachers
from kdcli.cache.zarr_backend import (
    chunk_path,
    create_array,
    create_group,
    create_row_array,
    map_chunk,
    read_crc,
    write_chunk,
)
from kdcli.console import console
from kdcli.errors import IdentityError, OutputExistsError, StorageError
from kdcli.runtime import fsync_folder, storage_errors, write_json
from kdcli.types import Difference


def _write_whole(layout: Layout, group: Any, name: str, values: np.ndarray) -> dict[str, list[list[int]]]:
    """Write a sample array as one chunk; growth adds chunks of the same size."""
    spec = ArraySpec(values.shape[1:], values.dtype.str, per_view=False)
    create_array(group, name, values.shape, values.shape, spec)
    path = chunk_path(layout.array(SAMPLES, name), 0, None, values.ndim - 1)
    return {name: [list(write_chunk(path, values, layout.tmp))]}


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
            raise StorageError(f"{root} is a file, not a cache folder", "Give --cache another path.")
        root.parent.mkdir(parents=True, exist_ok=True)
        if root.is_dir() and any(root.iterdir()):
            if Layout(root).manifest.is_file():
                return load_manifest(root)
            raise OutputExistsError(
                f"{root} holds other files and is not a kd cache", "Give --cache a new or empty folder."
            )
        skeleton = Layout(root.with_name(f".{root.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"))
        try:
            _build_skeleton(skeleton, manifest, keys, labels)
            skeleton.root.rename(root)
        except OSError:
            if Layout(root).manifest.is_file():
                return load_manifest(root)
            raise
        finally:
            shutil.rmtree(skeleton.root, ignore_errors=True)
        fsync_folder(root.parent)
    return manifest


def _build_skeleton(
    layout: Layout, manifest: Manifest, keys: KeyTable, labels: Int64[np.ndarray, " n"] | None
) -> None:
    for folder in (layout.root, layout.commits, layout.claims, layout.tmp, layout.verified):
        folder.mkdir()
    group = create_group(layout.group)
    samples = group.create_group(SAMPLES)
    written = _write_whole(layout, samples, "key_bytes", keys.blob)
    written |= _write_whole(layout, samples, "key_offsets", keys.offsets)
    if labels is not None:
        label_group = samples.create_group("labels")
        spec = ArraySpec((), "<i8", per_view=False)
        create_array(label_group, "class", labels.shape, labels.shape, spec)
        path = chunk_path(layout.array(SAMPLES, "labels/class"), 0, None, 0)
        written["labels/class"] = [list(write_chunk(path, labels.astype("<i8"), layout.tmp))]
    views = group.create_group("views")
    group.create_group("teachers")
    for name, spec in SAMPLE_ARRAYS.items():
        parent = views if spec.per_view else samples
        create_row_array(parent, name, manifest.rows, manifest.views, manifest.block_rows, spec)
    document = manifest.model_dump(mode="json")
    proof = {"cache_id": manifest.cache_id, "manifest": canonical_sha256(document), "arrays": written}
    write_json(layout.created, proof)
    write_json(layout.manifest, document)


@final
class CacheWriter:
    """One process's hand on one cache: claims units, publishes them, knows what is missing.

    Use as a context manager; leaving it releases every claim.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.layout, self.manifest = Layout(root), manifest
        self.keys = load_keys(self.layout)
        self.teachers = load_teachers(self.layout)
        self.claims = Claims(self.layout)

    def __enter__(self) -> "CacheWriter":
        with storage_errors(self.layout.root):
            for folder in (self.layout.tmp, self.layout.claims, self.layout.commits):
                folder.mkdir(exist_ok=True)
        self.claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.claims.__exit__(*error)

    def add_teacher(self, record: TeacherRecord) -> TeacherRecord:
        """Make the folder of a teacher by one rename, or return the one that is there.

        Raises:
            IdentityError: another teacher has this name in the cache.
        """
        folder = self.layout.teacher(record.name)
        if not folder.is_dir():
            fresh = self.layout.tmp / f"teacher-{os.getpid()}-{os.urandom(4).hex()}"
            group = create_group(fresh, {"kd": record.model_dump(mode="json")})
            for name, spec in record.array_specs().items():
                create_row_array(
                    group, name, self.manifest.rows, self.manifest.views, self.manifest.block_rows, spec
                )
            with storage_errors(folder):
                try:
                    fresh.rename(folder)
                except OSError:
                    if not folder.is_dir():
                        raise
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
                fsync_folder(folder.parent)
        self.teachers = load_teachers(self.layout)
        recorded = self.teachers[record.name]
        recorded.require_same(record, str(self.layout.root))
        return recorded

    def specs(self, part: str) -> dict[str, ArraySpec]:
        """The arrays of a part."""
        return SAMPLE_ARRAYS if part == SAMPLES else self.teachers[part].array_specs()

    def missing(self, part: str, withdraw: bool = True) -> list[Unit]:
        """Units of ``part`` that are not done, decided from the disk without touching an image.

        Args:
            part: samples or a teacher.
            withdraw: also take back records whose files are gone; False only looks.
        """
        commits = read_commits(self.layout, part)
        specs = self.specs(part)
        for place, commit in list(commits.items()):
            self._require_own(commit)
            if not sizes_agree(self.layout, self.manifest, commit, specs):
                console.warn(
                    f"{commit.unit}: committed, but its files are missing or short; to be computed again"
                )
                if withdraw:
                    self._withdraw(commit)
                del commits[place]
        done = done_mask(self.manifest, commits)
        return [Unit(part, int(block), int(group)) for block, group in np.argwhere(~done)]

    def is_done(self, unit: Unit) -> bool:
        """Whether a record of this unit exists now."""
        return read_commit(self.layout, unit) is not None

    def recorded_content(
        self, block: int
    ) -> tuple[str, Int64[np.ndarray, " r"] | None, Int64[np.ndarray, " r"] | None] | None:
        """Digest, sizes and crc32c of a block's images as an earlier unit saw them; None for a new block.

        Sizes and checksums are None while only a unit of other views was written so far.
        """
        for group in range(self.manifest.groups):
            commit = read_commit(self.layout, Unit(SAMPLES, block, group))
            if commit is None:
                continue
            if group > 0:
                return commit.content, None, None
            rows = len(self.manifest.rows_of(block))
            found = [
                map_chunk(
                    chunk_path(self.layout.array(SAMPLES, name), block, None, 0),
                    self.manifest.block_rows,
                    SAMPLE_ARRAYS[name],
                )[:rows].astype(np.int64)
                for name in ("content_size", "content_crc")
            ]
            return commit.content, found[0], found[1]
        return None

    def _require_own(self, commit: Commit) -> None:
        part_id = self.part_id(commit.part)
        found = [
            Difference(f"commit.{name}", old, new)
            for name, old, new in (
                ("cache_id", commit.cache_id, self.manifest.cache_id),
                ("teacher_id", commit.part_id, part_id),
                ("keys", commit.keys, self.key_digest(commit.block)),
            )
            if old != new
        ]
        if found:
            raise IdentityError(
                f"{self.layout.commit(commit.unit)} belongs to another cache",
                "Remove what was copied into this cache, or make it again.",
                found,
            )

    def _withdraw(self, commit: Commit) -> None:
        """Take back the record of a unit whose files are not what it says."""
        path = self.layout.commit(commit.unit)
        if path.exists():
            path.unlink()
            return
        # It was compacted: write the single records out again, without this one.
        remaining = [c for c in read_commits(self.layout, commit.part).values() if c.unit != commit.unit]
        for other in remaining:
            write_commit(self.layout, other)
        self.layout.compacted(commit.part).unlink(missing_ok=True)

    def part_id(self, part: str) -> str:
        """The id that records of this part carry."""
        return self.manifest.cache_id if part == SAMPLES else self.teachers[part].id

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
        """Write a whole unit: data, fsync, rename, then the commit record.

        Args:
            unit: what it is.
            arrays: [rows of the block, views of the group, ...] per view array, [rows of the block, ...] others.
            content: digest of the block's content records.
            absent: (row, reason) of dropped images; their values must be the fill value.
            made: how it was computed (batch size, device, versions).
            seconds: how long it took.

        Returns:
            False when somebody else has committed the unit meanwhile; nothing is lost then.
        """
        if not self.claims.owns(unit) and read_commit(self.layout, unit) is not None:
            return False
        records: dict[str, list[list[int]]] = {}
        specs = self.specs(unit.part)
        for name, values in arrays.items():
            records[name] = self._write_array(unit, name, specs[name], values)
        self._sync_folders(unit, list(arrays))
        commit = Commit(
            cache_id=self.manifest.cache_id,
            part=unit.part,
            part_id=self.part_id(unit.part),
            block=unit.block,
            group=unit.group,
            keys=self.key_digest(unit.block),
            content=content,
            arrays=records,
            absent=[[row, reason] for row, reason in absent],
            seconds=round(seconds, 3),
            made={"host": socket.gethostname(), **made},
        )
        if write_commit(self.layout, commit):
            return True
        self._settle_conflict(commit)
        return False

    def _write_array(self, unit: Unit, name: str, spec: ArraySpec, values: np.ndarray) -> list[list[int]]:
        folder = self.layout.array(unit.part, name)
        views: list[int | None] = [*self.manifest.views_of(unit.group)] if spec.per_view else [None]
        written = []
        for place, view in enumerate(views):
            chunk = np.full((self.manifest.block_rows, *spec.row_shape), spec.fill, spec.dtype)
            chunk[: len(values)] = values[:, place] if spec.per_view else values
            path = chunk_path(folder, unit.block, view, len(spec.row_shape))
            written.append(list(write_chunk(path, chunk, self.layout.tmp)))
        return written

    def _sync_folders(self, unit: Unit, names: list[str]) -> None:
        for folder in {self.layout.array(unit.part, name) for name in names}:
            with storage_errors(folder):
                fsync_folder(folder)

    def _settle_conflict(self, mine: Commit) -> None:
        """Somebody committed the same unit: make sure that the bytes on disk are the recorded ones.

        This writer renamed its files before it saw the other's record, so they may have replaced the
        other's. Equal bytes (the normal case) need nothing; else the record follows the disk.
        """
        theirs = read_commit(self.layout, mine.unit)
        if theirs is None or theirs.same_data(mine):
            return
        specs = self.specs(mine.part)
        on_disk = {
            name: [
                list(
                    read_crc(
                        chunk_path(
                            self.layout.array(mine.part, name), mine.block, view, len(specs[name].row_shape)
                        )
                    )[:2]
                )
                for view in ([*self.manifest.views_of(mine.group)] if specs[name].per_view else [None])
            ]
            for name in mine.arrays
        }
        if on_disk == theirs.arrays:
            return
        console.warn(f"{mine.unit}: two writers computed different bytes; it will be computed again")
        self._withdraw(theirs)

    def finish(self, part: str) -> None:
        """Compact the records of ``part`` once all are there."""
        compact(self.layout, self.manifest, part)


def content_digest(sizes: np.ndarray, crcs: np.ndarray) -> str:
    """Digest of the content records of a block's samples."""
    return block_digest(sizes.astype("<i8"), crcs.astype("<u4"))
