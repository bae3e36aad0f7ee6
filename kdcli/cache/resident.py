"""Rows of a cache held in memory: read once, then shared by all processes of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Int32, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.memory import SharedBytes, available_memory
from kdcli.cache.needs import Needs
from kdcli.cache.provenance import ArraySpec
from kdcli.console import console, size
from kdcli.errors import Advice, DeviceError

_ALIGNMENT: Final = 64
_PIECE: Final = 32 * 2**20
"""Bytes copied in one go."""


@final
@dataclass(frozen=True, slots=True)
class Table:
    """One array of one view: ``view`` is None for arrays without views."""

    teacher: str
    array: str
    view: int | None
    spec: ArraySpec


def tables_of(cache: CacheSet, needs: Needs) -> Iterator[Table]:
    """What has to be held so that nothing of ``needs`` is read from the cache any more."""
    seen = set()
    for member in cache.holders(needs.rows):  # the others may keep arrays of other shapes
        for teacher, array in needs.arrays(member):
            spec = member.specs(member.part_of(teacher, array))[array]
            for view in needs.views if spec.per_view else (None,):
                if (teacher, array, view) not in seen:
                    seen.add((teacher, array, view))
                    yield Table(teacher, array, view, spec)


def copy_rows(
    cache: CacheSet, table: Table, rows: Int64[np.ndarray, " n"]
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a table, piece by piece: where a piece starts, and its values."""
    step = max(1, _PIECE // max(1, table.spec.row_bytes))
    for start in range(0, len(rows), step):
        yield start, cache.gather(table.teacher, table.array, rows[start : start + step], table.view or 0)


def slots_of(count: int, rows: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " count"]:
    """Position in ``rows`` of each of ``count`` rows; -1 for those that are not in it."""
    slots = np.full(count, -1, np.int32)
    slots[rows] = np.arange(len(rows), dtype=np.int32)
    return slots


def require_room(needed: int, free: int, what: str) -> None:
    """Refuse to hold more than fits.

    Raises:
        DeviceError: it does not fit.
    """
    if needed > free:
        raise DeviceError(
            f"resident: {size(needed)} do not fit into the {size(free)} of {what} that are free",
            Advice("not-resident"),
        )


@final
class ResidentRows:
    """Copies of rows in shared memory. Pickled to a worker, it is the same memory, not another copy.

    Args:
        cache: where to read them, once.
        needs: which.

    Raises:
        DeviceError: they do not fit into the memory that is available.
    """

    def __init__(self, cache: CacheSet, needs: Needs) -> None:
        rows, count = np.unique(needs.rows), int(cache.offsets[-1])
        tables = list(tables_of(cache, needs))
        self._rows, self._count = len(rows), count
        self._places: dict[tuple[str, str, int | None], tuple[int, ArraySpec]] = {}
        end = _aligned(4 * count)
        for table in tables:
            self._places[table.teacher, table.array, table.view] = (end, table.spec)
            end = _aligned(end + table.spec.row_bytes * len(rows))
        require_room(end, available_memory(), "memory")
        self._memory = SharedBytes(max(1, end))
        with self._memory.writable() as target:
            everything = np.frombuffer(target, np.uint8)
            everything[: 4 * count].view(np.int32)[:] = slots_of(count, rows)
            for table in tables:
                first = self._places[table.teacher, table.array, table.view][0]
                for start, values in copy_rows(cache, table, rows):
                    begin = first + start * table.spec.row_bytes
                    everything[begin : begin + values.nbytes] = values.reshape(-1).view(np.uint8)
            del everything  # a map that is looked at cannot be closed
        console.note(f"resident: {size(end)} of {len(rows)} rows held in memory")

    def gather(
        self, teacher: str, array: str, rows: Int64[np.ndarray, " b"], view: int | Int64[np.ndarray, " b"]
    ) -> np.ndarray | None:
        """[b, ...] values as the cache would give them; None when some of them are not held."""
        key = (teacher, array, None if isinstance(view, np.ndarray) else int(view))
        found = self._places.get(key) or self._places.get((teacher, array, None))
        if found is None or not found[1].row_bytes:
            return None
        first, spec = found
        slots = self._memory.bytes[: 4 * self._count].view(np.int32)[rows]
        if len(slots) and slots.min() < 0:
            return None
        stored = self._memory.bytes[first : first + spec.row_bytes * self._rows]
        items = stored.view(np.dtype((np.void, spec.row_bytes)))
        values: np.ndarray = items.take(slots).view(spec.dtype).reshape(len(rows), *spec.row_shape)
        return values


def hold(cache: CacheSet, needs: Needs) -> None:
    """Hold what will be read in memory that workers share.

    Raises:
        DeviceError: it does not fit.
    """
    cache.held = ResidentRows(cache, needs).gather


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
