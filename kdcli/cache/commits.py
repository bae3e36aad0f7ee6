"""Commit records: the only proof that a unit is done.

A unit is done if and only if its record exists and the sizes on disk agree with it. Records of a
finished part are compacted into one file of JSON lines.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, final

import numpy as np
from annotated_types import Interval, Len
from jaxtyping import Bool
from pydantic import AfterValidator

from kdcli.cache.arrays import ArrayExtent
from kdcli.cache.layout import ROWS, SAMPLES, UNITS, Layout, Unit
from kdcli.cache.owned import RECORDS_BYTES, read_own, regular_size, repair_hint
from kdcli.cache.provenance import Text, seal, unseal
from kdcli.cache.store import Store
from kdcli.documents import from_document
from kdcli.errors import Advice, CorruptError
from kdcli.files import atomic_write_text, create_json, fsync_folder, make_folder, storage_errors
from kdcli.reading import parse_json
from kdcli.types import Difference, differences


def _made(document: dict[str, Any]) -> dict[str, Any]:
    losses = document.get("kl", {})
    if not isinstance(losses, dict) or not all(map(_is_loss, losses.values())):
        raise ValueError("kl: no numbers by temperature")
    return document


def _is_loss(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST  # type: ignore[arg-type]


_MOST = 1e12
"""Most seconds that a unit may have taken (thirty thousand years), and most nats that its rounding may cost."""


_STREAMS: Final = 8
"""Records that are read at a time."""
_AHEAD: Final = 1024
"""Records that are read before they are looked at."""


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
    block: Annotated[int, Interval(ge=0, lt=UNITS)]
    group: Annotated[int, Interval(ge=0, lt=UNITS)]
    keys: Text
    content: Text
    arrays: dict[str, list[Annotated[list[Annotated[int, Interval(ge=0, lt=2**63)]], Len(2, 2)]]]
    absent: list[tuple[Annotated[int, Interval(ge=0, lt=ROWS)], Text]] = field(default_factory=list)
    seconds: Annotated[float, Interval(ge=0, le=_MOST)] = 0.0
    made: Annotated[dict[str, Any], AfterValidator(_made)] = field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        """The unit it is about."""
        return Unit(self.part, self.block, self.group)

    def same_data(self, other: "Commit") -> bool:
        """Whether both records describe the same bytes."""
        return (self.arrays, self.absent, self.content) == (other.arrays, other.absent, other.content)


def write_commit(layout: Layout, commit: Commit) -> bool:
    """Create the record; False, and nothing changed, when there is one already."""
    path = layout.commit(commit.unit)
    with storage_errors(path):
        make_folder(path.parent)
    return create_json(path, seal(asdict(commit)), layout.tmp)


def parse_commit(line: bytes, source: object, hint: str | Advice = "") -> Commit:
    """The record in a line of JSON; ``hint`` is what to do about a damage, by default to repair the cache.

    Raises:
        CorruptError: it is none, or was changed after it was written.
    """
    hint = hint or repair_hint(source)
    document = parse_json(line, source, CorruptError, hint)
    return from_document(Commit, unseal(document, source, hint), source, CorruptError, hint)


def read_commit(layout: Layout, unit: Unit) -> Commit | None:
    """The record of one unit, if it is done."""
    path = layout.commit(unit)
    try:
        commit = parse_commit(read_own(path), path)
    except FileNotFoundError:
        return next((commit for commit in _compacted(layout, unit.part) if commit.unit == unit), None)
    _require_place(commit, unit, path)
    return commit


def _require_place(commit: Commit, unit: Unit, path: Path) -> None:
    if commit.unit != unit:
        raise CorruptError(f"{path} is the record of {commit.unit}", repair_hint(path))


def _compacted(layout: Layout, part: str) -> Iterator[Commit]:
    path = layout.compacted(part)
    if os.path.lexists(path):
        hint = repair_hint(layout.root)
        for line in read_own(path, RECORDS_BYTES).splitlines():
            commit = parse_commit(line, path, hint)
            if commit.part != part:
                raise CorruptError(f"{path} holds the record of {commit.unit}", repair_hint(path))
            yield commit


def read_commits(layout: Layout, part: str) -> dict[tuple[int, int], Commit]:
    """All records of a part, by (block, group)."""
    found = {(commit.block, commit.group): commit for commit in read_singles(layout, part)}
    # Read last: what vanished from the folder is in here by now.
    return {(commit.block, commit.group): commit for commit in _compacted(layout, part)} | found


def read_singles(layout: Layout, part: str) -> Iterator[Commit]:
    """The records of a part that are files of their own, in order; those joined since the listing are left out.

    Several are read at a time: a network disk answers each a while after it was asked.
    """
    names, hint = sorted(single_names(layout, part)), repair_hint(layout.root)
    with ThreadPoolExecutor(_STREAMS, "kd-records") as pool:
        ask = pool.map if len(names) > _STREAMS else map
        for first in range(0, len(names), _AHEAD):
            paths = [layout.commits / part / f"{name}.json" for name in names[first : first + _AHEAD]]
            for path, data in zip(paths, ask(_read_if_there, paths), strict=True):
                if data is None:
                    continue
                commit = parse_commit(data, path, hint)
                if (commit.part, commit.unit.stem) != (part, path.stem):
                    raise CorruptError(f"{path} is the record of {commit.unit}", hint)
                yield commit


def single_names(layout: Layout, part: str) -> set[str]:
    """Stems of the units of a part whose records are files of their own, by one listing."""
    folder = layout.commits / part
    with storage_errors(folder):
        if not folder.is_dir():
            return set()
        with os.scandir(folder) as entries:
            return {entry.name[:-5] for entry in entries if entry.name.endswith(".json")}


def _read_if_there(path: Path) -> bytes | None:
    try:
        return read_own(path)
    except FileNotFoundError:
        return None


def as_lines(commits: Iterable[Commit]) -> str:
    """Records of a part as in its compacted file: in order, one sealed JSON document a line."""
    ordered = sorted(commits, key=lambda commit: (commit.block, commit.group))
    return "".join(f"{json.dumps(seal(asdict(commit)))}\n" for commit in ordered)


def is_compactable(store: Store, part: str) -> bool:
    """Whether every unit of a part is done, and some of their records are still files of their own."""
    if not single_names(store.layout, part):
        return False
    return set(store.units_of(part)) <= read_commits(store.layout, part).keys()


def compact(store: Store, part: str) -> None:
    """Join the records of a part into one file, then remove the single ones.

    Only for who has the records alone (:meth:`~kdcli.cache.claims.Claims.alone`): a record that is taken
    back while others are joined would be back again.
    """
    layout = store.layout
    folder = layout.commits / part
    single = [folder / f"{name}.json" for name in single_names(layout, part)]
    # Whatever is listed is in what is read after it; a kill before the last removal leaves both, alike.
    atomic_write_text(layout.compacted(part), as_lines(read_commits(layout, part).values()))
    with storage_errors(folder):
        for path in single:  # the folder stays: others may be about to write into it
            path.unlink(missing_ok=True)


def drop_record(layout: Layout, commit: Commit) -> None:
    """Take back this very record, wherever it is kept; one of later work on the same unit stays.

    Only for who has the records alone. What is left are single records, joined ones, or both, never less.
    """
    path, joined = layout.commit(commit.unit), layout.compacted(commit.part)
    before = list(_compacted(layout, commit.part))
    if commit in before:
        atomic_write_text(joined, as_lines(other for other in before if other != commit))
    with storage_errors(path), suppress(FileNotFoundError):
        if parse_commit(read_own(path), path) == commit:
            path.unlink()
            fsync_folder(path.parent)


def chunk_files(store: Store, commit: Commit) -> Iterator[tuple[str, int | None, Path, int, int]]:
    """Every chunk a commit vouches for: array, view, file, recorded size, recorded crc32c."""
    specs = store.specs(commit.part)
    views = store.manifest.views_of(commit.group, store.views(commit.part))
    for name, records in commit.arrays.items():
        spec = specs[name]
        places: list[int | None] = [*views] if spec.per_view else [None]
        for view, (size, crc) in zip(places, records, strict=True):
            yield name, view, store.chunk(commit.part, name, spec, commit.block, view), size, crc


def _strange_rows(store: Store, commit: Commit) -> tuple[list[int], list[int]]:
    """Rows that a record calls absent, and those of them that are of its block."""
    rows = store.manifest.rows_of(commit.block) if commit.block < store.manifest.blocks else range(0)
    absent = [row for row, _ in commit.absent]
    return absent, [row for row in absent if row in rows]


def strange_ids(store: Store, commit: Commit, keys: str | None = None) -> list[Difference]:
    """In what a record names another cache, teacher or block than it should.

    Args:
        store: the cache.
        commit: a record in it.
        keys: digest of the block's keys; None: it is not to be compared.
    """
    pairs = (
        ("cache_id", commit.cache_id, store.manifest.cache_id),
        ("part_id" if commit.part == SAMPLES else "teacher_id", commit.part_id, store.part_id(commit.part)),
        ("keys", commit.keys, commit.keys if keys is None else keys),
        ("absent", *_strange_rows(store, commit)),
    )
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def misfits(store: Store, commit: Commit, keys: str | None = None) -> list[Difference]:
    """:func:`strange_ids`, and whether the record is of the chunks that its unit has."""
    views = len(store.manifest.views_of(commit.group, store.views(commit.part)))
    specs = store.arrays_in(commit.part, commit.group)
    chunks = {name: views if spec.per_view else 1 for name, spec in specs.items()}
    recorded = {name: len(records) for name, records in commit.arrays.items()}
    return strange_ids(store, commit, keys) + differences({"chunks": recorded}, {"chunks": chunks})


def sizes_agree(store: Store, commit: Commit) -> bool:
    """Whether every committed chunk is there with its recorded size (no bytes are read).

    Of a cache that is elsewhere: whether it is to be there. Whoever reads it finds out.
    """
    specs = store.specs(commit.part)
    if commit.arrays.keys() != store.arrays_in(commit.part, commit.group).keys():
        return False
    rows = store.manifest.block_rows
    try:
        return all(
            (size if store.origin else regular_size(path))
            == size
            == store.backend.file_size(rows, specs[name])
            for name, _, path, size, _ in chunk_files(store, commit)
        )
    except (FileNotFoundError, ValueError):  # ValueError: another number of views than the unit has
        return False


def committed_chunks(store: Store, extent: ArrayExtent) -> Iterator[tuple[int, int | None]]:
    """(block, view) of every committed chunk of an array that is there; of keys and labels, the one there is."""
    if extent.whole:
        yield 0, None
        return
    for (block, group), commit in sorted(read_commits(store.layout, extent.part).items()):
        if not store.manifest.holds(block, group) or not sizes_agree(store, commit):
            continue
        for array, view, _, _, _ in chunk_files(store, commit):
            if array == extent.name:
                yield block, view


def done_mask(store: Store, commits: dict[tuple[int, int], Commit]) -> Bool[np.ndarray, "blocks groups"]:
    """Which (block, group) have a record."""
    manifest = store.manifest
    done = np.zeros((manifest.blocks, manifest.groups), bool)
    for block, group in commits:
        if block < manifest.blocks and group < manifest.groups:
            done[block, group] = True
    return done
