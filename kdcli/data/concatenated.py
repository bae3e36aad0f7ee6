"""Several data sets as one, ``A++B``: keys are prefixed with the number of their member."""

from collections.abc import Collection, Sequence
from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import ImageSource, Listing
from kdcli.data.photos import Picture
from kdcli.data.spec import JOIN
from kdcli.errors import UsageError
from kdcli.types import DecodeMode


@final
class ConcatenatedSource(ImageSource):
    """The images of several sources; a key is ``NUMBER/KEY``, with the number of the member from 0.

    Args:
        sources: of the members.
        locations: specs that reopen the members from any working directory.
    """

    def __init__(self, sources: Sequence[ImageSource], locations: Sequence[str]) -> None:
        self._sources, self._locations = tuple(sources), tuple(locations)
        self.clips = any(source.clips for source in sources)
        if not all(source.clips == self.clips for source in sources):
            raise UsageError(
                f"{self.text} joins clips and images", "Join clips with clips, and images with images."
            )

    @property
    def text(self) -> str:
        """The members' locations, joined."""
        return JOIN.join(self._locations)

    def listing(self, split: str | None, task: str | None) -> Listing:
        """Which samples there are is the members' to say, with modifiers of their own."""
        raise UsageError(
            f"{self.text} has no modifiers of its own",
            f"Write them behind each member: A@split=train{JOIN}B.",
        )

    def encoded(self, key: str) -> bytes:
        """See :meth:`ImageSource.encoded`."""
        source, own = self._find(key)
        return source.encoded(own)

    def size(self, key: str) -> int:
        """See :meth:`ImageSource.size`."""
        source, own = self._find(key)
        return source.size(own)

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """See :meth:`ImageSource.decode`."""
        source, own = self._find(key)
        return source.decode(own, encoded)

    def photo(self, key: str, encoded: bytes) -> Picture:
        """See :meth:`ImageSource.photo`."""
        source, own = self._find(key)
        return source.photo(own, encoded)

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """See :meth:`ImageSource.picture`."""
        source, own = self._find(key)
        return source.picture(own, encoded, how)

    def path(self, key: str) -> str:
        """See :meth:`ImageSource.path`."""
        source, own = self._find(key)
        return source.path(own)

    def random_cost(self) -> str:
        """See :meth:`ImageSource.random_cost`; of the first that has one."""
        return next(filter(None, (source.random_cost() for source in self._sources)), "")

    def keys_in(self, keys: KeyTable, sources: Collection[str]) -> KeyTable:
        """A cache of a member alone has no prefixes: what it holds serves the joined data set, too."""
        alone = {number for number, source in enumerate(self._sources) if source.text in sources}
        if not alone:
            return keys
        parts = (key.partition("/") for key in keys)
        return KeyTable.from_strings(
            own if int(number) in alone else f"{number}/{own}" for number, _, own in parts
        )

    def _find(self, key: str) -> tuple[ImageSource, str]:
        number, _, own = key.partition("/")
        return self._sources[int(number)], own


def concatenate_keys(tables: Sequence[KeyTable]) -> KeyTable:
    """The members' keys, prefixed, one member after the other; in plain string order if the members' are."""
    width = len(str(len(tables) - 1))
    return KeyTable.concatenate(
        KeyTable.from_strings(f"{number:0{width}d}/{key}" for key in keys)
        for number, keys in enumerate(tables)
    )


def concatenate_labels(
    labels: Sequence[Int64[np.ndarray, " m"]], names: Sequence[tuple[str, ...] | None]
) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...] | None]:
    """The members' labels in one numbering, where all that have labels name the same classes.

    Returns:
        Labels and class names; all -1 and None where the members name different classes, or none has labels.
    """
    known = [each for each in names if each is not None]
    if not known or any(set(each) != set(known[0]) for each in known):
        return np.full(sum(map(len, labels)), -1, np.int64), None
    number = {name: index for index, name in enumerate(known[0])}
    tables = [np.asarray([*(number[name] for name in each or ()), -1], np.int64) for each in names]
    return np.concatenate([table[own] for table, own in zip(tables, labels, strict=True)]), known[0]
