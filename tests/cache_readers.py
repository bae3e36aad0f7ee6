"""What reads a cache in other processes: a data set for a DataLoader, and students of their own."""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np

from kdcli.cache.cacheset import CacheSet


class Batches:
    """Batches of cached logits of both views, as a worker reads them, and how many files it has open."""

    def __init__(self, cache: CacheSet, batch: int = 50) -> None:
        self._cache, self._batch = cache, batch

    def __len__(self) -> int:
        return -(-len(self._cache.labels) // self._batch)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        if number >= len(self):
            raise IndexError
        rows = np.random.default_rng(0).permutation(len(self._cache.labels))
        rows = rows[number * self._batch : (number + 1) * self._batch]
        values = [self._cache.gather("t", "logits", rows, view) for view in (0, 1)]
        return rows, np.stack(values, axis=1), open_files()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def read_all(
    cache: CacheSet, start: str, workers: int, epochs: int = 1
) -> list[list[tuple[np.ndarray, np.ndarray, int]]]:
    """Every batch of every epoch, through a real DataLoader."""
    from torch.utils.data import DataLoader

    from kdcli.workers import worker_init

    loader: Any = DataLoader(
        Batches(cache),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
        worker_init_fn=worker_init,
        persistent_workers=True,
        collate_fn=_unchanged,
    )
    return [list(loader) for _ in range(epochs)]


def _unchanged(batch: Any) -> Any:
    return batch


def require_oracle(rows: np.ndarray, values: np.ndarray) -> None:
    """Compare [b, 2, 5] logits of teacher t with what it says."""
    for view in (0, 1):
        np.testing.assert_array_equal(values[:, view], tools.logits_of("t", rows, view))


def load(root: Path, start: str, workers: int) -> None:
    """Read the cache twice with workers; nobody may hold many files open."""
    cache = CacheSet.open([root])
    for batches in read_all(cache, start, workers, epochs=2):
        for rows, values, files in batches:
            require_oracle(rows, values)
            assert files < 100, files
        assert sorted(np.concatenate([rows for rows, _, _ in batches])) == list(range(len(cache.labels)))


def study(root: Path, stop: Path) -> None:
    """Read teacher t with one open cache until ``stop`` appears; say how many batches that were."""
    cache, draw, batches = CacheSet.open([root]), np.random.default_rng(os.getpid()), 0
    print("ready", flush=True)
    while not stop.exists() or batches < 10:
        rows = draw.integers(0, len(cache.labels), 64)
        require_oracle(rows, np.stack([cache.gather("t", "logits", rows, view) for view in (0, 1)], axis=1))
        assert tuple(cache.teachers) == ("t",)
        batches += 1
        time.sleep(0.001)
    print(batches)


if __name__ == "__main__":
    what, root, *rest = sys.argv[1:]
    if what == "study":
        study(Path(root), Path(rest[0]))
    if what == "load":
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        load(Path(root), rest[0], 8)
    if what == "stage":
        from kdcli.cache.needs import Needs
        from kdcli.cache.staging import stage

        cache = CacheSet.open([Path(root)])
        rows = np.arange(len(cache.labels))
        print("ready", flush=True)
        sys.stdin.readline()
        stage(cache, Needs({"t": ["logits"]}, rows, (0, 1)), Path(rest[0]))
        require_oracle(rows, np.stack([cache.gather("t", "logits", rows, view) for view in (0, 1)], axis=1))
    if what == "nobody":
        load(Path(root), "fork", 2)  # imports everything while the interpreter's files can be read
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        cache = CacheSet.open([Path(root)])
        cache.require({"t": ["logits"]}, np.arange(len(cache.labels)), [0, 1])
        load(Path(root), "fork", 2)
