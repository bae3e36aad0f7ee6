"""What is on disk in a Zarr cache, as other tools see it."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
import zarr
from random_cache import Form, make

from kdcli.cache.arrays import array_extents
from kdcli.cache.commits import committed_chunks
from kdcli.cache.reader import CacheReader


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t", "u"))
    return root


def by_chunk(root: Path) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Oracle: name, place and values of every chunk, read as a file of raw rows."""
    store = CacheReader(root).store
    for extent in array_extents(store.manifest, store.load_keys(), store.teachers):
        for block, view in committed_chunks(store, extent):
            path = store.chunk(extent.part, extent.name, extent.spec, block, view)
            if store.manifest.backend == "hdf5":
                # Rows are the last bytes of such a file: headers, then one contiguous data set.
                count = extent.chunk[0] * extent.spec.row_bytes
                raw = path.read_bytes()[-count:]
            else:
                raw = path.read_bytes()[:-4]
            values = np.frombuffer(raw, extent.spec.dtype).reshape(extent.chunk[0], *extent.spec.row_shape)
            start = block * extent.chunk[0]
            rows = slice(start, min(start + extent.chunk[0], extent.shape[0]))
            place = rows if view is None else (rows, view)
            yield extent.folder, place, values[: rows.stop - start]


def require_all(root: Path, group: Any) -> set[str]:
    """Compare what a tool reads with the chunks; what is not committed must be the fill value."""
    store = CacheReader(root).store
    expected = {}
    for extent in array_extents(store.manifest, store.load_keys(), store.teachers):
        expected[extent.folder] = np.full(extent.shape, extent.spec.fill, extent.spec.dtype)
    for name, place, values in by_chunk(root):
        expected[name][place] = values
    for name, values in expected.items():
        found = group(name)
        assert (found.shape, found.dtype) == (values.shape, values.dtype), name
        assert np.asarray(found).tobytes() == values.tobytes(), name
    return set(expected)


FULL = Form(segments=(45, 40), view_groups=(1, 2), seed=1)
GAPS = Form(segments=(45, 40), view_groups=(1, 2), seed=1, missing=0.4)


@pytest.mark.parametrize("form", [FULL, GAPS], ids=["full", "gaps"])
def test_zarr_python_reads_every_array(tmp_path: Path, form: Form) -> None:
    make(tmp_path / "c.kd", form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "c.kd/data.zarr", mode="r")
        listed = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
        found = require_all(tmp_path / "c.kd", lambda name: group[name][...])
    assert listed == found
    assert group["teachers/t/maps/layer.4"].shape == (104, 3, 2, 3, 2)
    assert group["teachers/t/features"].shape == (104, 1, 4)


@pytest.mark.parametrize("form", [FULL, GAPS], ids=["full", "gaps"])
def test_tensorstore_reads_every_array(tmp_path: Path, form: Form) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="extra 'bench' is not installed")
    make(tmp_path / "c.kd", form)

    def read(name: str) -> np.ndarray:
        path = f"{tmp_path}/c.kd/data.zarr/{name}/"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        return np.asarray(tensorstore.open(spec, read=True).result().read().result())

    assert "teachers/t/topk_ids" in require_all(tmp_path / "c.kd", read)


def test_zarr_python_opens_the_group_without_a_warning_and_reads_every_value(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(cache / "data.zarr", mode="r")
        names = sorted(name for name, _ in group.members(max_depth=None))
        logits = group["teachers/t/logits"][:]
        crcs = group["samples/content_crc"][:]
        keys = bytes(group["samples/key_bytes"][:])
        labels = group["samples/labels/class"][:]
    assert "teachers/u/lse" in names
    assert "views/params" in names
    expected = np.stack([tools.logits_of("t", np.arange(100), view) for view in (0, 1)], axis=1)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(crcs, np.arange(100) * 7 + 1)
    np.testing.assert_array_equal(labels, np.arange(100) % 2)
    assert keys == "".join(f"k{row:05d}" for row in range(100)).encode()


def test_zarr_python_notices_a_flipped_bit(cache: Path) -> None:
    chunk = cache / "data.zarr/teachers/t/logits/c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[17] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(cache / "data.zarr", mode="r")["teachers/t/logits"][32:64]


def test_the_last_block_is_padded_with_the_fill_value(cache: Path) -> None:
    raw = (cache / "data.zarr/teachers/t/logits/c.3.0.0").read_bytes()[:-4]
    rows = np.frombuffer(raw, "<f2").reshape(32, 5)
    assert np.isfinite(rows[:4]).all()
    assert np.isnan(rows[4:]).all()
