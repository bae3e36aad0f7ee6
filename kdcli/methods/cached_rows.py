"""Some cached rows of a teacher: what its outputs look like, before a run begins."""

from typing import Final

import numpy as np
from jaxtyping import Float

from kdcli.methods.base import Setup

_ROWS: Final = 4096
_VALUES: Final = 2**24
_AT_ONCE: Final = 256


def some_rows(setup: Setup, teacher: str, array: str) -> Float[np.ndarray, "n ..."]:
    """Rows of at most 4096 images of a run, drawn by a fixed seed, in the views that it reads, one after the other.

    Fewer of large maps, so that they take at most 64 MB in fp32.

    Args:
        setup: with the images and the cache; those that it lacks are left out.
        teacher: its name.
        array: ``features`` or ``maps/TAP``.
    """
    data, cache = setup.data, setup.cache
    if data is None or cache is None:
        raise ValueError("this method reads a cache")
    shape = setup.teachers[teacher].array_specs()[array].row_shape
    count = min(len(data), _ROWS, max(1, _VALUES // int(np.prod(shape))))
    rows = cache.rows_of(data, check_content=False)
    chosen = rows[np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(rows))[:count])]
    usable = cache.require({teacher: (array,)}, chosen, setup.views, allow_partial=True)
    chosen = chosen[usable]
    if not len(chosen):
        return np.empty((0, *shape), np.float32)
    views = np.asarray(setup.views)[np.arange(len(chosen)) % len(setup.views)]
    found = [
        cache.gather(teacher, array, chosen[first : first + _AT_ONCE], views[first : first + _AT_ONCE])
        for first in range(0, len(chosen), _AT_ONCE)
    ]
    return np.concatenate(found).astype(np.float32)
