"""All pairs of hashes within a Hamming distance, in memory that does not depend on how many hashes there are.

Every pair is looked at, tile by tile: 64-bit words are combined with XOR and their bits counted (a few
nanoseconds a pair), which costs the same however the hashes are distributed. An index of parts of the hash
would have to look at fewer pairs only if hashes were spread evenly, and those of images are not.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import final

import numpy as np
from jaxtyping import Bool, Int64, UInt64

ROWS, COLUMNS = 64, 4096
"""Of a tile: its 2 MB of XORs stay in the cache of a processor."""
WORD = 64


@final
@dataclass(frozen=True, slots=True, eq=False)
class Hashes:
    """Hashes to compare.

    Attributes:
        words: 64 bits a word.
        pixels: digests; equal ones are of equal pixels.
    """

    words: UInt64[np.ndarray, "n words"]
    pixels: UInt64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.pixels)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of rows, by distance, then by row.

    Attributes:
        a, b: rows of the two data sets.
        distance: bits in which their hashes differ.
        identical: whether their pixels are equal.
    """

    a: Int64[np.ndarray, " p"]
    b: Int64[np.ndarray, " p"]
    distance: Int64[np.ndarray, " p"]
    identical: Bool[np.ndarray, " p"]

    def __len__(self) -> int:
        return len(self.a)


_COLUMNS = tuple(field.name for field in fields(Pairs))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """What :func:`near_pairs` found.

    Attributes:
        pairs: all of them, or only the nearest one of each row of ``a``.
        found: how many there are in all.
        near_a, near_b: rows that are in a pair.
        identical_a, identical_b: rows that are in a pair of equal pixels.
    """

    pairs: Pairs
    found: int
    near_a: Bool[np.ndarray, " n"]
    near_b: Bool[np.ndarray, " m"]
    identical_a: Bool[np.ndarray, " n"]
    identical_b: Bool[np.ndarray, " m"]


def near_pairs(search: "Search", threads: int = 1, advance: Callable[[int], object] = bool) -> Matches:
    """Find all pairs of hashes that differ in at most ``search.distance`` bits.

    Args:
        search: what to compare.
        threads: to compare with.
        advance: called with the number of rows of ``a`` that are done.
    """
    a, b, limit = search.a, search.b, search.limit
    near_a, identical_a = np.zeros((2, len(a)), bool)
    near_b, identical_b = np.zeros((2, len(b)), bool)
    kept: list[Pairs] = []
    nearest: list[Pairs] = []
    found = 0
    pool = ThreadPoolExecutor(max(1, threads))
    try:  # not ``with``: that would wait for all that is still to be done when somebody presses ^C
        # Results come in the order of rows, so that the outcome does not depend on the threads.
        for block in pool.map(search.block, range(0, len(a), ROWS)):
            found += block.found
            nearest.append(block.nearest)
            kept = [*kept, block.pairs] if found <= limit else []
            near_a[block.nearest.a] = True
            near_b[block.near_b], identical_b[block.identical_b] = True, True
            identical_a[block.identical_a] = True
            advance(min(ROWS, len(a) - block.first))
    finally:
        pool.shutdown(cancel_futures=True)
    pairs = _sorted(_joined(kept if found <= limit else nearest))
    return Matches(pairs, found, near_a, near_b, identical_a, identical_b)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Pairs of some rows of ``a``; ``pairs`` is empty once there are more than the limit."""

    first: int
    pairs: Pairs
    nearest: Pairs
    found: int
    near_b: Int64[np.ndarray, " q"]
    identical_a: Int64[np.ndarray, " r"]
    identical_b: Int64[np.ndarray, " s"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What to compare.

    Attributes:
        a: hashes.
        b: hashes with equally many words.
        distance: bits, at least 0.
        same: row of ``b`` that is the same sample as a row of ``a`` and no duplicate of it, -1 for none; None:
            ``b`` is ``a``, and each pair counts once, the earlier row first.
        limit: pairs to keep; beyond that, the nearest one of each row of ``a``.
    """

    a: Hashes
    b: Hashes
    distance: int
    same: Int64[np.ndarray, " n"] | None
    limit: int

    def block(self, first: int) -> _Block:
        """Compare ``ROWS`` rows of ``a`` from ``first`` on with all of ``b``, or with the later ones of ``a``."""
        kept: list[Pairs] = []
        nearest: Pairs = _joined([])
        near_b, identical_b = np.zeros((2, len(self.b)), bool)
        identical_a: set[int] = set()
        found = 0
        for start in range(first + 1 if self.same is None else 0, len(self.b), COLUMNS):
            tile = self._tile(first, start)
            if not len(tile):
                continue
            found += len(tile)
            kept = [*kept, tile] if found <= self.limit else []
            nearest = _nearest(_joined([nearest, tile]))
            near_b[tile.b] = True
            identical_b[tile.b[tile.identical]] = True
            identical_a.update(tile.a[tile.identical].tolist())
        return _Block(
            first,
            _joined(kept),
            nearest,
            found,
            np.flatnonzero(near_b),
            np.array(sorted(identical_a), np.int64),
            np.flatnonzero(identical_b),
        )

    def _tile(self, first: int, start: int) -> Pairs:
        a, b = self.a.words[first : first + ROWS], self.b.words[start : start + COLUMNS]
        # Of unrelated hashes half the bits differ: four times the distance in bits rules nearly all of them out.
        filters = min(a.shape[1], math.ceil(4 * max(1, self.distance) / WORD))
        differing = np.bitwise_count(a[:, None, 0] ^ b[None, :, 0])
        for word in range(1, filters):  # 256 overflows to 0, which the exact distance rules out
            differing += np.bitwise_count(a[:, None, word] ^ b[None, :, word])
        rows, columns = np.nonzero(differing <= self.distance)
        distances = np.bitwise_count(a[rows] ^ b[columns]).sum(axis=1, dtype=np.int64)
        rows, columns = rows + first, columns + start
        keep = distances <= self.distance
        keep &= columns > rows if self.same is None else columns != self.same[rows]
        rows, columns, distances = rows[keep], columns[keep], distances[keep]
        return Pairs(rows, columns, distances, self.a.pixels[rows] == self.b.pixels[columns])


def _joined(parts: Sequence[Pairs]) -> Pairs:
    empty = np.zeros(0, np.int64)
    whole = (Pairs(empty, empty, empty, empty.astype(bool)), *parts)
    return Pairs(*(np.concatenate([getattr(part, name) for part in whole]) for name in _COLUMNS))


def _nearest(pairs: Pairs) -> Pairs:
    """Of each row of ``a`` the nearest pair, among equally near ones that of equal pixels, then the first."""
    order = np.lexsort((pairs.b, ~pairs.identical, pairs.distance, pairs.a))
    rows = pairs.a[order]
    return _taken(pairs, order[np.flatnonzero(np.diff(rows, prepend=-1))])


def _sorted(pairs: Pairs) -> Pairs:
    return _taken(pairs, np.lexsort((pairs.b, pairs.a, pairs.distance)))


def _taken(pairs: Pairs, rows: Int64[np.ndarray, " q"]) -> Pairs:
    return Pairs(*(getattr(pairs, name)[rows] for name in _COLUMNS))
