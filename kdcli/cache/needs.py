"""What a run will read of caches."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.arrays import sample_arrays
from kdcli.cache.layout import SAMPLES
from kdcli.cache.origin import ChunkFile
from kdcli.cache.reader import CacheReader


@final
@dataclass(frozen=True, slots=True)
class Needs:
    """What a run will read of a cache.

    Attributes:
        reads: teacher -> its arrays; those of the samples are always among it.
        rows: global rows.
        views: numbers of views.
    """

    reads: Mapping[str, Collection[str]]
    rows: Int64[np.ndarray, " n"]
    views: tuple[int, ...]

    def arrays(self, member: CacheReader) -> Iterator[tuple[str, str]]:
        """(teacher or samples, array) of everything that ``member`` has of it."""
        yield from ((SAMPLES, name) for name in sample_arrays(member.manifest))
        for teacher, names in self.reads.items():
            if teacher in member.teachers:
                yield from ((teacher, name) for name in names)

    def chunks(self, member: CacheReader, first: int, stop: int) -> Iterator[ChunkFile]:
        """Every written chunk of a cache that holds some of it.

        Args:
            member: one of the caches.
            first: of its rows, among the global ones.
            stop: after the last of them.
        """
        rows = self.rows[(self.rows >= first) & (self.rows < stop)] - first
        for teacher, array in self.arrays(member):
            yield from member.chunk_files(teacher, array, rows, self.views)
