"""Perceptual hashes of images: 64 or 256 bits that a re-encoded or resized copy hardly changes."""

import hashlib
import math
from dataclasses import dataclass
from typing import final

import imagehash
import numpy as np
from jaxtyping import Bool, Int64, UInt64
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError, KdError
from kdcli.runtime import worker_count
from kdcli.workers import Watched, worker_setup

BATCH = 64
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
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=8)
    digest.update(image.tobytes())
    return Fingerprint(
        np.packbits(found.hash).view(np.uint64),
        int.from_bytes(digest.digest()),
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
    processes = worker_count(workers)
    loader: DataLoader[Fingerprint | KdError] = DataLoader(
        _Images(data, bits),
        batch_size=BATCH,
        num_workers=processes,
        worker_init_fn=worker_setup(processes),
        collate_fn=_as_list,
    )
    row = 0
    with console.progress(len(data), "images", str(data.spec)) as bar:
        for batch in Watched(loader):
            for each in batch:
                match each:
                    case Fingerprint():
                        found.words[row], found.pixels[row] = each.words, each.pixels
                        found.constant[row] = each.constant
                    case BadDataError():
                        found.bad[row] = each.message
                    case _:
                        raise each
                row += 1
            bar.advance(len(batch))
    return found


@final
class _Images(Dataset[Fingerprint | KdError]):
    """Fingerprints by row; an error is handed over, as one raised in a worker would arrive without its hint."""

    def __init__(self, data: ImageData, bits: int) -> None:
        self._data, self._bits = data, bits

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Fingerprint | KdError:
        try:
            return fingerprint(self._data.image(row), self._bits)
        except KdError as error:
            return error


def _as_list(batch: list[Fingerprint | KdError]) -> list[Fingerprint | KdError]:
    return batch
