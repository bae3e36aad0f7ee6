"""Whether the cells of two models' feature maps are of the same places of an image."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from jaxtyping import Int32, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES
from kdcli.console import console
from kdcli.data.clips import TIME_NAMES
from kdcli.data.views import PARAM_NAMES
from kdcli.errors import UsageError
from kdcli.geometry import Render, largest_offset

FAR: Final = 0.5
"""Cells by which places may differ: beyond it a cell has more in common with the next one."""
_SMALL = 0.01
_CHUNK = 65536


def source_sizes(
    cache: CacheSet, rows: Int64[np.ndarray, " n"], frames: bool = False
) -> Int32[np.ndarray, "m c"]:
    """Width and height of the images of some rows as the cache recorded them; of those that could be read.

    Cache by cache: each of another recipe has columns of its own behind these.

    Args:
        cache: of images, or of clips.
        rows: of it.
        frames: how many each clip has, too.
    """
    names = ("source_width", "source_height", *(("source_frames",) if frames else ()))
    columns = [(*PARAM_NAMES, *TIME_NAMES).index(name) for name in names]
    found = [np.empty((0, len(columns)), np.int32)]
    for member, offset, stop in zip(cache.members, cache.offsets, cache.offsets[1:], strict=False):
        own = rows[(rows >= offset) & (rows < stop)] - offset
        for start in range(0, len(own), _CHUNK):
            sizes = member.gather(SAMPLES, "params", own[start : start + _CHUNK], 0)[:, columns]
            found.append(sizes[(sizes > 0).all(axis=1) & (sizes < np.iinfo(np.int32).max).all(axis=1)])
    return np.concatenate(found)


def require_same_places(
    shown: Mapping[str, Render], cells: Sequence[int], sizes: Int32[np.ndarray, "m 2"]
) -> None:
    """Refuse to compare maps cell by cell where the models were shown the images in different ways.

    Args:
        shown: what each model is shown, by what messages call it; the first one's input is the measure.
        cells: height and width of the maps.
        sizes: width and height of the images.

    Raises:
        UsageError: places are more than half a cell apart.
    """
    (first, own), *others = shown.items()
    distinct = [(int(width), int(height)) for width, height in np.unique(sizes, axis=0)]
    for name, render in others:
        share, (width, height) = largest_offset(own, render, distinct)
        apart = share * max(cells)
        where = (
            f"the maps of {first} and of {name} are up to {apart:.2g} of {max(cells)} cells apart, as on images of "
            f"{width} x {height} pixels ({first}: {own}; {name}: {render})"
        )
        if apart > FAR:
            raise UsageError(
                f"{where}, so their cells are not of the same places",
                "Cache the teachers with --eval-geometry whole: every model then sees the whole image, squeezed.",
            )
        if apart > _SMALL:
            console.note(where)
