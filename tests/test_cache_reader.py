"""Reading as students do: DataLoader workers, few descriptors, read-only caches, many readers and a writer."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cache_readers as readers
import cache_tools as tools
import numpy as np
import pytest

from kdcli.cache import reader as reader_module
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import BackendName, Unit, load_manifest
from kdcli.cache.memory import map_bytes
from kdcli.cache.provenance import OutputRecord
from kdcli.cache.reader import CacheReader, disk_reads
from kdcli.cache.writer import CacheWriter
from kdcli.errors import CacheMissingError, StorageError

ROWS = 1200


@pytest.fixture(params=["zarr", "hdf5"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.fixture(scope="module")
def caches() -> Iterator[Path]:
    """Caches of both backends that another user can reach; pytest's own folders are the user's."""
    with tempfile.TemporaryDirectory(prefix="kd-readers-") as folder:
        Path(folder).chmod(0o755)
        for name in ("zarr", "hdf5"):
            tools.fill(Path(folder) / name, ("t",), ROWS, backend=name)  # type: ignore[arg-type]
        yield Path(folder)


@pytest.fixture
def cache(caches: Path, backend: BackendName) -> Path:
    return caches / backend


def script(*arguments: object, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, readers.__file__, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**pipes, **options})  # type: ignore[call-overload, no-any-return]


def succeed(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# --- workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_either_start_method_read_the_same(cache: Path, start: str) -> None:
    opened = CacheSet.open([cache])
    opened.gather("t", "logits", np.asarray([3]))  # mapped before the workers start
    (batches,) = readers.read_all(opened, start, 2)
    for rows, values, _ in batches:
        readers.require_oracle(rows, values)
    assert sum(len(rows) for rows, _, _ in batches) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_eight_workers_read_within_256_descriptors(caches: Path, start: str) -> None:
    chunks = list((caches / "zarr").rglob("c.*"))
    assert len(chunks) > 256
    succeed(script("load", caches / "zarr", start))


def test_maps_hold_no_descriptor(cache: Path) -> None:
    reader = CacheReader(cache)
    reader.gather("t", "logits", np.asarray([0]), 1)  # opens what only has to be opened once
    before = readers.open_files()
    for view in (0, 1):
        reader.gather("t", "logits", np.arange(ROWS), view)
    assert len(reader._maps) > 64
    assert readers.open_files() == before


def test_a_pickled_reader_carries_no_map(cache: Path) -> None:
    opened = CacheSet.open([cache])
    opened.gather("t", "logits", np.arange(ROWS))
    twin = pickle.loads(pickle.dumps(opened))
    assert not twin.members[0]._maps
    np.testing.assert_array_equal(
        twin.gather("t", "logits", np.arange(9)), tools.logits_of("t", np.arange(9), 0)
    )


# --- maps --------------------------------------------------------------------------------------


def test_a_map_is_read_only_outlives_its_file_and_refuses_what_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(200)) * 100)
    mapped = map_bytes(path, 20000)[5:9]
    path.unlink()
    assert mapped.tolist() == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    with pytest.raises(FileNotFoundError):
        map_bytes(path, 1)
    with pytest.raises(OSError, match="Invalid argument"):
        map_bytes(Path(__file__), 0)


def test_a_map_ends_with_its_last_array(tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")

    path = tmp_path / "x"
    path.write_bytes(b"abc")
    values = map_bytes(path, 3)[1:]
    assert mapped()
    del values
    assert not mapped()


def test_rows_are_asked_for_ahead_only_while_the_disk_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reader_module, "prefetch", lambda _, places: asked.append(len(places)))
    counts = iter([0, 0, 0, 0, 0, 1, 1, 1])  # before and after each gather: the third one reads the disk
    monkeypatch.setattr(reader_module, "disk_reads", lambda: next(counts))
    reader, rows = CacheReader(cache), np.arange(0, ROWS, 7)
    seen = []
    for _ in range(4):
        np.testing.assert_array_equal(reader.gather("t", "logits", rows), tools.logits_of("t", rows, 0))
        seen.append(sum(asked))
        asked.clear()
    assert seen == [len(rows), 0, 0, len(rows)]


def test_rows_that_are_not_in_memory_are_read_right(cache: Path) -> None:
    for path in cache.rglob("c.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    reader, rows = CacheReader(cache), np.random.default_rng(0).permutation(ROWS)
    before = disk_reads()
    np.testing.assert_array_equal(reader.gather("t", "logits", rows, 1), tools.logits_of("t", rows, 1))
    assert disk_reads() >= before


def test_a_view_that_the_cache_does_not_have_is_refused(cache: Path) -> None:
    reader, rows = CacheReader(cache), np.asarray([0, 1])
    for view in (2, np.asarray([0, 2])):
        with pytest.raises(CacheMissingError, match="no view 2"):
            reader.gather("t", "logits", rows, view)
    assert reader.gather("samples", "content_size", rows, 0).tolist() == [100, 101]


# --- other users, other processes ---------------------------------------------------------------


def read_only(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_cache_is_read_by_a_user_who_may_not_write_it(caches: Path, backend: BackendName) -> None:
    root = caches / f"{backend}-read-only"
    shutil.copytree(caches / backend, root)
    shutil.rmtree(root / "verified")
    read_only(root)
    before = sorted(root.rglob("*"))
    if os.geteuid() == 0:
        home = caches / "nowhere"
        succeed(script("nobody", root, env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)}))
    else:
        opened = CacheSet.open([root])
        opened.require({"t": ["logits"]}, np.arange(ROWS), [0, 1])
        readers.load(root, "fork", 2)
    assert sorted(root.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_chunk_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd")
    for path in (tmp_path / "c.kd").rglob("c.*"):
        if "logits" in str(path):
            path.chmod(0)
    with pytest.raises(StorageError, match="Permission denied"):
        CacheReader(tmp_path / "c.kd").gather("t", "logits", np.asarray([0]))


@pytest.mark.slow
def test_eight_students_read_on_while_a_writer_adds_a_teacher(tmp_path: Path, backend: BackendName) -> None:
    root, stop = tmp_path / "c.kd", tmp_path / "stop"
    tools.fill(root, ("t",), 300, backend=backend)
    students = [script("study", root, stop) for _ in range(8)]
    for student in students:
        assert student.stdout is not None
        assert student.stdout.readline() == "ready\n"
    tools.fill(root, ("t", "u"), 300, pause=0.01, backend=backend)
    stop.touch()
    for student in students:
        assert int(succeed(student)) >= 10
    rows = np.arange(300)
    np.testing.assert_array_equal(
        CacheReader(root).gather("u", "logits", rows, 1), tools.logits_of("u", rows, 1)
    )


def test_a_kind_that_is_added_does_not_disturb_an_open_reader(tmp_path: Path, backend: BackendName) -> None:
    root, rows = tmp_path / "c.kd", np.arange(100)
    tools.fill(root, backend=backend)
    before = CacheSet.open([root])
    expected = before.gather("t", "logits", rows, 1)
    features = OutputRecord(kind="features", arrays={"features": {"row_shape": [3], "dtype": "<f2"}})
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.add_teacher(tools.record_of("t", outputs={**tools.outputs_of(), "features": features}))
        for block, group in writer.store.units_of("t/features"):
            inside = writer.manifest.rows_of(block)
            values = np.repeat(np.arange(inside.start, inside.stop, dtype=np.float16), 3).reshape(-1, 1, 3)
            content = tools.unit_arrays(writer.manifest, Unit("t/logits", block, group))[1]
            writer.publish(Unit("t/features", block, group), {"features": values}, content, [], {}, 0.0)
            np.testing.assert_array_equal(before.gather("t", "logits", rows, 1), expected)
        writer.finish("t/features")
    before.require({"t": ["logits"]}, rows, [0, 1])
    with pytest.raises(CacheMissingError, match="not features"):
        before.gather("t", "features", rows)
    after = CacheSet.open([root]).gather("t", "features", rows, 1)
    np.testing.assert_array_equal(after, np.repeat(rows, 3).reshape(-1, 3).astype(np.float16))
