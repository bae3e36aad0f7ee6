"""Reading one cache: mapped chunks, gathered batch by batch, no Python per row."""

import itertools
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.commits import Commit, done_mask, read_commits, sizes_agree
from kdcli.cache.layout import SAMPLES, Layout, Manifest, load_manifest
from kdcli.cache.provenance import ArraySpec, TeacherRecord
from kdcli.cache.store import Store
from kdcli.errors import CacheMissingError, IdentityError
from kdcli.types import Difference


def max_maps() -> int:
    """Chunks to keep mapped: each holds a file descriptor, and the process needs some of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(512, soft // 3)) if soft != resource.RLIM_INFINITY else 512


@final
class CacheReader:
    """One open cache. Cheap to pickle: workers map chunks themselves, when they first need them."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root, load_manifest(root))
        self.keys = self.store.load_keys()
        self.labels = self.store.load_labels()
        self._maps: OrderedDict[tuple[str, str, int, int], np.ndarray] = OrderedDict()
        self._max_maps = max_maps()
        self._commits: dict[str, dict[tuple[int, int], Commit]] = {}

    @property
    def layout(self) -> Layout:
        """Paths of the cache."""
        return self.store.layout

    @property
    def manifest(self) -> Manifest:
        """What the cache is."""
        return self.store.manifest

    @property
    def teachers(self) -> dict[str, TeacherRecord]:
        """Recorded teachers by name."""
        return self.store.teachers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    def specs(self, part: str) -> dict[str, ArraySpec]:
        """The arrays of a part."""
        return self.store.specs(part)

    def part_of(self, teacher: str, array: str) -> str:
        """The part that an array belongs to.

        Raises:
            CacheMissingError: the cache does not keep it.
        """
        if teacher == SAMPLES:
            return SAMPLES
        record = self.teachers[teacher]
        output = record.output_of(array)
        if output is None:
            raise CacheMissingError(
                f"{self.layout.root}: of teacher '{teacher}' the cache keeps {', '.join(record.keep)}, not {array}",
                f"Run the kd cache-teachers command that made the cache again with --keep {array}.",
            )
        return f"{teacher}/{output.name}"

    def commits(self, part: str) -> dict[tuple[int, int], Commit]:
        """The records of a part, each checked to be this cache's and this teacher's."""
        if part not in self._commits:
            found = read_commits(self.layout, part)
            expected = self.store.part_id(part)
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
                place: commit for place, commit in found.items() if sizes_agree(self.store, commit)
            }
        return self._commits[part]

    def present(self, part: str, rows: Int64[np.ndarray, " m"], views: list[int]) -> Bool[np.ndarray, " m"]:
        """Which rows are written for all of ``views``."""
        if any(view >= self.store.views(part) for view in views):
            return np.zeros(len(rows), bool)
        done = done_mask(self.store, self.commits(part))
        groups = sorted({self.manifest.group_of(view) for view in views})
        answer: Bool[np.ndarray, " m"] = done[rows // self.manifest.block_rows][:, groups].all(axis=1)
        return answer

    def absent(self, part: str) -> dict[int, str]:
        """Rows recorded as dropped, with the reason."""
        return {
            int(row): str(reason) for commit in self.commits(part).values() for row, reason in commit.absent
        }

    def gather(
        self, teacher: str, array: str, rows: Int64[np.ndarray, " b"], view: int | Int64[np.ndarray, " b"] = 0
    ) -> np.ndarray:
        """Copy rows out of an array, grouped by chunk.

        Args:
            teacher: its name, or "samples".
            array: array name.
            rows: rows of this cache.
            view: one view for all rows, or one per row; ignored by arrays without views.

        Returns:
            [b, ...] values in the order of ``rows``.

        Raises:
            CacheMissingError: a row asked for is not written.
        """
        part = self.part_of(teacher, array)
        spec = self.specs(part)[array]
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

    def _chunk(self, part: str, array: str, spec: ArraySpec, block: int, view: int) -> np.ndarray:
        place = (part, array, block, view)
        found = self._maps.get(place)
        if found is not None:
            self._maps.move_to_end(place)
            return found
        manifest = self.manifest
        if view >= self.store.views(part) or (block, manifest.group_of(view)) not in self.commits(part):
            rows = manifest.rows_of(block)
            raise CacheMissingError(
                f"{self.layout.root}: rows {rows.start}-{rows.stop - 1} of '{part}' view {view} are not written",
                "Run the kd cache-teachers command that made the cache again; it fills what is missing.",
            )
        path = self.store.chunk(part, array, spec, block, view)
        mapped = self.store.backend.map(path, manifest.block_rows, spec)
        self._maps[place] = mapped
        if len(self._maps) > self._max_maps:
            self._maps.popitem(last=False)
        return mapped
