"""Commit records: the only proof that a unit is done.

A unit is done if and only if its record exists and the sizes on disk agree with it. Records of a
finished part are compacted into one file of JSON lines.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from jaxtyping import Bool

from kdcli.cache.layout import Layout, Unit
from kdcli.cache.provenance import REPAIR_HINT, seal, unseal
from kdcli.errors import CorruptError
from kdcli.runtime import atomic_write_text, create_json, storage_errors

if TYPE_CHECKING:
    from kdcli.cache.arrays import ArrayExtent
    from kdcli.cache.store import Store


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
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return create_json(path, seal(asdict(commit)), layout.tmp)


def _parse(text: str, source: Path) -> Commit:
    try:
        return Commit(**unseal(json.loads(text), source))
    except (ValueError, TypeError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{source} is no commit record: {error}", REPAIR_HINT) from error


def read_commit(layout: Layout, unit: Unit) -> Commit | None:
    """The record of one unit, if it is done."""
    path = layout.commit(unit)
    try:
        commit = _parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return next((commit for commit in _compacted(layout, unit.part) if commit.unit == unit), None)
    _require_place(commit, unit, path)
    return commit


def _require_place(commit: Commit, unit: Unit, path: Path) -> None:
    if commit.unit != unit:
        raise CorruptError(f"{path} is the record of {commit.unit}", REPAIR_HINT)


def _compacted(layout: Layout, part: str) -> Iterator[Commit]:
    path = layout.compacted(part)
    if path.is_file():
        with storage_errors(path):
            lines = path.read_bytes().splitlines()
        for line in lines:
            yield _parse(line.decode(errors="replace"), path)


def read_commits(layout: Layout, part: str) -> dict[tuple[int, int], Commit]:
    """All records of a part, by (block, group)."""
    found: dict[tuple[int, int], Commit] = {}
    folder = layout.commits / part
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            commit = _parse(path.read_bytes().decode(errors="replace"), path)
        except FileNotFoundError:
            continue  # compacted by another process since the listing
        if (commit.part, commit.unit.stem) != (part, path.stem):
            raise CorruptError(f"{path} is the record of {commit.unit}", REPAIR_HINT)
        found[commit.block, commit.group] = commit
    # Read last: what vanished from the folder is in here by now.
    return {(commit.block, commit.group): commit for commit in _compacted(layout, part)} | found


def compact(store: "Store", part: str) -> bool:
    """Join the records of a finished part into one file, then remove the single ones.

    Returns:
        Whether there was anything to do: every unit of the part is there, and was not compacted yet.
    """
    layout = store.layout
    folder = layout.commits / part
    single = list(folder.glob("*.json")) if folder.is_dir() else []
    if not single:
        return False
    found = read_commits(layout, part)
    if not set(store.units_of(part)) <= found.keys():
        return False
    lines = [json.dumps(seal(asdict(found[place]))) for place in sorted(found)]
    atomic_write_text(layout.compacted(part), "\n".join(lines) + "\n")
    with storage_errors(folder):
        for path in single:  # the folder stays: others may be compacting, too
            path.unlink(missing_ok=True)
    return True


def chunk_files(store: "Store", commit: Commit) -> Iterator[tuple[str, int | None, Path, int, int]]:
    """Every chunk a commit vouches for: array, view, file, recorded size, recorded crc32c."""
    specs = store.specs(commit.part)
    views = store.manifest.views_of(commit.group, store.views(commit.part))
    for name, records in commit.arrays.items():
        spec = specs[name]
        places: list[int | None] = [*views] if spec.per_view else [None]
        for view, (size, crc) in zip(places, records, strict=True):
            yield name, view, store.chunk(commit.part, name, spec, commit.block, view), size, crc


def sizes_agree(store: "Store", commit: Commit) -> bool:
    """Whether every committed chunk is there with its recorded size (no bytes are read)."""
    specs = store.specs(commit.part)
    if commit.arrays.keys() != store.arrays_in(commit.part, commit.group).keys():
        return False
    rows = store.manifest.block_rows
    try:
        return all(
            path.stat().st_size == size == store.backend.file_size(rows, specs[name])
            for name, _, path, size, _ in chunk_files(store, commit)
        )
    except (FileNotFoundError, ValueError):  # ValueError: another number of views than the unit has
        return False


def committed_chunks(store: "Store", extent: "ArrayExtent") -> Iterator[tuple[int, int | None]]:
    """(block, view) of every committed chunk of an array; of keys and labels, the one there is."""
    if extent.whole:
        yield 0, None
        return
    for (block, _), commit in sorted(read_commits(store.layout, extent.part).items()):
        for array, view, _, _, _ in chunk_files(store, commit):
            if array == extent.name:
                yield block, view


def done_mask(store: "Store", commits: dict[tuple[int, int], Commit]) -> Bool[np.ndarray, "blocks groups"]:
    """Which (block, group) have a record."""
    manifest = store.manifest
    done = np.zeros((manifest.blocks, manifest.groups), bool)
    for block, group in commits:
        if block < manifest.blocks and group < manifest.groups:
            done[block, group] = True
    return done


def missing_units(store: "Store", part: str, commits: dict[tuple[int, int], Commit]) -> list[Unit]:
    """The units of a part that have no record, in order."""
    return [
        Unit(part, block, group) for block, group in store.units_of(part) if (block, group) not in commits
    ]
