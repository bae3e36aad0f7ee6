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
        setup: with the images, all of them cached, and the cache.
        teacher: its name.
        array: ``features`` or ``maps/TAP``.
    """
    data, cache = setup.data, setup.cache
    if data is None or cache is None:
        raise ValueError("this method reads a cache")
    size = int(np.prod(setup.teachers[teacher].array_specs()[array].row_shape))
    count = min(len(data), _ROWS, max(1, _VALUES // size))
    rows = cache.rows_of(data, check_content=False)
    chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(rows))[:count])
    views = np.asarray(setup.views)[np.arange(count) % len(setup.views)]
    found = [
        cache.gather(teacher, array, rows[chosen[first : first + _AT_ONCE]], views[first : first + _AT_ONCE])
        for first in range(0, count, _AT_ONCE)
    ]
    return np.concatenate(found).astype(np.float32)
