"""The probe set: a few labelled images of the task, class-balanced and seeded (P2 §4.1, after Bolya et al. 2021)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from kdcli.errors import UsageError
from kdcli.metrics.checks import check_classes


def select_probe(
    labels: Int64[np.ndarray, " n"], size: int, seed: int, class_names: Sequence[str] | None = None
) -> Int64[np.ndarray, " m"]:
    """Draw a class-balanced probe set: one image of each class per round until ``size`` is reached.

    A class that runs out is skipped and the rounds go on. Where two images of each class do not fit,
    a random subset of ``size // 2`` classes is used (after Bolya et al. 2021). For one seed a larger
    probe set contains a smaller one as long as both hold all classes.

    Args:
        labels: class index, -1 for images without a label (never drawn).
        size: images wanted; with at least as many as are labelled, all of them are used.
        seed: of classes and images, by a counter-based generator: the same on every machine.
        class_names: names of the classes, for errors.

    Returns:
        Positions in ``labels``, ascending; at least two of each class drawn.

    Raises:
        BadDataError: no labels, one class only, or a class with a single image.
        UsageError: ``size`` does not fit two classes.
    """
    labelled = np.flatnonzero(labels >= 0)
    check_classes(labels[labelled], class_names)
    if size >= len(labelled):
        return labelled
    if size < 4:
        raise UsageError(
            f"--probe-size {size} is too small: two images of two classes are the least",
            "Give --probe-size 4 or more.",
        )
    members = _by_class(labels, labelled)
    rng = np.random.Generator(np.random.Philox(seed))
    kept = rng.permutation(len(members))
    if 2 * len(members) > size:
        kept = kept[: size // 2]
    shares = _round_robin(np.array([len(members[c]) for c in kept]), size)
    drawn = [rng.permutation(members[c])[:share] for c, share in zip(kept, shares, strict=True)]
    return np.sort(np.concatenate(drawn))


def _by_class(
    labels: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " m"]
) -> list[Int64[np.ndarray, " _"]]:
    values = labels[rows].astype(np.int32)
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    return np.split(rows[order], edges)


def _round_robin(available: Int64[np.ndarray, " c"], size: int) -> Int64[np.ndarray, " c"]:
    """How many of each class, in rounds over the classes; rounds without a class running out go at once."""
    taken = np.zeros_like(available)
    left = min(size, int(available.sum()))
    while left:
        open_classes = np.flatnonzero(taken < available)
        rounds = min(left // len(open_classes), int((available - taken)[open_classes].min()))
        chosen = open_classes if rounds else open_classes[:left]
        taken[chosen] += max(rounds, 1)
        left -= len(chosen) * max(rounds, 1)
    return taken
