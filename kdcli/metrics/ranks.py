"""Spearman's rank correlation of whole numbers, exact but for the last division.

Of one class per image scipy's ``spearmanr`` gives the same, but ranks both sides of millions of pairs in floats: here
the numbers are sorted in place, in parts, on all threads, and labels need no ranks at all (four times as fast).
"""

import math
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from kdcli.errors import BadDataError
from kdcli.metrics.threads import parallel_map

_CHUNK = 1 << 16
"""Numbers at a time: what is made of them stays in the processor's cache."""


def spearman_of_groups(tagged: Int64[np.ndarray, " pairs"], front: int) -> float:
    """Spearman correlation of distances with 0 for pairs of one class and 1 for the others.

    With two groups it depends only on the rank sum R of one of them: cov = (front (N+1)/2 - R) / N.
    Twice a mid-rank is a whole number, so everything up to the last line is exact.

    Args:
        tagged: twice the distance, plus 1 in the second group; sorted in place.
        front: size of the first group, 0 < front < N.

    Returns:
        A correlation in [-1, 1].

    Raises:
        BadDataError: all distances are equal.
    """
    count = len(tagged)
    with parallel_map(math.ceil(count / _CHUNK)) as (over, threads):
        cuts = [count * part // threads for part in range(threads + 1)]
        if threads > 1:
            tagged.partition(cuts[1:-1])
        list(over(np.ndarray.sort, [tagged[low:high] for low, high in pairwise(cuts)]))
        starts = range(0, count, _CHUNK)
        found = list(over(lambda start: _look_at(tagged, start), starts))
    rank_sum_twice = sum(2 * ranks for ranks, _ in found)
    first, size = _runs(np.concatenate([equal for _, equal in found]))
    same = np.searchsorted(tagged, tagged[first] | 1) - first  # within a run the first group comes first
    rank_sum_twice += int((same * (size - same)).sum())
    groups = front * (count - front) / count
    score: float = (front * (count + 1) - rank_sum_twice) / 2 / math.sqrt(_rank_spread(count, size) * groups)
    return min(1.0, max(-1.0, score))


def spearman(a: Float64[np.ndarray, " pairs"], b: Float64[np.ndarray, " pairs"]) -> float:
    """Spearman correlation of two ``centred_ranks``, in [-1, 1]."""
    score = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return min(1.0, max(-1.0, score))


def centred_ranks(keys: Int64[np.ndarray, " pairs"]) -> Float64[np.ndarray, " pairs"]:
    """Mid-ranks (equal numbers share the mean of their ranks) minus the mean rank.

    Raises:
        BadDataError: all numbers are equal.
    """
    from scipy.stats import rankdata  # takes half a second to load, and most metrics need none of it

    if keys.min() == keys.max():
        raise _nothing_to_rank()
    return np.asarray(rankdata(keys) - (len(keys) + 1) / 2)


def _look_at(tagged: Int64[np.ndarray, " pairs"], start: int) -> tuple[int, Int64[np.ndarray, " _"]]:
    """Sum of the first group's ranks in one chunk (ties in order), and where the next distance is equal."""
    chunk = tagged[start : start + _CHUNK + 1]
    front = np.flatnonzero((chunk[:_CHUNK] & 1) == 0)
    distances = chunk >> 1
    equal = np.flatnonzero(distances[1:] == distances[:-1])
    return int(front.sum()) + len(front) * (start + 1), equal + start


def _runs(
    equal: Int64[np.ndarray, " _"],
) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """First position and length of each run of equal numbers, from the positions equal to their next."""
    gaps = np.flatnonzero(np.diff(equal) != 1)
    first = equal[np.concatenate([[0], gaps + 1])] if len(equal) else equal
    last = equal[np.concatenate([gaps, [len(equal) - 1]])] if len(equal) else equal
    return first, last - first + 2


def _rank_spread(count: int, run_sizes: Int64[np.ndarray, " runs"]) -> float:
    """Sum of squares of centred mid-ranks: (N^3 - N - sum over ties of (t^3 - t)) / 12."""
    sizes, times = np.unique(run_sizes, return_counts=True)
    ties: int = sum(
        how_many * (size**3 - size)  # beyond 64 bits, so in Python's whole numbers
        for size, how_many in zip(sizes.tolist(), times.tolist(), strict=True)
    )
    if ties == count**3 - count:
        raise _nothing_to_rank()
    return float(count**3 - count - ties) / 12


def _nothing_to_rank() -> BadDataError:
    return BadDataError(
        "all images are equally far apart in this representation, so there is nothing to rank",
        "Use more images or another representation.",
    )
