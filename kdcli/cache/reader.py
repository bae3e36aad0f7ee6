"""Reading one cache: mapped chunks, gathered batch by batch, no Python per row."""

import itertools
import resource
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import ValidationError

from kdcli.cache.commits import Commit, block_digest, done_mask, read_commits, sizes_agree
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Layout, Manifest, load_manifest
from kdcli.cache.provenance import REPAIR_HINT, ArraySpec, TeacherRecord
from kdcli.cache.zarr_backend import CRC_BYTES, chunk_path, map_chunk
from kdcli.errors import CacheMissingError, CorruptError, IdentityError
from kdcli.runtime import read_json
from kdcli.types import Difference

VIEW_PARAMS = 7
SAMPLE_ARRAYS: dict[str, ArraySpec] = {
    "content_size": ArraySpec((), "<i8", per_view=False),
    "content_crc": ArraySpec((), "<u4", per_view=False),
    "params": ArraySpec((VIEW_PARAMS,), "<i4"),
}
"""What a task learns of the samples while it decodes them: size and crc32c of the bytes, view parameters."""


def load_teachers(layout: Layout) -> dict[str, TeacherRecord]:
    """The teachers of a cache, by name, from the attributes of their Zarr groups."""
    folder = layout.group / "teachers"
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (path / "zarr.json").is_file():
            continue
        document = read_json(path / "zarr.json")
        try:
            record = TeacherRecord.model_validate(document["attributes"]["kd"])
        except (KeyError, ValidationError) as error:
            raise CorruptError(f"{path / 'zarr.json'}: no valid teacher record", REPAIR_HINT) from error
        if record.name != path.name:
            difference = Difference("name", record.name, path.name)
            raise IdentityError(f"{path} was renamed", f"Rename it back to '{record.name}'.", [difference])
        found[record.name] = record
    return found


def _sample_array(layout: Layout, name: str, dtype: str) -> np.ndarray:
    """A whole sample array: one chunk, mapped."""
    path = chunk_path(layout.array(SAMPLES, name), 0, None, 0)
    itemsize = np.dtype(dtype).itemsize
    try:
        count = (path.stat().st_size - CRC_BYTES) // itemsize
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing", REPAIR_HINT) from error
    return map_chunk(path, count, ArraySpec((), dtype))


def load_keys(layout: Layout) -> KeyTable:
    """The keys of all rows."""
    return KeyTable(_sample_array(layout, "key_bytes", "|u1"), _sample_array(layout, "key_offsets", "<i8"))


def load_labels(layout: Layout, rows: int) -> Int64[np.ndarray, " n"]:
    """The labels of all rows, -1 = unlabelled."""
    if not layout.array(SAMPLES, "labels/class").is_dir():
        return np.full(rows, -1, np.int64)
    return _sample_array(layout, "labels/class", "<i8")


def max_maps() -> int:
    """Chunks to keep mapped: each holds a file descriptor, and the process needs some of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(512, soft // 3)) if soft != resource.RLIM_INFINITY else 512


@final
class CacheReader:
    """One open cache. Cheap to pickle: workers map chunks themselves, when they first need them."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.manifest: Manifest = load_manifest(root)
        self.keys = load_keys(self.layout)
        self.labels = load_labels(self.layout, self.manifest.rows)
        self.teachers: Mapping[str, TeacherRecord] = load_teachers(self.layout)
        self._maps: OrderedDict[tuple[str, str, int, int], np.ndarray] = OrderedDict()
        self._max_maps = max_maps()
        self._commits: dict[str, dict[tuple[int, int], Commit]] = {}
        self._require_keys()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    def _require_keys(self) -> None:
        if len(self.keys) != self.manifest.rows or self.keys.digest() != self.manifest.data.keys:
            raise CorruptError(
                f"{self.layout.root}: its keys are not those of its manifest",
                REPAIR_HINT,
            )
        recorded = self.manifest.data.labels
        if recorded is not None and block_digest(self.labels) != recorded:
            raise CorruptError(
                f"{self.layout.root}: its labels are not those of its manifest",
                REPAIR_HINT,
            )

    def specs(self, part: str) -> dict[str, ArraySpec]:
        """The arrays of a part."""
        return SAMPLE_ARRAYS if part == SAMPLES else self.teachers[part].array_specs()

    def commits(self, part: str) -> dict[tuple[int, int], Commit]:
        """The records of a part, each checked to be this cache's and this teacher's."""
        if part not in self._commits:
            found = read_commits(self.layout, part)
            expected = self.manifest.cache_id if part == SAMPLES else self.teachers[part].id
            for commit in found.values():
                wrong = [
                    Difference(name, old, new)
                    for name, old, new in (
                        ("cache_id", commit.cache_id, self.manifest.cache_id),
                        ("teacher_id", commit.part_id, expected),
                    )
                    if old != new
                ]
                if wrong:
                    raise IdentityError(
                        f"{self.layout.root}: the record of {commit.unit} belongs elsewhere",
                        "Make this part again: kd cache-teachers",
                        wrong,
                    )
            self._commits[part] = {
                place: commit
                for place, commit in found.items()
                if sizes_agree(self.layout, self.manifest, commit, self.specs(part))
            }
        return self._commits[part]

    def present(self, part: str, rows: Int64[np.ndarray, " m"], views: list[int]) -> Bool[np.ndarray, " m"]:
        """Which rows are written for all of ``views``."""
        done = done_mask(self.manifest, self.commits(part))
        groups = sorted({view // self.manifest.view_group for view in views})
        answer: Bool[np.ndarray, " m"] = done[rows // self.manifest.block_rows][:, groups].all(axis=1)
        return answer

    def absent(self, part: str) -> dict[int, str]:
        """Rows recorded as dropped, with the reason."""
        return {
            int(row): str(reason) for commit in self.commits(part).values() for row, reason in commit.absent
        }

    def gather(
        self, part: str, array: str, rows: Int64[np.ndarray, " b"], view: int | Int64[np.ndarray, " b"] = 0
    ) -> np.ndarray:
        """Copy rows out of an array, grouped by chunk.

        Args:
            part: teacher name, or "samples".
            array: array name.
            rows: rows of this cache.
            view: one view for all rows, or one per row; ignored by arrays without views.

        Returns:
            [b, ...] values in the order of ``rows``.

        Raises:
            CacheMissingError: a row asked for is not written.
        """
        spec = self._spec(part, array)
        size = self.manifest.block_rows
        blocks, places = np.divmod(rows, size)
        views = np.broadcast_to(np.asarray(view if spec.per_view else 0), rows.shape)
        chunks = blocks * self.manifest.views + views
        out = np.empty((len(rows), *spec.row_shape), spec.dtype)
        order = np.argsort(chunks, kind="stable")
        sorted_chunks = chunks[order]
        edges = [*np.flatnonzero(np.diff(sorted_chunks, prepend=-1)), len(rows)]
        for start, stop in itertools.pairwise(edges):
            members = order[start:stop]
            block, chunk_view = divmod(int(sorted_chunks[start]), self.manifest.views)
            out[members] = self._chunk(part, array, spec, block, chunk_view)[places[members]]
        return out

    def _spec(self, part: str, array: str) -> ArraySpec:
        specs = self.specs(part)
        if array not in specs:
            raise CacheMissingError(
                f"{self.layout.root}: teacher '{part}' keeps {', '.join(specs)}, not {array}",
                f"Cache it under another name with --keep {array}.",
            )
        return specs[array]

    def _chunk(self, part: str, array: str, spec: ArraySpec, block: int, view: int) -> np.ndarray:
        place = (part, array, block, view)
        found = self._maps.get(place)
        if found is not None:
            self._maps.move_to_end(place)
            return found
        if (block, view // self.manifest.view_group) not in self.commits(part):
            rows = self.manifest.rows_of(block)
            raise CacheMissingError(
                f"{self.layout.root}: rows {rows.start}-{rows.stop - 1} of '{part}' view {view} are not written",
                "Run the kd cache-teachers command that made the cache again; it fills what is missing.",
            )
        path = chunk_path(
            self.layout.array(part, array), block, view if spec.per_view else None, len(spec.row_shape)
        )
        mapped = map_chunk(path, self.manifest.block_rows, spec)
        self._maps[place] = mapped
        if len(self._maps) > self._max_maps:
            self._maps.popitem(last=False)
        return mapped
