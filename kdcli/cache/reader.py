"""Reading one cache: mapped chunks, gathered batch by batch, no Python per row."""

import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.commits import Commit, done_mask, read_commits, sizes_agree, strange_ids
from kdcli.cache.layout import SAMPLES, load_manifest
from kdcli.cache.memory import max_maps, prefetch
from kdcli.cache.origin import ChunkFile
from kdcli.cache.provenance import ArraySpec
from kdcli.cache.store import Opened, Store
from kdcli.errors import Advice, CacheMissingError, CorruptError, IdentityError

_ATTEMPTS: Final = 4
"""How often a copy is fetched anew that other processes remove before it is mapped."""
_RUN_BYTES: Final = 2**16
"""What a processor's cache holds beside all else. A whole batch besides the result would be two pieces of memory that
malloc gives back to the system after every batch, and page faults in the next: 0.9 ms in place of 0.2."""
_READER: Final = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


@final
class Column:
    """What gathering from one array needs to know.

    Attributes:
        part, name, spec: the array.
        row_bytes: of one row of one view.
        item: a row as one item, so that numpy copies rows as it copies bytes.
        run: rows that are brought together before they are put in order.
        cold: whether the last batch, or a chunk mapped since, made the kernel read a disk.
    """

    __slots__ = ("cold", "item", "name", "part", "row_bytes", "run", "spec")

    def __init__(self, part: str, name: str, spec: ArraySpec) -> None:
        self.part, self.name, self.spec = part, name, spec
        self.row_bytes = spec.row_bytes
        self.item = np.dtype((np.void, max(1, self.row_bytes)))
        self.run = max(1, _RUN_BYTES // max(1, self.row_bytes))
        self.cold = True


@final
class CacheReader(Opened):
    """One open cache. Cheap to pickle: workers map chunks themselves, when they first need them.

    Attributes:
        keys, labels: of every row.
        staged: folder with checked copies of chunks on a faster disk, see :mod:`kdcli.cache.staging`.
    """

    def __init__(self, root: Path) -> None:
        self.store = Store(root, load_manifest(root))
        self.keys = self.store.load_keys()
        self.labels = self.store.load_labels()
        self.staged: Path | None = None
        self._block_rows, self._views = self.manifest.block_rows, self.manifest.views
        small = self.manifest.blocks * self._views <= 2**16
        self._chunk_type = np.dtype(np.uint16 if small else np.int64)  # 16 bits are sorted by counting
        self._columns: dict[tuple[str, str], Column] = {}
        self._maps: dict[tuple[Column, int], np.ndarray] = {}
        self._max_maps = self._most_maps()
        self._commits: dict[str, dict[tuple[int, int], Commit]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": {}, "_maps": {}}

    def _most_maps(self) -> int:
        if self.store.origin is None:
            return max_maps()
        rows, specs = self._block_rows, (s for part in self.store.parts() for s in self.specs(part).values())
        largest = max(self.store.backend.file_size(rows, spec) for spec in specs)
        return min(max_maps(), self.store.origin.most_maps(largest))

    def knows(self, part: str) -> bool:
        """Whether a part is the samples, or of a teacher that the cache has."""
        return part.partition("/")[0] in (SAMPLES, *self.teachers)

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
                Advice("keep-more", array=array),
            )
        return f"{teacher}/{output.name}"

    def commits(self, part: str) -> dict[tuple[int, int], Commit]:
        """The records of a part, each checked to be this cache's and this teacher's."""
        if part not in self._commits:
            found = read_commits(self.layout, part)
            for commit in found.values():
                if wrong := strange_ids(self.store, commit):
                    raise IdentityError(
                        f"{self.layout.root}: the record of {commit.unit} belongs elsewhere",
                        Advice("make-part"),
                        wrong,
                    )
            self._commits[part] = {
                place: commit
                for place, commit in found.items()
                if self.manifest.holds(*place) and sizes_agree(self.store, commit)
            }
        return self._commits[part]

    def go_by(self, part: str, commits: Iterable[Commit]) -> None:
        """Take these for the records of a part from now on: those on disk, or their files, are damaged."""
        self._commits[part] = {(commit.block, commit.group): commit for commit in commits}

    def present(self, part: str, rows: Int64[np.ndarray, " m"], views: list[int]) -> Bool[np.ndarray, " m"]:
        """Which rows are written for all of ``views``; padding between segments never is."""
        if any(view >= self.store.views(part) for view in views):
            return np.zeros(len(rows), bool)
        done = done_mask(self.store, self.commits(part))
        groups = sorted({self.manifest.group_of(view) for view in views})
        answer: Bool[np.ndarray, " m"] = done[rows // self.manifest.block_rows][:, groups].all(axis=1)
        return answer & ~np.isin(rows, self.manifest.padding_rows())

    def absent(self, part: str) -> dict[int, str]:
        """Rows without a sample's outputs for good, with the reason: dropped images, padding between segments."""
        padding = dict.fromkeys(self.manifest.padding_rows().tolist(), "padding")
        return padding | {
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
        column = self._columns.get((teacher, array)) or self._column(teacher, array)
        spec = column.spec
        if not (len(rows) and column.row_bytes):
            return np.empty((len(rows), *spec.row_shape), spec.dtype)
        largest = view if isinstance(view, int) else view.max()
        if largest >= self._views:
            raise CacheMissingError(f"{self.layout.root} has {self._views} views, no view {largest}")
        blocks = rows // self._block_rows
        chunks = blocks * self._views + (view if spec.per_view else 0)
        order = chunks.astype(self._chunk_type).argsort(kind="stable")
        chunks, places = chunks[order], (rows - blocks * self._block_rows)[order]
        ends = chunks[1:] != chunks[:-1]
        ends[column.run - 1 :: column.run] = True
        edges = [0, *(ends.nonzero()[0] + 1).tolist(), len(rows)]
        numbers = chunks[edges[:-1]].tolist()
        self._bring(column, numbers)
        mapped = [self._chunk(column, number) for number in numbers]
        pieces = list(zip(mapped, edges[:-1], edges[1:], strict=True))
        before = disk_reads()
        if column.cold:
            for chunk, start, stop in pieces:
                prefetch(chunk, places[start:stop])
        out, grouped = np.empty(len(rows), column.item), np.empty(min(len(rows), column.run), column.item)
        for chunk, start, stop in pieces:
            first = start - start % column.run
            chunk.take(
                places[start:stop], 0, grouped[start - first : stop - first], "clip"
            )  # all are in range
            if stop - first == len(grouped) or stop == len(rows):
                out[order[first:stop]] = grouped[: stop - first]
        column.cold = disk_reads() > before
        return out.view(spec.dtype).reshape(len(rows), *spec.row_shape)

    def _column(self, teacher: str, array: str) -> Column:
        part = self.part_of(teacher, array)
        return self._columns.setdefault((teacher, array), Column(part, array, self.specs(part)[array]))

    def _chunk(self, column: Column, number: int) -> np.ndarray:
        """Rows of a chunk as items; chunks are numbered by block, then view."""
        found = self._maps.get((column, number))
        if found is not None:
            return found
        block, view = divmod(number, self._views)
        mapped = self._map(self._written(column.part, column.name, block, view), column.spec)
        self._maps[column, number] = mapped.reshape(self._block_rows, -1).view(column.item).reshape(-1)
        if len(self._maps) > self._max_maps:
            del self._maps[next(iter(self._maps))]  # rows come in random order: the oldest is as good as any
        column.cold = True  # nothing is known of a chunk that was just mapped
        return self._maps[column, number]

    def _bring(self, column: Column, numbers: list[int]) -> None:
        """Have several chunks of a cache that is elsewhere fetched at a time; they are mapped one by one."""
        if self.store.origin is None:
            return
        missing = [number for number in dict.fromkeys(numbers) if (column, number) not in self._maps]
        if len(missing) > 1:
            places = (divmod(number, self._views) for number in missing)
            self.store.origin.bring([self._written(column.part, column.name, *place) for place in places])

    def _map(self, chunk: ChunkFile, spec: ArraySpec) -> np.ndarray:
        for _ in range(_ATTEMPTS if self.store.origin else 0):
            try:
                return self.store.backend.map(self.source(chunk), self._block_rows, spec)
            except CorruptError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise  # else another process made room just now
        return self.store.backend.map(self.source(chunk), self._block_rows, spec)

    # --- chunks as files ---------------------------------------------------------------------------

    def chunk_path(self, part: str, array: str, block: int, view: int) -> Path:
        """File to read a written chunk from; see :meth:`source`."""
        return self.source(self._written(part, array, block, view))

    def _written(self, part: str, array: str, block: int, view: int) -> ChunkFile:
        """A chunk that is committed.

        Raises:
            CacheMissingError: it is not written.
        """
        found = self._recorded(part, array, block, view)
        if found is None:
            rows = self.manifest.rows_of(block)
            raise CacheMissingError(
                f"{self.layout.root}: rows {rows.start}-{rows.stop - 1} of '{part}' view {view} are not written",
                Advice("fill-gaps"),
            )
        return found

    def source(self, chunk: ChunkFile) -> Path:
        """File to read a chunk from: its staged copy, where there is one; of a cache elsewhere always a copy.

        Raises:
            KdError: a copy has to be fetched, and cannot be.
        """
        if self.store.origin is not None:
            return self.store.origin.copy(chunk)
        if self.staged is not None and (copy := self.staged / chunk.copy_name).is_file():
            return copy
        return chunk.path

    def chunk_files(
        self, teacher: str, array: str, rows: Int64[np.ndarray, " n"], views: Iterable[int]
    ) -> Iterator[ChunkFile]:
        """The written chunks that hold some rows and views of an array, as the cache records them."""
        part = self.part_of(teacher, array)
        per_view = self.specs(part)[array].per_view
        for block in np.unique(rows // self._block_rows).tolist():
            for view in views if per_view else (0,):
                found = self._recorded(part, array, block, view)
                if found is not None:
                    yield found

    def _recorded(self, part: str, array: str, block: int, view: int) -> ChunkFile | None:
        spec, kept = self.specs(part)[array], self.store.views(part)
        if not spec.per_view:
            view = 0
        if not 0 <= view < kept:
            return None
        group = self.manifest.group_of(view)
        commit = self.commits(part).get((block, group))
        if commit is None:
            return None
        size, crc = commit.arrays[array][
            self.manifest.views_of(group, kept).index(view) if spec.per_view else 0
        ]
        path = self.store.chunk(part, array, spec, block, view)
        return ChunkFile(path, f"{path.relative_to(self.store.data)}.{crc:08x}", size, crc)


def disk_reads() -> int:
    """How often this thread has made the kernel read a disk; grows when what it touched was not in memory."""
    usage = resource.getrusage(_READER)
    return usage.ru_majflt + usage.ru_inblock
