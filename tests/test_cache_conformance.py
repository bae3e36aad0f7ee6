"""One suite for both backends, without images: layout, reading, refusal, crashes, several writers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cache_tools as tools
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.claims import Claims
from kdcli.cache.layout import BackendName, Layout, Unit, choose_block_rows, load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part
from kdcli.cache.writer import CacheWriter
from kdcli.errors import (
    CacheMissingError,
    CorruptError,
    IdentityError,
    KdError,
    OutputExistsError,
    StorageError,
)


@pytest.fixture(params=["zarr", "hdf5"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.fixture
def cache(tmp_path: Path, backend: BackendName) -> Path:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t", "u"), backend=backend)
    return root


def chunk_of(root: Path, array: str, block: int, view: int) -> Path:
    store = CacheReader(root).store
    part = f"t/{array}"
    return store.chunk(part, array, store.specs(part)[array], block, view)


READS = {"t": ["logits"]}


@pytest.fixture(autouse=True)
def own_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


# --- what is on disk ---------------------------------------------------------------------------


def test_nothing_but_arrays_lies_in_the_group_and_nothing_in_tmp(cache: Path) -> None:
    for path in next(cache.glob("data.*")).rglob("*"):
        assert path.is_dir() or path.name == "zarr.json" or path.name.startswith("c.")
    assert not list((cache / "tmp").iterdir())
    assert not [path for path in (cache / "claims").rglob("*") if path.is_file()]


def test_records_of_a_finished_part_are_one_file(cache: Path) -> None:
    assert sorted(
        str(path.relative_to(cache / "commits")) for path in (cache / "commits").rglob("*") if path.is_file()
    ) == ["samples.jsonl", "t/logits.jsonl", "t/stats.jsonl", "u/logits.jsonl", "u/stats.jsonl"]
    assert len((cache / "commits/t/logits.jsonl").read_text().splitlines()) == 8


@given(rows=st.integers(1, 10**7), row_bytes=st.integers(1, 10**7))
def test_blocks_are_a_multiple_of_32_at_most_4096_rows_and_at_least_16_from_512_rows_on(
    rows: int, row_bytes: int
) -> None:
    block = choose_block_rows(rows, row_bytes)
    assert block % 32 == 0
    assert 32 <= block <= 4096
    assert rows < 512 or -(-rows // block) >= 16
    assert block == 32 or block * row_bytes <= 32 * 2**20


# --- reading -----------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1)), max_size=60))
def test_gather_gives_any_rows_and_views_in_any_order(cache: Path, asked: list[tuple[int, int]]) -> None:
    rows = np.asarray([row for row, _ in asked], np.int64)
    views = np.asarray([view for _, view in asked], np.int64)
    found = CacheReader(cache).gather("t", "logits", rows, views)
    expected = [tools.logits_of("t", np.asarray([row]), view)[0] for row, view in asked]
    np.testing.assert_array_equal(found, np.asarray(expected, np.float16).reshape(-1, 5))


def test_few_maps_are_kept_open(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.cache.reader.max_maps", lambda: 2)
    reader = CacheReader(cache)
    rows = np.arange(100)
    expected = tools.logits_of("t", rows, 0)
    np.testing.assert_array_equal(reader.gather("t", "logits", rows), expected)
    assert len(reader._maps) == 2


def test_several_caches_read_as_one(tmp_path: Path, backend: BackendName) -> None:
    for name, rows in (("a", 50), ("b", 70)):
        tools.fill(tmp_path / name, ("t",), rows, backend=backend)
    both = CacheSet.open([tmp_path / "a", tmp_path / "b"])
    rows = np.asarray([0, 49, 50, 119, 3])
    local = np.asarray([0, 49, 0, 69, 3])
    np.testing.assert_array_equal(both.gather("t", "logits", rows, 1), tools.logits_of("t", local, 1))
    np.testing.assert_array_equal(both.labels[rows], local % 2)


def test_a_row_that_is_not_written_is_never_a_row_of_zeros(tmp_path: Path, backend: BackendName) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, backend=backend)
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t"))
    with pytest.raises(CacheMissingError):
        CacheReader(root).gather("t", "logits", np.asarray([5]))
    with pytest.raises(CacheMissingError, match="100 of 100 rows") as caught:
        CacheSet.open([root]).require(READS, np.arange(100), [0])
    assert "kd cache-teachers" in caught.value.hint


# --- what is refused ---------------------------------------------------------------------------


def damage(root: Path, what: str) -> None:
    chunk = chunk_of(root, "logits", 1, 1)
    match what:
        case "flip":
            data = bytearray(chunk.read_bytes())
            data[random.Random(1).randrange(len(data))] ^= 4
            chunk.write_bytes(data)
        case "truncate":
            chunk.write_bytes(chunk.read_bytes()[:-10])
        case "remove":
            chunk.unlink()
        case "swap":
            other = chunk_of(root, "logits", 2, 1)
            mine, theirs = chunk.read_bytes(), other.read_bytes()
            chunk.write_bytes(theirs)
            other.write_bytes(mine)
        case "keys":
            (path,) = next(root.glob("data.*")).glob("samples/key_bytes/c.0*")
            path.write_bytes(path.read_bytes().replace(b"k00007", b"k00107"))
        case "labels":
            (path,) = next(root.glob("data.*")).glob("samples/labels/class/c.0*")
            data = bytearray(path.read_bytes())
            data[-100] ^= 1
            path.write_bytes(data)
        case "manifest":
            document = json.loads((root / "manifest.json").read_text())
            document["block_rows"] = 64
            (root / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("what", ["flip", "swap", "keys", "labels", "manifest"])
def test_a_reader_refuses_changed_bytes(cache: Path, what: str) -> None:
    damage(cache, what)
    with pytest.raises(CorruptError):
        CacheSet.open([cache]).require(READS, np.arange(100), [0, 1])


@pytest.mark.parametrize("what", ["truncate", "remove"])
def test_a_short_or_lost_file_is_a_missing_row_and_is_computed_again(cache: Path, what: str) -> None:
    before = tools.payload(cache)
    damage(cache, what)
    with pytest.raises(CacheMissingError):
        CacheSet.open([cache]).require(READS, np.arange(100), [0, 1])
    assert tools.fill(cache, ("t", "u")) == 1
    assert tools.payload(cache) == before


def test_damage_is_named_by_array_block_view_and_rows(cache: Path) -> None:
    damage(cache, "flip")
    (found,) = verify_part(CacheReader(cache), "t/logits")
    assert str(found).startswith("t/logits block 1 view 1 (rows 32-63): crc32c is ")


def test_a_checked_state_is_not_checked_again_but_a_changed_one_is(cache: Path, monkeypatch) -> None:
    CacheSet.open([cache]).require(READS, np.arange(100), [0])
    calls = []
    real = verify_part
    monkeypatch.setattr("kdcli.cache.verify.verify_part", lambda *args: calls.append(args) or real(*args))
    CacheSet.open([cache]).require(READS, np.arange(100), [0])
    assert not calls
    damage(cache, "flip")
    with pytest.raises(CorruptError):
        CacheSet.open([cache]).require(READS, np.arange(100), [0])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": "other"}, "weights"),
        ({"architecture": "other"}, "architecture"),
        ({"dtype": "float32"}, "dtype"),
        ({"amp": "bf16"}, "amp"),
        ({"temperatures": (2.0,)}, "temperatures"),
        ({"class_names": ("x",)}, "class_names"),
        (
            {"declared_preprocess": {**tools.record_of().declared_preprocess, "mean": [1, 0, 0]}},
            "preprocess.mean",
        ),
        (
            {"declared_preprocess": {**tools.record_of().declared_preprocess, "size": [9, 9]}},
            "preprocess.size",
        ),
        ({"pixels": (1, 2, 6)}, "preprocess.pixels"),
    ],
)
def test_another_teacher_of_the_same_name_is_refused_with_the_field(
    cache: Path, change: dict, field: str
) -> None:
    with CacheWriter(cache, load_manifest(cache)) as writer, pytest.raises(IdentityError) as caught:
        writer.add_teacher(tools.record_of("t", **change))
    assert [difference.field for difference in caught.value.differences] == [field]


@pytest.mark.parametrize(
    "change",
    [{"spec": "elsewhere"}, {"compute": {"batch_size": 1, "device": "cuda"}}, {"pixels": (1, 2, 5)}],
)
def test_where_and_how_a_teacher_ran_does_not_matter(cache: Path, change: dict) -> None:
    with CacheWriter(cache, load_manifest(cache)) as writer:
        assert writer.add_teacher(tools.record_of("t", **change)).spec == "numpy:"


def test_a_record_of_another_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.kd"
    tools.fill(other, ("t",))
    (cache / "commits/t/logits.jsonl").write_bytes((other / "commits/t/logits.jsonl").read_bytes())
    with pytest.raises(IdentityError, match="cache_id"):
        CacheSet.open([cache]).require(READS, np.arange(100), [0])


def test_a_folder_with_other_files_is_not_made_a_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputExistsError):
        tools.new_cache(tmp_path)
    with pytest.raises(StorageError):
        tools.new_cache(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError):
        tools.new_cache(tmp_path / "c.kd")


# --- several writers, crashes ------------------------------------------------------------------


def start(
    root: Path, names: str = "t,u", rows: int = 600, pause: float = 0.0, backend: BackendName = "zarr"
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, Path(tools.__file__), root, names, str(rows)],
        env={**os.environ, "PAUSE": str(pause), "BACKEND": backend},
    )


def test_eight_writers_share_the_work_and_lose_no_row(tmp_path: Path, backend: BackendName) -> None:
    tools.fill(tmp_path / "alone", ("t", "u"), 600, backend=backend)
    writers = [start(tmp_path / "shared", pause=0.002, backend=backend) for _ in range(8)]
    for writer in writers:
        assert writer.wait(60) == 0
    assert tools.payload(tmp_path / "shared") == tools.payload(tmp_path / "alone")


def test_kill_9_at_any_instant_loses_nothing_that_was_committed(tmp_path: Path, backend: BackendName) -> None:
    root, draw = tmp_path / "c.kd", random.Random(5)
    tools.fill(tmp_path / "whole", ("t", "u"), 600, backend=backend)
    for _ in range(12):
        writer = start(root, pause=0.01, backend=backend)
        time.sleep(draw.uniform(0.3, 0.9))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert start(root, backend=backend).wait(60) == 0
    assert tools.payload(root) == tools.payload(tmp_path / "whole")
    for part in tools.parts_of(("t", "u")):
        assert not verify_part(CacheReader(root), part)


def test_a_dead_process_of_this_host_holds_nothing(tmp_path: Path) -> None:
    tools.new_cache(tmp_path / "c.kd")
    layout, unit = Layout(tmp_path / "c.kd"), Unit("t/logits", 0, 0)
    dead = Claims(layout)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead._owner = replace(dead._owner, pid=process.pid, started="1")
    assert dead.acquire(unit)
    assert Claims(layout).acquire(unit)


def test_a_live_claim_is_respected_and_a_silent_one_of_another_host_goes_stale(tmp_path: Path) -> None:
    tools.new_cache(tmp_path / "c.kd")
    layout, unit = Layout(tmp_path / "c.kd"), Unit("t/logits", 0, 0)
    far = Claims(layout)
    far._owner = replace(far._owner, host="elsewhere")
    assert far.acquire(unit)
    assert not Claims(layout).acquire(unit)
    old = time.time() - 3600
    os.utime(layout.claim(unit), (old, old))
    assert Claims(layout).acquire(unit)
    assert not far.owns(unit)


def test_of_two_writers_that_computed_the_same_unit_one_commits(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root)
    unit = Unit("t/logits", 0, 0)
    arrays, content = tools.unit_arrays(manifest, unit)
    with CacheWriter(root, manifest) as one, CacheWriter(root, manifest) as two:
        for writer in (one, two):
            writer.add_teacher(tools.record_of("t"))
        one.claims.acquire(unit)
        assert one.publish(unit, arrays, content, [], {}, 0.0)
        assert not two.publish(unit, arrays, content, [], {}, 0.0)
        assert one.is_done(unit)


def test_two_writers_that_disagree_leave_the_unit_to_be_computed_again(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root)
    unit = Unit("t/logits", 0, 0)
    arrays, content = tools.unit_arrays(manifest, unit)
    with CacheWriter(root, manifest) as one, CacheWriter(root, manifest) as two:
        for writer in (one, two):
            writer.add_teacher(tools.record_of("t"))
        one.claims.acquire(unit)
        assert one.publish(unit, arrays, content, [], {}, 0.0)
        # The second lost its claim but had not noticed when it began to write.
        two.claims.owns = lambda _: True
        other = {name: values + 1 for name, values in arrays.items()}
        assert not two.publish(unit, other, content, [], {}, 0.0)
        assert unit in one.missing("t/logits")


def test_every_error_of_the_store_is_one_of_ours(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(KdError):
            CacheSet.open([path])
