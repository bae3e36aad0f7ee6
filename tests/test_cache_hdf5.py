"""What is on disk in an HDF5 cache, as other tools see it: chunk files, and the index over them."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import cache_tools as tools
import h5py
import numpy as np
import pytest
from random_cache import Form, make
from test_cache_zarr import require_all

from kdcli.cache.commits import read_commits
from kdcli.cache.hdf5_index import write_index
from kdcli.cache.layout import Layout, load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter

FULL = Form(segments=(45, 40), view_groups=(1, 2), backend="hdf5", seed=1)
GAPS = replace(FULL, missing=0.4)


def finished(root: Path, form: Form) -> Path:
    """A cache with an index of what it holds now, also of parts that are not complete."""
    make(root, form)
    write_index(CacheReader(root).store)
    return root


@pytest.mark.parametrize("form", [FULL, GAPS], ids=["full", "gaps"])
def test_h5py_reads_every_array_through_the_index(tmp_path: Path, form: Form) -> None:
    root = finished(tmp_path / "c.kd", form)
    with h5py.File(root / "index.h5", "r") as file:
        found = require_all(root, lambda name: file[name][...])
        listed: set[str] = set()
        file.visititems(lambda name, node: listed.add(name) if isinstance(node, h5py.Dataset) else None)
        assert file["teachers/t/maps/layer.4"].shape == (104, 3, 2, 3, 2)
        assert file["teachers/t/topk_ids"].dtype == np.uint16
    assert listed == found


def test_the_values_are_those_of_the_zarr_cache(tmp_path: Path) -> None:
    finished(tmp_path / "h.kd", FULL)
    make(tmp_path / "z.kd", replace(FULL, backend="zarr"))
    with h5py.File(tmp_path / "h.kd/index.h5", "r") as file:
        names = require_all(tmp_path / "z.kd", lambda name: file[name][...])
    assert {"samples/labels/class", "teachers/t/topk_ids", "teachers/t/maps/layer.4", "views/params"} <= names


@pytest.mark.parametrize("form", [FULL, GAPS], ids=["full", "gaps"])
def test_h5dump_reads_every_array_through_the_index(tmp_path: Path, form: Form) -> None:
    if shutil.which("h5dump") is None:
        pytest.skip("h5dump is not installed (hdf5-tools)")
    root = finished(tmp_path / "c.kd", form)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with h5py.File(root / "index.h5", "r") as file:
        forms = {}
        file.visititems(
            lambda name, node: (
                forms.update({name: (node.shape, node.dtype)}) if isinstance(node, h5py.Dataset) else None
            )
        )

    def read(name: str) -> np.ndarray:
        target = elsewhere / "values.bin"
        target.unlink(missing_ok=True)
        command = ["h5dump", "-d", f"/{name}", "-b", "FILE", "-o", target, root / "index.h5"]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
        assert not done.stderr
        shape, dtype = forms[name]
        return np.fromfile(target, dtype).reshape(shape)

    assert "teachers/t/maps/layer.4" in require_all(root, read)


def test_an_index_is_made_when_a_part_is_complete(tmp_path: Path) -> None:
    make(tmp_path / "c.kd", FULL)
    with h5py.File(tmp_path / "c.kd/index.h5", "r") as file:
        require_all(tmp_path / "c.kd", lambda name: file[name][...])


def test_the_index_moves_with_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = finished(tmp_path / "c.kd", FULL)
    (tmp_path / "there").mkdir()
    root.rename(tmp_path / "there/d.kd")
    monkeypatch.chdir(tmp_path)
    with h5py.File(tmp_path / "there/d.kd/index.h5", "r") as file:
        require_all(tmp_path / "there/d.kd", lambda name: file[name][...])


def sources(root: Path, name: str) -> set[str]:
    with h5py.File(root / "index.h5", "r") as file:
        return {Path(source.file_name).name for source in file[name].virtual_sources()}


def test_what_is_missing_or_not_committed_is_not_in_the_index(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t",), backend="hdf5")
    chunks = {f"c.{block}.{view}.h5" for block in range(4) for view in range(2)}
    assert sources(root, "teachers/t/logits") == chunks
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.withdraw(read_commits(Layout(root), "t/logits")[1, 0])  # its file stays
        (root / "data.hdf5/teachers/t/logits/c.2.1.h5").unlink()  # its record stays
        write_index(writer.store)
    assert sources(root, "teachers/t/logits") == chunks - {"c.1.0.h5", "c.2.1.h5"}
    with h5py.File(root / "index.h5", "r") as file:
        logits = file["teachers/t/logits"][...]
    assert np.isnan(logits[32:64, 0]).all()
    assert np.isfinite(logits[32:64, 1]).all()


def test_a_chunk_file_is_one_contiguous_data_set(tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", ("t",), backend="hdf5")
    with h5py.File(tmp_path / "c.kd/data.hdf5/teachers/t/logits/c.1.1.h5", "r") as file:
        assert list(file) == ["data"]
        assert file["data"].chunks is None
        np.testing.assert_array_equal(file["data"][...], tools.logits_of("t", np.arange(32, 64), 1))
        assert file["data"].id.get_offset() % 64 == 0
