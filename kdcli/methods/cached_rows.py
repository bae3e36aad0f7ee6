"""Some cached rows of a teacher: what its outputs look like, before a run begins."""

from typing import Final

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError
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


def require_varying(setup: Setup, teacher: str, array: str) -> None:
    """Refuse a teacher that says the same of every image: :func:`some_rows` tells.

    Raises:
        BadDataError: it does.
    """
    rows = some_rows(setup, teacher, array)
    if len(rows) > 1:
        mean_variance(rows.reshape(len(rows), -1), teacher, array)


def mean_variance(columns: Float[np.ndarray, "n c"], teacher: str, array: str) -> float:
    """Variance (n - 1) of the columns, their mean, > 0.

    Args:
        columns: of a teacher's output.
        teacher: its name, for the message.
        array: what it is.

    Raises:
        BadDataError: all rows are the same.
    """
    exact: Float64[np.ndarray, "n c"] = columns.astype(np.float64)
    variance, size = float(exact.var(axis=0, ddof=1).mean()), float(np.square(exact).mean())
    if not variance > 1e-12 * size:
        raise BadDataError(
            f"the {array} of '{teacher}' are the same for all images: there is nothing to learn from them",
            "Look at the teacher's weights and preprocessing; kd cache info shows what was cached.",
        )
    return variance
