"""What is on disk in a Zarr cache, as other tools see it."""

import warnings
from pathlib import Path

import cache_tools as tools
import numpy as np
import pytest
import zarr


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t", "u"))
    return root


def test_zarr_python_opens_the_group_without_a_warning_and_reads_every_value(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(cache / "data.zarr", mode="r")
        names = sorted(name for name, _ in group.members(max_depth=None))
        logits = group["teachers/t/logits"][:]
        crcs = group["samples/content_crc"][:]
        keys = bytes(group["samples/key_bytes"][:])
    assert "teachers/u/lse" in names
    assert "views/params" in names
    expected = np.stack([tools.logits_of("t", np.arange(100), view) for view in (0, 1)], axis=1)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(crcs, np.arange(100) * 7 + 1)
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
