"""Random numbers that are the same on every platform, in any order, and with any version of numpy.

Only the raw words of the Philox generator are used: those are fixed by its definition (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), while numpy may change how it maps them to
distributions. The mapping is ours, in integers.
"""

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64

WORD = 1 << 64
"""Raw words are uniform integers in [0, WORD)."""


def words(count: int, *stream: str) -> UInt64[np.ndarray, " count"]:
    """Raw words of one random stream.

    Args:
        count: how many words.
        stream: texts that name the stream; equal texts give equal words.

    Returns:
        Independent words, uniform in [0, 2**64).
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in stream:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)  # so that ("ab",) is not ("a", "b")
    generator = np.random.Philox(key=int.from_bytes(digest.digest(), "little"))
    return np.asarray(generator.random_raw(count), np.uint64)


def below(word: int, bound: int) -> int:
    """Map a raw word to an integer in [0, bound); the bias is below bound / 2**64."""
    return word * bound >> 64


def permutation(count: int, *stream: str) -> Int64[np.ndarray, " count"]:
    """A random order of ``range(count)``: the order of as many raw words."""
    return np.argsort(words(count, *stream), kind="stable")
