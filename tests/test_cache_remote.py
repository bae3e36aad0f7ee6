"""Caches that are read where they are, in a store: the same numbers as of a folder, or a refusal that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
from conftest import Shell
from random_cache import OUTPUTS, Form, make
from store_servers import Faulty
from test_cache_stores import server, store

from kdcli import open_cache
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.stores.push import push

Kd = Callable[..., Shell]
__all__ = ["server", "store"]  # fixtures
URL = "s3://bucket/c"
ROWS = np.arange(100)
READS = {"t": ["logits"]}


@pytest.fixture(autouse=True)
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_STAGE", str(tmp_path / "stage"))
    return tmp_path / "stage"


@pytest.fixture
def cache(store: Faulty, tmp_path: Path) -> Path:
    """A cache of 100 images, which is at URL, too."""
    tools.fill(tmp_path / "c.kd", ("t", "u"))
    push(tmp_path / "c.kd", URL)
    store.seen.clear()
    return tmp_path / "c.kd"


def gets(store: Faulty, mark: str) -> list[str]:
    """Objects with a mark in their name that were asked for."""
    return [path.partition("?")[0] for method, path in store.seen if method == "GET" and mark in path]


def chunks_of(stage: Path) -> list[Path]:
    return [path for path in stage.glob("*/*/*/*/c.*") if path.is_file()] + list(
        stage.glob("*/samples/*/c.*")
    )


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_every_value_is_that_of_the_folder(store: Faulty, tmp_path: Path, backend: Any) -> None:
    form = Form((33, 20), (1, 2), (("t", tuple(OUTPUTS)), ("u.x-1", ("logits",))), backend, missing=0.3)
    make(tmp_path / "a.kd", form)
    push(tmp_path / "a.kd", "s3://bucket/deep/er")
    here, there = CacheSet.open([tmp_path / "a.kd"]), CacheSet.open(["s3://bucket/deep/er"])
    assert there.keys == here.keys
    assert there.teachers == here.teachers
    assert np.array_equal(there.labels, here.labels)
    [a], [b] = here.members, there.members
    compared = 0
    for part in a.store.parts():
        assert a.commits(part) == b.commits(part)
        for array, spec in a.specs(part).items():
            for view in range(a.store.views(part)) if spec.per_view else (0,):
                rows = np.flatnonzero(a.present(part, np.arange(a.manifest.rows), [view]))
                name = part.partition("/")[0]
                values = [each.gather(name, array, rows, view) for each in (here, there)]
                assert values[0].tobytes() == values[1].tobytes()
                compared += len(rows)
    assert compared > 500


def test_metadata_comes_at_once_and_chunks_when_they_are_read(
    store: Faulty, cache: Path, stage: Path
) -> None:
    opened = CacheSet.open([URL])
    assert not gets(store, "/teachers/t/logits/c.")
    assert opened.require(READS, ROWS[:10], [0]).all()
    assert gets(store, "/data.zarr/teachers/") == ["/bucket/c/data.zarr/teachers/t/logits/c.0.0.0"]
    assert np.array_equal(opened.gather("t", "logits", ROWS, 1), tools.logits_of("t", ROWS, 1))
    store.seen.clear()
    again = CacheSet.open([URL])
    again.require(READS, ROWS[:10], [0])
    assert np.array_equal(again.gather("t", "logits", ROWS, 1), tools.logits_of("t", ROWS, 1))
    assert gets(store, "/bucket/c/") == ["/bucket/c/manifest.json"]  # and lists


def test_open_cache(cache: Path) -> None:
    here, there = open_cache(cache), open_cache(URL)
    assert np.array_equal(here["t"].logits, there["t"].logits)
    assert there.caches.members[0].store.origin is not None
