"""One look at every image: is it sound, what is it, and have its bytes or pixels been seen before."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from kdcli.data.clips import Clip
from kdcli.data.decode import kind_of, pixels_digest
from kdcli.data.each import look_at_each
from kdcli.data.sources import ImageData
from kdcli.data.stored import unmarked
from kdcli.errors import BadDataError


@final
@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of an image.

    Attributes:
        content, pixels: digests of its bytes, and of its pixels as they are used.
        size: width and height in pixels.
        mode, turned, animated: see :class:`~kdcli.data.decode.Kind`.
        uneven: whether it is a clip whose frames are not equally far apart in time.
    """

    content: int
    pixels: int
    size: tuple[int, int]
    mode: str
    turned: bool
    animated: bool
    uneven: bool = False


@final
@dataclass(frozen=True, slots=True, eq=False)
class Looks:
    """Those of a data set, in its order.

    Attributes:
        data: the data set.
        content, pixels, turned, animated, uneven: see :class:`Look`.
        sizes: width and height; 0 where the image cannot be read.
        modes: how many images there are of each mode.
        bad: rows that cannot be read, and why.
    """

    data: ImageData
    content: UInt64[np.ndarray, " n"]
    pixels: UInt64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, "n 2"]
    turned: Bool[np.ndarray, " n"]
    animated: Bool[np.ndarray, " n"]
    uneven: Bool[np.ndarray, " n"]
    modes: Counter[str]
    bad: dict[int, str]

    @property
    def sound(self) -> Int64[np.ndarray, " m"]:
        """Rows that can be read."""
        readable = np.ones(len(self.data), bool)
        readable[list(self.bad)] = False
        return np.flatnonzero(readable)


def look(data: ImageData, row: int) -> Look:
    """Decode one image, or clip."""
    encoded = data.encoded(row)
    content = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
    image = data.picture(row, encoded, "exact")
    if isinstance(image, Clip):
        return Look(content, image.digest(), image.size, "RGB", False, False, not image.steady)
    image = data.decode(row, encoded)
    kind = kind_of(unmarked(encoded))
    return Look(content, pixels_digest(image), image.size, kind.mode, kind.turned, kind.animated)


def look_at_all(data: ImageData, workers: int | None) -> Looks:
    """Decode every image; those that cannot be read are noted.

    Args:
        data: the images.
        workers: decode processes; None: one per processor but one.

    Raises:
        StorageError: they cannot be read.
    """
    count = len(data)
    content, pixels = np.zeros((2, count), np.uint64)
    turned, animated, uneven = np.zeros((3, count), bool)
    sizes = np.zeros((count, 2), np.int64)
    found = Looks(data, content, pixels, sizes, turned, animated, uneven, Counter(), {})
    for row, each in enumerate(look_at_each(data, look, workers)):
        if isinstance(each, BadDataError):
            found.bad[row] = each.message
            continue
        found.content[row], found.pixels[row] = each.content, each.pixels
        found.sizes[row], found.turned[row], found.animated[row] = each.size, each.turned, each.animated
        found.uneven[row] = each.uneven
        found.modes[each.mode] += 1
    return found
