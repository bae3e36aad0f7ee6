"""Which images something was made on: eight bytes an image, so that a document can name thousands of them."""

import base64
import binascii

import numpy as np
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES


def fingerprints(cache: CacheSet, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """A 63-bit number of each image's key and recorded bytes (crc32c); images without a record are left out.

    The key alone would not do: folders of training and test images often name theirs alike.
    """
    written = np.zeros(len(rows), bool)
    for member, start, stop in zip(cache.members, cache.offsets, cache.offsets[1:], strict=False):
        mine = (rows >= start) & (rows < stop)
        written[mine] = member.present(SAMPLES, rows[mine] - start, [0])
    rows = rows[written]
    return np.asarray(cache.keys.select(rows).hashes() ^ (cache.content(rows)[1] << 31))


def pack(values: Int64[np.ndarray, " n"]) -> str:
    """Sorted, little-endian, as base64: 11 characters an image."""
    return base64.b64encode(np.unique(values).astype("<i8").tobytes()).decode()


def unpack(text: str) -> Int64[np.ndarray, " n"]:
    """Undo :func:`pack`.

    Raises:
        ValueError: it is no such text.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error
    if not raw or len(raw) % 8:
        raise ValueError(f"{len(raw)} bytes, not eight an image")
    return np.frombuffer(raw, "<i8").astype(np.int64)
