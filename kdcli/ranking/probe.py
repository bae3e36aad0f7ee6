"""The probe set: a few labelled images of the task, class-balanced and seeded (P2 §4.1, after Bolya et al. 2021)."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64

from kdcli.errors import BadDataError, UsageError
from kdcli.metrics.checks import check_classes

ProbeLabels: TypeAlias = "Int64[np.ndarray, ' n'] | Int64[np.ndarray, 'n l']"
"""Class index of each image, or 0/1 per image and label; -1 (throughout) for images without a label."""


def labelled_rows(labels: ProbeLabels) -> Int64[np.ndarray, " m"]:
    """Positions of the images that have labels, ascending."""
    return np.flatnonzero(labels >= 0 if labels.ndim == 1 else (labels >= 0).any(axis=1))


def select_probe(
    labels: ProbeLabels, size: int, seed: int, class_names: Sequence[str] | None = None
) -> Int64[np.ndarray, " m"]:
    """Draw a class-balanced probe set: one image of each class per round until ``size`` is reached.

    A class that runs out is skipped and the rounds go on. Where two images of each class do not fit,
    a random subset of ``size // 2`` classes is used (after Bolya et al. 2021). For one seed a larger
    probe set contains a smaller one as long as both hold all classes.

    Of images with several labels, each round takes one image that has the label and was not drawn yet.

    Args:
        labels: images without a label are never drawn.
        size: images wanted; with at least as many as are labelled, all of them are used.
        seed: of classes and images, by a counter-based generator: the same on every machine.
        class_names: names of the classes, for errors.

    Returns:
        Positions in ``labels``, ascending; at least two of each class drawn.

    Raises:
        BadDataError: no labels, one class only, or a class with a single image.
        UsageError: ``size`` does not fit two classes.
    """
    labelled = labelled_rows(labels)
    if labels.ndim == 1:
        check_classes(labels[labelled], class_names)
    elif not len(labelled):
        raise BadDataError("no image has a label", "Give labels of at least a few images.")
    if size >= len(labelled):
        return labelled
    if size < 4:
        raise UsageError(
            f"--probe-size {size} is too small: two images of two classes are the least",
            "Give --probe-size 4 or more.",
        )
    if labels.ndim == 2:
        return _rounds_over_labels(labels, labelled, size, seed)
    members = _by_class(labels, labelled)
    rng = np.random.Generator(np.random.Philox(seed))
    kept = rng.permutation(len(members))
    if 2 * len(members) > size:
        kept = kept[: size // 2]
    shares = _round_robin(np.array([len(members[c]) for c in kept]), size)
    drawn = [rng.permutation(members[c])[:share] for c, share in zip(kept, shares, strict=True)]
    return np.sort(np.concatenate(drawn))


def _rounds_over_labels(
    labels: Int64[np.ndarray, "n l"], labelled: Int64[np.ndarray, " m"], size: int, seed: int
) -> Int64[np.ndarray, " k"]:
    """Round-robin over labels. An image without any of them is drawn only when no other is left."""
    rng = np.random.Generator(np.random.Philox(seed))
    shuffled = rng.permutation(labelled)
    queues = [
        iter(shuffled[labels[shuffled, label] == 1].tolist()) for label in rng.permutation(labels.shape[1])
    ]
    drawn: dict[int, None] = {}
    while queues and len(drawn) < size:
        queues = [queue for queue in queues if _draw(queue, drawn, size)]
    rest = (row for row in shuffled.tolist() if row not in drawn)
    return np.sort(np.array([*drawn, *islice(rest, size - len(drawn))], np.int64))


def _draw(queue: Iterator[int], drawn: dict[int, None], size: int) -> bool:
    """Take the next image of a label that was not drawn; False when there is none left."""
    row = next((row for row in queue if row not in drawn), None)
    if row is not None and len(drawn) < size:
        drawn[row] = None
    return row is not None


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
