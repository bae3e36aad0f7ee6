"""Commit records: the only proof that a unit is done.

A unit is done if and only if its record exists and the sizes on disk agree with it. Records of a
finished part are compacted into one file of JSON lines.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Bool

from kdcli.cache.layout import Layout, Manifest, Unit
from kdcli.cache.provenance import REPAIR_HINT, ArraySpec
from kdcli.cache.zarr_backend import CRC_BYTES, chunk_path
from kdcli.errors import CorruptError
from kdcli.runtime import atomic_write_text, fsync_folder, storage_errors


@final
@dataclass(frozen=True, slots=True)
class Commit:
    """What was written for one unit.

    Attributes:
        part_id: id of the teacher, or of the cache for the samples: a record of another one is refused.
        keys: sha256 of the block's keys.
        content: sha256 of the block's content records (size and crc32c of each image).
        arrays: per array the [size, crc32c] of each of its chunks, in view order.
        absent: [row, reason] of dropped images.
    """

    cache_id: str
    part: str
    part_id: str
    block: int
    group: int
    keys: str
    content: str
    arrays: dict[str, list[list[int]]]
    absent: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        """The unit it is about."""
        return Unit(self.part, self.block, self.group)

    def same_data(self, other: "Commit") -> bool:
        """Whether both records describe the same bytes."""
        return (self.arrays, self.absent, self.content) == (other.arrays, other.absent, other.content)


def block_digest(*values: np.ndarray) -> str:
    """sha256 over the bytes of arrays."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def write_commit(layout: Layout, commit: Commit) -> bool:
    """Create the record; False, and nothing changed, when there is one already."""
    path = layout.commit(commit.unit)
    temporary = layout.tmp / f"commit-{os.getpid()}-{os.urandom(8).hex()}"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(commit), file)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)
    return True


def _parse(text: str, source: Path) -> Commit:
    try:
        return Commit(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{source} is no commit record: {error}", REPAIR_HINT) from error


def read_commit(layout: Layout, unit: Unit) -> Commit | None:
    """The record of one unit, if it is done."""
    path = layout.commit(unit)
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return next((commit for commit in _compacted(layout, unit.part) if commit.unit == unit), None)


def _compacted(layout: Layout, part: str) -> Iterator[Commit]:
    path = layout.compacted(part)
    if path.is_file():
        with storage_errors(path):
            lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            yield _parse(line, path)


def read_commits(layout: Layout, part: str) -> dict[tuple[int, int], Commit]:
    """All records of a part, by (block, group)."""
    found: dict[tuple[int, int], Commit] = {}
    folder = layout.commits / part
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            commit = _parse(path.read_text(encoding="utf-8"), path)
        except FileNotFoundError:
            continue  # compacted by another process since the listing
        found[commit.block, commit.group] = commit
    # Read last: what vanished from the folder is in here by now.
    return {(commit.block, commit.group): commit for commit in _compacted(layout, part)} | found


def compact(layout: Layout, manifest: Manifest, part: str) -> None:
    """Join the records of a finished part into one file, then remove the single ones."""
    found = read_commits(layout, part)
    folder = layout.commits / part
    if len(found) < manifest.blocks * manifest.groups or not any(folder.glob("*.json")):
        return
    lines = [json.dumps(asdict(found[place])) for place in sorted(found)]
    atomic_write_text(layout.compacted(part), "\n".join(lines) + "\n")
    with storage_errors(folder):
        for path in folder.glob("*.json"):  # the folder stays: others may be compacting, too
            path.unlink(missing_ok=True)


def chunk_files(
    layout: Layout, manifest: Manifest, commit: Commit, arrays: dict[str, ArraySpec]
) -> Iterator[tuple[str, int | None, Path, int, int]]:
    """Every chunk a commit vouches for: array, view, file, recorded size, recorded crc32c."""
    for name, records in commit.arrays.items():
        spec = arrays[name]
        views: list[int | None] = [*manifest.views_of(commit.group)] if spec.per_view else [None]
        for view, (size, crc) in zip(views, records, strict=True):
            path = chunk_path(layout.array(commit.part, name), commit.block, view, len(spec.row_shape))
            yield name, view, path, size, crc


def sizes_agree(layout: Layout, manifest: Manifest, commit: Commit, arrays: dict[str, ArraySpec]) -> bool:
    """Whether every committed chunk is there with its recorded size (no bytes are read)."""
    try:
        return all(
            path.stat().st_size == size == manifest.block_rows * arrays[name].row_bytes + CRC_BYTES
            for name, _, path, size, _ in chunk_files(layout, manifest, commit, arrays)
        )
    except FileNotFoundError:
        return False


def done_mask(
    manifest: Manifest, commits: dict[tuple[int, int], Commit]
) -> Bool[np.ndarray, "blocks groups"]:
    """Which (block, group) have a record."""
    done = np.zeros((manifest.blocks, manifest.groups), bool)
    for block, group in commits:
        if block < manifest.blocks and group < manifest.groups:
            done[block, group] = True
    return done
