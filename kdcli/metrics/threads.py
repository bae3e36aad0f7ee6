"""As many blocks of work at a time as the linear algebra library may use threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

Map = Callable[..., Iterable[Any]]
"""Like the built-in ``map``: a function and its arguments, results in order."""


@contextmanager
def parallel_map(tasks: int) -> Iterator[tuple[Map, int]]:
    """A ``map`` over blocks, each of them on one thread, and how many run at a time.

    A matrix product alone would use all threads, but what comes after it (rounding, ranking) is numpy on
    one. Whole blocks in parallel keep all threads busy, and results do not depend on their number.

    Args:
        tasks: how many blocks there are; for one, nothing is started.
    """
    blas = _controller().select(user_api="blas")
    threads = min([tasks, *(library["num_threads"] for library in blas.info())]) if blas.info() else 1
    if threads < 2:
        yield map, 1
        return
    with blas.limit(limits=1), ThreadPoolExecutor(threads) as pool:
        yield pool.map, threads


@cache
def _controller() -> Any:
    return ThreadpoolController()  # looks through all loaded libraries: once is enough
