"""``--bad-images drop``: data sets of a run without the images that cannot be read.

They are found before anything is trained, so that a run is what it would be on data without them, whatever the order
and the number of processes; and a run that goes on leaves out what it left out when it began.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Bool

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES
from kdcli.cache.matching import find_places
from kdcli.console import console
from kdcli.data.each import look_at_each
from kdcli.data.sources import ImageData
from kdcli.data.spec import ClassSubset
from kdcli.data.without import lost_classes
from kdcli.errors import BadDataError
from kdcli.training.sets import OpenData

Dropped = Mapping[str, Mapping[str, str]]
"""Why images are left out: location of the data set -> key -> reason."""


@final
class Readable:
    """Opens data sets, without the images that cannot be read.

    Args:
        opened: opens each.
        find: as :func:`unreadable`, with the number of decode processes and a cache.
        known: what was left out when the run began; those data sets are not looked at again.

    Attributes:
        dropped: what was left out.
    """

    def __init__(self, opened: OpenData, find: Callable[[ImageData], dict[str, str]], known: Dropped) -> None:
        self._opened, self._find, self._known = opened, find, known
        self.dropped: dict[str, dict[str, str]] = {}

    def __call__(self, spec: str, **how: Any) -> ImageData:
        """Open a data set.

        Raises:
            BadDataError: no image of it, or of one of its classes, can be read.
            KdError: see :func:`~kdcli.data.sources.open_data`.
        """
        data: ImageData = self._opened(spec, **how)
        known = self._known.get(data.location)
        bad = self._find(data) if known is None else dict(known)
        self.dropped[data.location] = bad
        if not bad:
            return data
        reason = next(iter(bad.values()))
        if len(bad) == len(data):
            raise BadDataError(
                f"none of the {len(data)} images of {spec} can be read, first {reason}",
                "Look at it: kd data check DATA",
            )
        rows = [row for row, own in enumerate(data.keys) if own in bad]
        if lost := lost_classes(data.labels, data.class_names, rows):
            raise BadDataError(
                f"{spec}: {len(bad)} of {len(data)} images cannot be read, all of class {', '.join(lost)} among them, "
                f"first {reason}",
                f"Restore the images, or leave the class out with DATA@classes={ClassSubset('except', names=lost)}.",
            )
        console.warn(
            f"{spec}: {len(bad)} of {len(data)} images cannot be read and are left out, such as {reason}"
        )
        return data.select(np.setdiff1d(np.arange(len(data)), rows))


def unreadable(data: ImageData, workers: int | None, cache: CacheSet | None = None) -> dict[str, str]:
    """Keys of the images that cannot be read, and why.

    Args:
        data: the images.
        workers: decode processes; None: one per processor but one.
        cache: images that it holds outputs of were read, and their bytes are compared whenever they are used.
    """
    rows = np.arange(len(data)) if cache is None else np.flatnonzero(~_vouched(data, cache))
    if not len(rows):
        return {}
    some = data.select(rows)
    seen = look_at_each(some, _decode, workers)
    return {some.keys[row]: each.message for row, each in enumerate(seen) if each is not None}


def _decode(data: ImageData, row: int) -> None:
    data.image(row)


def _vouched(data: ImageData, cache: CacheSet) -> Bool[np.ndarray, " n"]:
    """Which images were read when the cache was made."""
    known = np.zeros(len(data), bool)
    for member in cache.members:
        if not member.knows(SAMPLES):
            continue
        rows = find_places(member, data, np.arange(len(data)))
        places = np.flatnonzero(rows >= 0)
        absent = np.fromiter(member.absent(SAMPLES), np.int64)
        sound = member.present(SAMPLES, rows[places], [0]) & ~np.isin(rows[places], absent)
        known[places[sound]] = True
    return known
