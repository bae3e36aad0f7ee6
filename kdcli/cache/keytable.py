"""Sample keys, packed: two numpy arrays instead of one Python string per row."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, final, overload

import numpy as np
from jaxtyping import Int64, UInt8


def block_digest(*values: np.ndarray) -> str:
    """sha256 over the bytes of arrays."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


@final
class KeyTable:
    """An immutable sequence of unique strings, as one blob of UTF-8 and the offsets into it.

    Args:
        blob: the keys' bytes, one after the other.
        offsets: where each key starts, and the blob's length at the end.
    """

    def __init__(self, blob: UInt8[np.ndarray, " bytes"], offsets: Int64[np.ndarray, " n1"]) -> None:
        self.blob, self.offsets = blob, offsets
        self._index: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None = None

    @classmethod
    def from_strings(cls, keys: Iterable[str]) -> "KeyTable":
        """Pack strings, keeping their order."""
        encoded = [key.encode() for key in keys]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(key) for key in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def concatenate(cls, tables: Iterable["KeyTable"]) -> "KeyTable":
        """One table after the other."""
        parts = list(tables)
        sizes = np.concatenate([np.diff(part.offsets) for part in parts]) if parts else np.zeros(0, np.int64)
        offsets = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        blob = np.concatenate([part.blob for part in parts]) if parts else np.zeros(0, np.uint8)
        return cls(blob, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return self.at(np.arange(len(self))[row])
        return self._bytes(row).decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def at(self, rows: Int64[np.ndarray, " b"]) -> list[str]:
        """The keys of ``rows``, each in range, as text."""
        blob, starts, stops = self.blob, self.offsets[rows], self.offsets[rows + 1]
        return [blob[start:stop].tobytes().decode() for start, stop in zip(starts, stops, strict=True)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeyTable)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.blob, other.blob)
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays: compared, never hashed

    def __getstate__(self) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " n1"]]:
        return self.blob, self.offsets  # the index is rebuilt where it is needed

    def __setstate__(self, state: tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " n1"]]) -> None:
        self.blob, self.offsets = state
        self._index = None

    def _bytes(self, row: int | np.integer[Any]) -> bytes:
        row = range(len(self))[int(row)]  # negative rows, and IndexError past the end
        return self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def select(self, rows: Int64[np.ndarray, " m"]) -> "KeyTable":
        """The keys of ``rows``, in that order."""
        starts, sizes = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        return KeyTable(self.blob[positions], offsets)

    def is_sound(self) -> bool:
        """Whether the offsets begin at 0, never fall, and end at the blob's end."""
        return bool(
            len(self.offsets)
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.blob)
            and (np.diff(self.offsets) >= 0).all()
        )

    def digest(self) -> str:
        """sha256 over keys and their order, hexadecimal."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.blob.tobytes())
        return digest.hexdigest()

    def hashes(self) -> Int64[np.ndarray, " n"]:
        """A 63-bit hash of every key."""
        return np.fromiter(
            (
                int.from_bytes(hashlib.blake2b(self._bytes(row), digest_size=8).digest()) >> 1
                for row in range(len(self))
            ),
            np.int64,
            count=len(self),
        )

    def find(self, other: "KeyTable") -> Int64[np.ndarray, " m"]:
        """Row in this table of each key of ``other``; -1 where it is not here."""
        if self._index is None:
            hashes = self.hashes()
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order
        sorted_hashes, order = self._index
        rows = np.full(len(other), -1, np.int64)
        if not len(self):
            return rows
        wanted = other.hashes()
        places = np.searchsorted(sorted_hashes, wanted)
        inside = np.minimum(places, len(self) - 1)
        hits = (sorted_hashes[inside] == wanted) & (np.diff(other.offsets) > 0)  # no key at all is padding
        rows[hits] = order[inside[hits]]
        self._refute_collisions(other, rows, places, sorted_hashes, order)
        return rows

    def _refute_collisions(
        self,
        other: "KeyTable",
        rows: Int64[np.ndarray, " m"],
        places: Int64[np.ndarray, " m"],
        sorted_hashes: Int64[np.ndarray, " n"],
        order: Int64[np.ndarray, " n"],
    ) -> None:
        # An equal hash is not yet an equal key: compare the bytes, and look at the neighbours if they differ.
        for wanted in np.flatnonzero(rows >= 0):
            key, place = other._bytes(wanted), int(places[wanted])
            value = sorted_hashes[place]
            rows[wanted] = -1
            while place < len(order) and sorted_hashes[place] == value:
                if self._bytes(order[place]) == key:
                    rows[wanted] = order[place]
                    break
                place += 1

    def duplicates(self) -> list[str]:
        """Keys that occur more than once."""
        hashes = self.hashes()
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        suspects = np.flatnonzero((counts[inverse] > 1) & (np.diff(self.offsets) > 0))
        seen: set[bytes] = set()
        again: set[bytes] = set()
        for row in suspects:
            key = self._bytes(row)
            (again if key in seen else seen).add(key)
        return sorted(key.decode() for key in again)
