"""What ``kd audit`` found, as a value and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, final

from kdcli.auditing.matching import Pairs
from kdcli.cache.keytable import KeyTable
from kdcli.results import Result, Table


@final
@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two data sets.

    Attributes:
        spec: as the user wrote it.
        keys: of all images.
        compared: images that were decoded and have contrast.
        near: those of them that have a near-duplicate.
        identical: those of them that have one with equal pixels.
        constant: keys of images of one gray, which are not compared.
        bad: why an image cannot be decoded, by its key; not compared either.
    """

    spec: str
    keys: KeyTable
    compared: int
    near: int
    identical: int
    constant: tuple[str, ...]
    bad: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "data": self.spec,
            "images": len(self.keys),
            "compared": self.compared,
            "near_duplicates": self.near,
            "identical": self.identical,
            "constant": list(self.constant),
            "bad": dict(self.bad),
        }


@final
@dataclass(frozen=True, slots=True, eq=False)
class AuditResult(Result):
    """Near-duplicates between two data sets, or within one.

    Attributes:
        a, b: the data sets; ``b`` is ``a`` where one was compared with itself.
        bits, distance: of the hash, and how many of them may differ.
        same: images that are the very same sample of the same source in both; they are no duplicates.
        pairs: all of them or, where there are more than ``--max-pairs``, the nearest one of each image of ``a``.
        found: pairs in all.
        excluded: keys of ``a`` without which no pair is left; within one data set the first of several stays.
    """

    a: Side
    b: Side
    bits: int
    distance: int
    same: int
    pairs: Pairs
    found: int
    excluded: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether one data set was compared with itself."""
        return self.a is self.b

    def rows(self) -> list[tuple[int, bool, str, str]]:
        """Distance, whether the pixels are equal, and both keys of each pair that is listed."""
        columns = (self.pairs.distance, self.pairs.identical, self.pairs.a, self.pairs.b)
        return [
            (distance, identical, self.a.keys[a], self.b.keys[b])
            for distance, identical, a, b in zip(*(each.tolist() for each in columns), strict=True)
        ]

    def records(self) -> list[dict[str, Any]]:
        """A pair each."""
        return [
            {"distance": distance, "identical": identical, "a": a, "b": b}
            for distance, identical, a, b in self.rows()
        ]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = [
            (distance, "equal" if identical else "differ", a, b) for distance, identical, a, b in self.rows()
        ]
        return (Table(("distance", "pixels", "a", "b"), rows),)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "hash": {
                "name": "phash",
                "bits": self.bits,
                "library": f"imagehash {metadata.version('imagehash')}",
            },
            "distance": self.distance,
            "within": self.within,
            "a": self.a.document(),
            "b": None if self.within else self.b.document(),
            "same_samples": self.same,
            "found": self.found,
            "complete": self.found == len(self.pairs),
            "pairs": self.records(),
            "excluded": list(self.excluded),
        }
