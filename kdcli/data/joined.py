"""The samples of a cache that grew, in the order of its rows, each read from the data set that has it."""

from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import ImageSource
from kdcli.data.photos import Picture
from kdcli.data.sources import ImageData
from kdcli.types import DecodeMode

NOWHERE = -1


@final
class JoinedData:
    """Images of several data sets under one numbering. Picklable; arrays only, no object per row.

    A row that holds no sample (padding of a cache that grew) has an empty key and is never read.

    Attributes:
        keys: of all rows.
        labels: indices into ``class_names``; -1 for rows without a label.
        class_names: None without labels.
    """

    def __init__(
        self, keys: KeyTable, labels: Int64[np.ndarray, " n"], class_names: tuple[str, ...] | None
    ) -> None:
        self.keys, self.labels, self.class_names = keys, labels, class_names
        self._sources: tuple[ImageSource, ...] = ()
        self._source_of = np.full(len(keys), NOWHERE, np.int16)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def clips(self) -> bool:
        """Whether its samples are clips."""
        return any(source.clips for source in self._sources)

    def add(self, part: ImageData, rows: Int64[np.ndarray, " m"]) -> None:
        """Read rows from ``part`` that are read from nowhere else yet.

        Args:
            part: a data set that has the keys of these rows.
            rows: any; -1 stands for a sample that is none of them.
        """
        free = rows[rows >= 0]
        free = free[self._source_of[free] == NOWHERE]
        self._source_of[free] = len(self._sources)
        self._sources = (*self._sources, part.source)

    def lost(self) -> Int64[np.ndarray, " m"]:
        """Rows with a key that no data set gives."""
        return np.flatnonzero((self._source_of == NOWHERE) & (np.diff(self.keys.offsets) > 0))

    def encoded(self, row: int) -> bytes:
        """See :meth:`ImageData.encoded`."""
        return self._source(row).encoded(self.keys[row])

    def decode(self, row: int, encoded: bytes) -> Image.Image:
        """See :meth:`ImageData.decode`."""
        return self._source(row).decode(self.keys[row], encoded)

    def picture(self, row: int, encoded: bytes, how: DecodeMode) -> Picture:
        """See :meth:`ImageData.picture`."""
        return self._source(row).picture(self.keys[row], encoded, how)

    def image(self, row: int) -> Image.Image:
        """See :meth:`ImageData.image`."""
        return self.decode(row, self.encoded(row))

    def path(self, row: int) -> str:
        """See :meth:`ImageData.path`."""
        return self._source(row).path(self.keys[row])

    def _source(self, row: int) -> ImageSource:
        number = int(self._source_of[row])
        if number == NOWHERE:
            raise IndexError(f"row {row} holds no sample")
        return self._sources[number]


Images = ImageData | JoinedData
"""What teachers are shown: one data set, or those that a cache grew from."""
