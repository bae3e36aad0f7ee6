"""What pushing and pulling share: many units at a time, and chunks that are what their records say."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Final

from kdcli.cache.commits import Commit
from kdcli.cache.layout import Unit
from kdcli.cache.store import Store
from kdcli.console import console, size

STREAMS: Final = 16
"""Most units that are copied at a time: one connection alone does not fill a line."""
_MEMORY: Final = 2**30
"""Bytes of the chunks that are in memory at a time; at least one is."""


def copy_all(title: str, units: Sequence[Unit], store: Store, copy: Callable[[Unit], int]) -> int:
    """Copy units, several at a time; the first refusal ends it all.

    Args:
        title: of the progress.
        units: what to copy.
        store: the cache that they are of.
        copy: copies one; the bytes that it took.

    Returns:
        Bytes that were copied.
    """
    total = 0
    largest = max((_largest(store, part) for part in {unit.part for unit in units}), default=1)
    streams = max(1, min(STREAMS, _MEMORY // largest))
    with (
        console.progress(len(units), "units", title) as bar,
        ThreadPoolExecutor(streams, "kd-copy") as pool,
    ):
        try:
            for future in as_completed([pool.submit(copy, unit) for unit in units]):
                total += future.result()
                bar.advance(1, copied=size(total))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return total


def _largest(store: Store, part: str) -> int:
    rows = store.manifest.block_rows
    return max(store.backend.file_size(rows, spec) for spec in store.specs(part).values())


def unit_bytes(store: Store, unit: Unit) -> int:
    """Bytes of the chunks of a unit."""
    rows, views = store.manifest.block_rows, len(store.manifest.views_of(unit.group, store.views(unit.part)))
    specs = store.arrays_in(unit.part, unit.group).values()
    return sum(store.backend.file_size(rows, spec) * (views if spec.per_view else 1) for spec in specs)


def is_as_recorded(store: Store, data: bytes, recorded_size: int, crc: int) -> bool:
    """Whether these bytes of a chunk are those that were committed."""
    found = store.backend.judge(data)
    return (found.size, found.crc, found.sound) == (recorded_size, crc, True)


def record_name(unit: Unit) -> str:
    """Name of the object with the record of a unit."""
    return f"commits/{unit.part}/{unit.stem}.json"


def same_record(mine: Commit, theirs: Commit) -> bool:
    """Whether two records are of the same bytes of the same cache."""
    ids = ("cache_id", "part", "part_id", "block", "group", "keys")
    return mine.same_data(theirs) and all(getattr(mine, name) == getattr(theirs, name) for name in ids)
