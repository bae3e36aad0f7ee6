"""In what two caches differ: samples, views, teachers, and every value that both hold.

Equal means that they hold the same values of the same samples. How they are stored (backend, block rows,
groups of views, where the images were) is told, too, but makes no difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.admin.inventory import open_store
from kdcli.cache.commits import chunk_files
from kdcli.cache.layout import SAMPLES, Manifest
from kdcli.cache.reader import CacheReader
from kdcli.documents import to_document
from kdcli.results import Result
from kdcli.types import Difference, differences

FIRST = 5
"""So many keys are named where there may be a million."""
_ROWS = 1024


@final
@dataclass(frozen=True, slots=True)
class SomeKeys:
    """A number of keys, and the first few."""

    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count}: {', '.join(self.first)}{more}" if self.count else "0"


@final
@dataclass(frozen=True, slots=True)
class SamplesDiff:
    """Keys that only one cache has; common ones with another label or another image; class names."""

    common: int
    only_a: SomeKeys
    only_b: SomeKeys
    labels: SomeKeys
    images: SomeKeys
    class_names_differ: bool

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        counts = (self.only_a, self.only_b, self.labels, self.images)
        return not any(some.count for some in counts) and not self.class_names_differ


@final
@dataclass(frozen=True, slots=True)
class PartDiff:
    """One kind of output of a teacher that both caches hold.

    Attributes:
        only_a: common samples that are written, and not dropped, in A alone.
        compared: common samples that both hold, in the views that both hold.
        differing: how many of them differ in some value, by array.
        largest: the largest absolute difference, by array; None for class ids and where values are not finite.
    """

    part: str
    only_a: int
    only_b: int
    compared: int
    differing: dict[str, int]
    largest: dict[str, float | None]

    @property
    def equal(self) -> bool:
        """Whether both hold the same values of the same samples."""
        return not (self.only_a or self.only_b or any(self.differing.values()))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        arrays = {
            name: {"differing": count, "max_abs_difference": self.largest[name]}
            for name, count in self.differing.items()
        }
        return {**to_document(self, "only_a", "only_b", "compared"), "arrays": arrays}


@final
@dataclass(frozen=True, slots=True)
class TeacherDiff:
    """A teacher of this name in both caches.

    Attributes:
        identity: fields that make it another teacher; its values are compared only where there are none.
        kinds_a: kinds that only A keeps.
        kept: kinds that both keep, but not alike.
        parts: kinds that both keep.
    """

    name: str
    identity: tuple[Difference, ...]
    kinds_a: tuple[str, ...]
    kinds_b: tuple[str, ...]
    kept: tuple[Difference, ...]
    parts: tuple[PartDiff, ...]

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not (self.identity or self.kinds_a or self.kinds_b or self.kept) and all(
            part.equal for part in self.parts
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "equal": self.equal,
            "identity": _as_json(self.identity),
            "only_a": list(self.kinds_a),
            "only_b": list(self.kinds_b),
            "kept": _as_json(self.kept),
            "kinds": {part.part.partition("/")[2]: part.document() for part in self.parts},
        }


@final
@dataclass(frozen=True, slots=True)
class CacheDiff(Result):
    """Everything in which two caches differ; ``storage`` does not count."""

    a: Path
    b: Path
    samples: SamplesDiff
    views: tuple[Difference, ...]
    storage: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    teachers: tuple[TeacherDiff, ...]

    @property
    def equal(self) -> bool:
        """Whether they hold the same."""
        return (
            self.samples.equal
            and not (self.views or self.only_a or self.only_b)
            and all(teacher.equal for teacher in self.teachers)
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **to_document(self, "a", "b", "equal", "samples"),
            "views": _as_json(self.views),
            "storage": _as_json(self.storage),
            "teachers": {
                **to_document(self, "only_a", "only_b"),
                "both": {teacher.name: teacher.document() for teacher in self.teachers},
            },
        }


def _as_json(found: tuple[Difference, ...]) -> list[dict[str, Any]]:
    return [{"field": each.field, "a": each.old, "b": each.new} for each in found]


def compare_caches(a: Path, b: Path) -> CacheDiff:
    """What differs between two caches. Reads values only where recorded checksums do not settle it.

    Raises:
        KdError: one of them is not there, is no cache, or is damaged.
    """
    for root in (a, b):
        open_store(root)  # a mistyped name gets its suggestion
    pair = _Pair(CacheReader(a), CacheReader(b))
    left, right = pair.a.teachers, pair.b.teachers
    return CacheDiff(
        a,
        b,
        samples=_samples(pair),
        views=tuple(differences(_views(pair.a.manifest), _views(pair.b.manifest))),
        storage=tuple(differences(_storage(pair.a.manifest), _storage(pair.b.manifest))),
        only_a=tuple(name for name in left if name not in right),
        only_b=tuple(name for name in right if name not in left),
        teachers=tuple(_teacher(pair, name) for name in left if name in right),
    )


def _views(manifest: Manifest) -> dict[str, Any]:
    return {"views": manifest.views, **manifest.view_set}


def _storage(manifest: Manifest) -> dict[str, Any]:
    return {
        "cache_id": manifest.cache_id,
        "backend": manifest.backend,
        "block_rows": manifest.block_rows,
        "view_groups": list(manifest.view_groups),
        "segments": [segment.rows for segment in manifest.segments],
        "locations": list(manifest.locations),
    }


@final
class _Pair:
    """Two open caches, and the rows of the samples that both have."""

    def __init__(self, a: CacheReader, b: CacheReader) -> None:
        self.a, self.b = a, b
        rows = a.manifest.sample_rows()
        same = a.manifest.data.keys == b.manifest.data.keys
        found = rows if same else b.keys.find(a.keys.select(rows))
        self.rows_a, self.rows_b = rows[found >= 0], found[found >= 0]
        self.only_a = rows[found < 0]
        rows = b.manifest.sample_rows()
        self.only_b = np.setdiff1d(rows, self.rows_b)

    @cached_property
    def cut_alike(self) -> bool:
        """Whether the same bytes would lie in the same chunks: recorded checksums can be compared."""
        left, right = self.a.manifest, self.b.manifest
        return (
            left.data.keys == right.data.keys
            and (left.backend, left.block_rows, left.views) == (right.backend, right.block_rows, right.views)
            and [s.rows for s in left.segments] == [s.rows for s in right.segments]
        )

    def some_keys(self, rows: Int64[np.ndarray, " m"], of: CacheReader | None = None) -> SomeKeys:
        """Keys of rows of A, or of another reader."""
        keys = (of or self.a).keys
        return SomeKeys(len(rows), tuple(keys[row] for row in rows[:FIRST]))


def _samples(pair: _Pair) -> SamplesDiff:
    a, b, rows_a, rows_b = pair.a, pair.b, pair.rows_a, pair.rows_b
    both = _held(a, SAMPLES, rows_a, [0]) & _held(b, SAMPLES, rows_b, [0])
    changed = np.zeros(len(rows_a), bool)
    for name in ("content_size", "content_crc"):
        old, new = (r.gather(SAMPLES, name, rows[both]) for r, rows in ((a, rows_a), (b, rows_b)))
        changed[both] |= old != new
    return SamplesDiff(
        common=len(rows_a),
        only_a=pair.some_keys(pair.only_a),
        only_b=pair.some_keys(pair.only_b, b),
        labels=pair.some_keys(rows_a[_class_of(a, rows_a) != _class_of(b, rows_b)]),
        images=pair.some_keys(rows_a[changed]),
        class_names_differ=a.manifest.data.class_names != b.manifest.data.class_names,
    )


def _class_of(reader: CacheReader, rows: Int64[np.ndarray, " m"]) -> np.ndarray:
    """The class of each row: by name where there are names, so that numbering them otherwise is no difference."""
    labels: np.ndarray = reader.labels[rows]
    names = reader.manifest.data.class_names
    if names is not None:
        labels = np.asarray([*names, ""], object)[labels]  # -1, unlabelled, is the last one
    return labels


def _held(
    reader: CacheReader, part: str, rows: Int64[np.ndarray, " m"], views: list[int]
) -> Bool[np.ndarray, " m"]:
    """Rows that are written in all these views, and not dropped."""
    absent = np.fromiter(reader.absent(part), np.int64)
    return reader.present(part, rows, views) & ~np.isin(rows, absent)


def _teacher(pair: _Pair, name: str) -> TeacherDiff:
    left, right = pair.a.teachers[name], pair.b.teachers[name]
    kinds = [kind for kind in left.outputs if kind in right.outputs]
    identity = tuple(differences(left.gate(), right.gate()))
    kept: list[Difference] = []
    for kind in kinds:
        documents = [record.outputs[kind].model_dump(mode="json") for record in (left, right)]
        kept += differences({kind: documents[0]}, {kind: documents[1]})
    alike = [kind for kind in kinds if left.outputs[kind].arrays == right.outputs[kind].arrays]
    return TeacherDiff(
        name,
        identity,
        kinds_a=tuple(kind for kind in left.outputs if kind not in kinds),
        kinds_b=tuple(kind for kind in right.outputs if kind not in kinds),
        kept=tuple(kept),
        parts=() if identity else tuple(_part(pair, f"{name}/{kind}") for kind in alike),
    )


def _part(pair: _Pair, part: str) -> PartDiff:
    count = min(pair.a.store.views(part), pair.b.store.views(part))
    held_a = _held(pair.a, part, pair.rows_a, list(range(count)))
    held_b = _held(pair.b, part, pair.rows_b, list(range(count)))
    both = held_a & held_b
    differing, largest = {}, {}
    for array in pair.a.specs(part):
        settled = _settled(pair, part, array)
        differing[array], largest[array] = _values(pair, part, array, both & ~settled, count)
    return PartDiff(
        part,
        int((held_a & ~held_b).sum()),
        int((held_b & ~held_a).sum()),
        int(both.sum()),
        differing,
        largest,
    )


def _settled(pair: _Pair, part: str, array: str) -> Bool[np.ndarray, " m"]:
    """Common samples in blocks whose recorded checksums are the same in all views: nothing needs to be read."""
    if not pair.cut_alike:
        return np.zeros(len(pair.rows_a), bool)
    records = [_checksums(reader, part, array) for reader in (pair.a, pair.b)]
    other = {block for block, _ in {*records[0].items()} ^ {*records[1].items()}}
    blocks = pair.rows_a // pair.a.manifest.block_rows
    return ~np.isin(blocks, [block for block, _ in other])


def _checksums(reader: CacheReader, part: str, array: str) -> dict[tuple[int, int | None], int]:
    """Recorded crc32c of every chunk of an array, by block and view."""
    return {
        (block, view): crc
        for (block, _), commit in reader.commits(part).items()
        for name, view, _, _, crc in chunk_files(reader.store, commit)
        if name == array
    }


def _values(
    pair: _Pair, part: str, array: str, chosen: Bool[np.ndarray, " m"], views: int
) -> tuple[int, float | None]:
    """How many of the chosen samples differ in some view, and by how much at most."""
    teacher = part.partition("/")[0]
    is_float = np.dtype(pair.a.specs(part)[array].dtype).kind == "f"
    differing, largest = 0, 0.0
    for places in _batches(np.flatnonzero(chosen)):
        unequal = np.zeros(len(places), bool)
        for view in range(views):
            old = pair.a.gather(teacher, array, pair.rows_a[places], view)
            new = pair.b.gather(teacher, array, pair.rows_b[places], view)
            rows = (old != new) & ~((old != old) & (new != new))  # NaN is equal to NaN here
            unequal |= rows.reshape(len(places), -1).any(axis=1)
            if is_float and rows.any():
                gap = np.abs(old[rows].astype(np.float64) - new[rows]).max()
                largest = float(np.maximum(largest, gap))  # NaN stays NaN
        differing += int(unequal.sum())
    return differing, largest if is_float and np.isfinite(largest) else None


def _batches(places: Int64[np.ndarray, " m"]) -> Iterator[Int64[np.ndarray, " b"]]:
    return (places[start : start + _ROWS] for start in range(0, len(places), _ROWS))
