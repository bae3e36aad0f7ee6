"""Perceptual hashes of images: 64 or 256 bits that a re-encoded or resized copy hardly changes."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import imagehash
import numpy as np
from jaxtyping import Bool, Int64, UInt64
from PIL import Image

from kdcli.data.clips import Clip
from kdcli.data.decode import pixels_digest
from kdcli.data.each import look_at_each
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError

PER_BIT = 4
"""Pixels along a side for each row of the hash: what imagehash shrinks an image to (its ``highfreq_factor``)."""
FLAT = 2
"""An image whose shrunk grays differ by no more levels (of 255) is constant: lossy files move them a little."""


@final
@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is kept of an image.

    Attributes:
        words: the hash, 64 bits a word.
        pixels: digest of its size and its RGB values.
        constant: whether it is of one gray; its hash is then the rounding of a transform of nothing.
    """

    words: UInt64[np.ndarray, " words"]
    pixels: int
    constant: bool


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fingerprints:
    """Those of a data set, in its order.

    Attributes:
        words, pixels, constant: see :class:`Fingerprint`.
        bad: rows that cannot be decoded, and why.
    """

    words: UInt64[np.ndarray, "n words"]
    pixels: UInt64[np.ndarray, " n"]
    constant: Bool[np.ndarray, " n"]
    bad: dict[int, str]

    def usable(self) -> Int64[np.ndarray, " m"]:
        """Rows that can be compared: decoded, and with contrast."""
        usable = ~self.constant
        usable[list(self.bad)] = False
        return np.flatnonzero(usable)


def fingerprint(image: Image.Image, bits: int) -> Fingerprint:
    """The perceptual hash of an image, as ``imagehash.phash`` gives it.

    Args:
        image: RGB.
        bits: a square, and a multiple of 64.
    """
    side = math.isqrt(bits)
    size = side * PER_BIT
    # phash begins with exactly this; given it, it resizes nothing.
    shrunk = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
    found = imagehash.phash(shrunk, hash_size=side, highfreq_factor=PER_BIT)
    return Fingerprint(
        np.packbits(found.hash).view(np.uint64),
        pixels_digest(image),
        bool(np.ptp(np.asarray(shrunk)) <= FLAT),
    )


def fingerprints(data: ImageData, bits: int, workers: int | None) -> Fingerprints:
    """Hash every image; those that cannot be decoded are noted and left out.

    Args:
        data: the images.
        bits: of the hash.
        workers: decode processes; None: one per processor but one.

    Raises:
        StorageError: they cannot be read.
    """
    found = Fingerprints(
        np.zeros((len(data), bits // 64), np.uint64),
        np.zeros(len(data), np.uint64),
        np.zeros(len(data), bool),
        {},
    )
    for row, each in enumerate(look_at_each(data, partial(_fingerprint, bits=bits), workers)):
        if isinstance(each, BadDataError):
            found.bad[row] = each.message
            continue
        found.words[row], found.pixels[row], found.constant[row] = each.words, each.pixels, each.constant
    return found


def _fingerprint(data: ImageData, row: int, bits: int) -> Fingerprint:
    picture = data.picture(row, data.encoded(row), "exact")
    if isinstance(
        picture, Clip
    ):  # its first, middle and last frame are like another's; it is another's by all frames
        return replace(fingerprint(picture.strip(), bits), pixels=picture.digest())
    return fingerprint(data.image(row), bits)
