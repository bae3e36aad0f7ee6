"""Staged copies, the page cache, and rows held in memory: nearer, never different."""

import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cache_readers as readers
import cache_tools as tools
import numpy as np
import pytest
import torch
from conftest import Shell
from test_cache_reader import backend, script

from kdcli.cache import resident, staging
from kdcli.cache import shelf as copying
from kdcli.cache import verify as verifying
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.commits import read_commit
from kdcli.cache.layout import BackendName, Unit, load_manifest
from kdcli.cache.memory import SharedBytes, available_memory
from kdcli.cache.needs import Needs
from kdcli.cache.resident import hold
from kdcli.cache.staging import prewarm, stage
from kdcli.cache.writer import CacheWriter
from kdcli.errors import CorruptError, DeviceError, NoSpaceError, StorageError
from kdcli.training import train as run
from kdcli.training.config import StudentConfig
from kdcli.training.replay import Recording
from kdcli.training.resident import DeviceRows

__all__ = ["backend"]  # a fixture

ROWS = np.arange(100)
READS = {"t": ["logits"]}
BOTH = Needs(READS, ROWS, (0, 1))


@pytest.fixture
def cache(tmp_path: Path, backend: BackendName) -> Path:
    root = tmp_path / "c.kd"
    tools.fill(root, ("t", "u"), backend=backend)
    return root


def copies(folder: Path) -> dict[str, int]:
    """Every copy in a staging folder, and when it was made."""
    return {
        str(path.relative_to(folder)): path.stat().st_ctime_ns
        for path in folder.rglob("c.*")
        if path.is_file()
    }


def changed_in_secret(path: Path, made: Path) -> None:
    """Change a byte without a new size or time, in the file itself or by another in its place."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[1] ^= 1
    path.parent.chmod(0o755)
    made.write_bytes(data)
    if made != path:
        made.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("made", ["in place", "beside"])
def test_a_change_that_sets_size_and_time_back_is_seen_once_more(
    cache: Path, tmp_path: Path, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    opened = CacheSet.open([cache])
    opened.require(READS, ROWS, (0, 1))
    stage(opened, BOTH, tmp_path / "fast")
    chunk = next(path for path in sorted(cache.rglob("t/logits/c.*")) if path.is_file())
    changed_in_secret(chunk, chunk if made == "in place" else cache / "tmp/other")
    with pytest.raises(CorruptError):
        CacheSet.open([cache]).require(READS, ROWS, (0, 1))
    staged = CacheSet.open([cache])
    copy = next(
        path for path in sorted((tmp_path / "fast").rglob("t/logits/c.*")) if path.name.startswith(chunk.name)
    )
    changed_in_secret(copy, copy if made == "in place" else tmp_path / "fast/other")
    with pytest.raises(CorruptError):  # what is in its place is no copy of the record
        stage(staged, BOTH, tmp_path / "fast")


def test_a_copied_cache_is_checked_once_more_and_served(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    CacheSet.open([cache]).require(READS, ROWS, (0, 1))
    shutil.copytree(cache, tmp_path / "copy.kd")
    checked: list[str] = []
    real = verifying.verify_part
    monkeypatch.setattr(
        verifying, "verify_part", lambda reader, part: (checked.append(part), real(reader, part))[1]
    )
    for expected in (["samples", "t/logits"], []):
        checked.clear()
        CacheSet.open([tmp_path / "copy.kd"]).require(READS, ROWS, (0, 1))
        assert checked == expected
    CacheSet.open([cache]).require(READS, ROWS, (0, 1))
    assert checked == []


def hide(root: Path) -> None:
    """Take the arrays of a cache away: whatever is read from now on is read elsewhere."""
    (data,) = root.glob("data.*")
    data.rename(root / "hidden")


def require_all(cache: CacheSet, name: str = "t") -> None:
    for view in (0, 1):
        np.testing.assert_array_equal(
            cache.gather(name, "logits", ROWS, view), tools.logits_of(name, ROWS, view)
        )


# --- staging -----------------------------------------------------------------------------------


def test_what_is_needed_is_copied_and_read_from_the_copy(cache: Path, tmp_path: Path) -> None:
    opened = CacheSet.open([cache])
    stage(opened, BOTH, tmp_path / "ssd")
    names = {name.rpartition("/")[0].partition("/")[2] for name in copies(tmp_path / "ssd")}
    assert names == {"samples/content_size", "samples/content_crc", "views/params", "teachers/t/logits"}
    hide(cache)
    require_all(opened)
    assert opened.content(ROWS)[0].tolist() == (ROWS + 100).tolist()


def test_staged_bytes_are_not_verified_a_second_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    opened = CacheSet.open([cache])
    stage(opened, BOTH, tmp_path / "ssd")
    monkeypatch.setattr("kdcli.cache.verify.verify_part", refuse)
    assert opened.require(READS, ROWS, [0, 1]).all()


def test_only_the_blocks_and_views_that_are_read_are_copied(cache: Path, tmp_path: Path) -> None:
    stage(CacheSet.open([cache]), Needs(READS, np.asarray([40, 41]), (1,)), tmp_path / "ssd")
    logits = [name for name in copies(tmp_path / "ssd") if "logits" in name]
    assert len(logits) == 1
    assert "/c.1.1." in logits[0]


def test_copies_are_used_again_and_additions_follow(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ssd"
    stage(CacheSet.open([cache]), BOTH, folder)
    first = copies(folder)
    stage(CacheSet.open([cache]), BOTH, folder)
    assert copies(folder) == first
    both = CacheSet.open([cache])
    stage(both, Needs({"t": ["logits"], "u": ["logits"]}, ROWS, (0, 1)), folder)
    assert first.items() <= copies(folder).items()
    assert {name for name in copies(folder) if name not in first} == {
        name for name in copies(folder) if "/u/" in name
    }
    hide(cache)
    require_all(both, "u")


def test_a_block_that_was_written_anew_is_staged_anew(cache: Path, tmp_path: Path) -> None:
    old = CacheSet.open([cache])
    stage(old, BOTH, tmp_path / "ssd")
    unit, manifest = Unit("t/logits", 1, 0), load_manifest(cache)
    with CacheWriter(cache, manifest) as writer:
        commit = read_commit(writer.layout, unit)
        assert commit is not None
        writer.withdraw(commit)
        arrays, content = tools.unit_arrays(manifest, unit)
        assert writer.publish(unit, {"logits": arrays["logits"] + 1}, content, [], {}, 0.0)
    new = CacheSet.open([cache])
    stage(new, BOTH, tmp_path / "ssd")
    rows = np.arange(32, 64)
    np.testing.assert_array_equal(new.gather("t", "logits", rows), tools.logits_of("t", rows, 0) + 1)
    require_all(old)  # a job that runs already keeps what it began with


def test_damaged_bytes_get_no_copy(cache: Path, tmp_path: Path) -> None:
    opened = CacheSet.open([cache])
    chunk = opened.members[0].chunk_path("t/logits", "logits", 2, 1)
    data = bytearray(chunk.read_bytes())
    data[-100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CorruptError, match=chunk.name):
        stage(opened, BOTH, tmp_path / "ssd")
    assert not [name for name in copies(tmp_path / "ssd") if f"/t/logits/{chunk.name}." in name]
    assert not list(tmp_path.glob("ssd/*/tmp/*"))


@pytest.mark.parametrize("verify", ["once", "always"])
def test_a_copy_that_was_touched_is_made_again(cache: Path, tmp_path: Path, verify: str) -> None:
    stage(CacheSet.open([cache]), BOTH, tmp_path / "ssd")
    copy = next(path for path in (tmp_path / "ssd").rglob("c.*") if "logits" in str(path))
    good, stat = copy.read_bytes(), copy.stat()
    copy.write_bytes(bytes(len(good)))
    if verify == "always":  # then not even the time of the file is believed
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    stage(CacheSet.open([cache], verify), BOTH, tmp_path / "ssd")  # type: ignore[arg-type]
    assert copy.read_bytes() == good


def test_without_space_nothing_is_copied(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "available_bytes", lambda _: 1000)
    with pytest.raises(NoSpaceError, match="free"):
        stage(CacheSet.open([cache]), BOTH, tmp_path / "ssd")
    assert not copies(tmp_path / "ssd")


def test_a_folder_that_cannot_be_made_is_said(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "ssd").write_text("a file")
    with pytest.raises(StorageError):
        stage(CacheSet.open([cache]), BOTH, tmp_path / "ssd")


@pytest.mark.slow
def test_four_jobs_of_a_node_share_one_copy(tmp_path: Path, backend: BackendName) -> None:
    root, folder = tmp_path / "c.kd", tmp_path / "ssd"
    tools.fill(root, rows=600, backend=backend)
    jobs = [script("stage", root, folder) for _ in range(4)]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("go\n")
        job.stdin.flush()
    for job in jobs:
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
    lines = next(folder.glob("*/stamps")).read_text().splitlines()
    assert len(lines) == len(copies(folder))  # each was made once, by one of them


def test_a_killed_job_leaves_the_next_one_nothing_but_whole_copies(
    tmp_path: Path, backend: BackendName
) -> None:
    root, folder = tmp_path / "c.kd", tmp_path / "ssd"
    tools.fill(root, rows=600, backend=backend)
    job = script("stage", root, folder)
    assert job.stdin is not None
    job.stdin.write("go\n")
    job.stdin.flush()
    while not list(folder.rglob("c.*")):
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    left = len(copies(folder))
    job = script("stage", root, folder)
    job.communicate("go\n", timeout=60)
    assert job.returncode == 0
    assert len(copies(folder)) >= left
    assert not list(folder.glob("*/tmp/*"))


# --- the page cache ----------------------------------------------------------------------------


def test_prewarming_reads_every_needed_file_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = CacheSet.open([cache])
    sizes = [chunk.size for chunk in BOTH.chunks(opened.members[0], 0, 100)]
    assert prewarm(opened, BOTH) == sum(sizes)
    assert f"in {len(sizes)} files" in capsys.readouterr().err
    assert len(sizes) == 4 * (2 + 2 + 2)  # blocks x (size, crc, params and logits of two views)


def test_prewarming_more_than_fits_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(staging.console, "warn", said.append)
    monkeypatch.setattr(staging, "available_memory", lambda: 1000)
    prewarm(CacheSet.open([cache]), BOTH)
    assert "do not fit" in said[0]


# --- in memory ---------------------------------------------------------------------------------


def test_rows_in_memory_are_those_of_the_cache(cache: Path) -> None:
    opened = CacheSet.open([cache])
    hold(opened, Needs(READS, np.asarray([99, 3, 3, 40]), (1,)))
    shown = opened.gather("t", "logits", np.asarray([5, 40, 3]), 1)  # 5 is not held
    np.testing.assert_array_equal(shown, tools.logits_of("t", np.asarray([5, 40, 3]), 1))
    hide(cache)
    held = np.asarray([3, 99, 40, 3])
    np.testing.assert_array_equal(opened.gather("t", "logits", held, 1), tools.logits_of("t", held, 1))
    assert opened.content(held)[0].tolist() == (held + 100).tolist()
    assert opened.gather("t", "logits", held[:0], 1).shape == (0, 5)


def test_several_caches_are_held_as_one(tmp_path: Path, backend: BackendName) -> None:
    for name, rows in (("a", 50), ("b", 70)):
        tools.fill(tmp_path / name, ("t",), rows, backend=backend)
    both = CacheSet.open([tmp_path / "a", tmp_path / "b"])
    rows = np.asarray([0, 49, 50, 119, 3])
    stage(both, Needs(READS, rows, (1,)), tmp_path / "ssd")
    hold(both, Needs(READS, rows, (1,)))
    for name in ("a", "b"):
        hide(tmp_path / name)
    shutil.rmtree(tmp_path / "ssd")
    local = np.asarray([0, 49, 0, 69, 3])
    np.testing.assert_array_equal(both.gather("t", "logits", rows, 1), tools.logits_of("t", local, 1))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_rows_in_memory(cache: Path, start: str) -> None:
    opened = CacheSet.open([cache])
    hold(opened, BOTH)
    hide(cache)
    (batches,) = readers.read_all(opened, start, 2)
    for rows, values, _ in batches:
        readers.require_oracle(rows, values)


def test_pickled_memory_is_the_same_memory() -> None:
    memory = SharedBytes(100)
    twin = pickle.loads(pickle.dumps(memory))
    with memory.writable() as target:
        target[7] = 42
    assert twin.bytes[7] == 42
    assert not twin.bytes.flags.writeable


def test_what_does_not_fit_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(resident, "available_memory", lambda: 1000)
    with pytest.raises(DeviceError, match="do not fit") as caught:
        hold(CacheSet.open([cache]), BOTH)
    assert caught.value.exit_code == 30


def test_rows_on_the_device_are_those_of_the_cache(cache: Path) -> None:
    opened, rows = CacheSet.open([cache]), np.asarray([7, 99, 3, 40])
    recording = Recording(opened, rows, {"t": ("logits", "lse"), "u": ("logits",)})
    device = torch.device("cpu")
    held = DeviceRows(recording, Needs(recording.reads, rows, (0, 1)), device)
    hide(cache)
    positions = np.asarray([2, 0, 2])
    for view in (0, 1):
        found = held.outputs(torch.from_numpy(positions), view)
        expected = tools.logits_of("u", rows[positions], view)
        np.testing.assert_array_equal(found["u"]["logits"].numpy(), expected)
        assert found["t"]["lse"].dtype == torch.float32
        assert found["t"]["lse"].shape == (3, 1)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_none_of_it_changes_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training_place import make_place

    place = make_place(tmp_path / "place")
    here = torch.device("cpu")

    def on_cpu(config: object, recording: Recording, rule: object, epochs: int, _: torch.device) -> object:
        needs = Needs(recording.reads, recording.rows, (1, 2))
        return Recording(recording.cache, recording.rows, {}), DeviceRows(recording, needs, here)

    changes = {
        "plain": {},
        "near": {"stage": tmp_path / "ssd", "prewarm": True, "resident": "ram"},
        "workers": {"resident": "ram", "workers": 2},
        "device": {},
    }
    weights = {}
    for name, change in changes.items():
        if name == "device":
            monkeypatch.setattr(run, "bring_near", on_cpu)
        result = run.train_student(place.config(name, "distill-equal", **change))
        files = [Path(result.out) / "heads.safetensors", *Path(result.out).glob("export/*.safetensors")]
        weights[name] = [file.read_bytes() for file in files]
        weights[name].append(str([epoch["loss"] for epoch in result.history]).encode())
    assert all(found == weights["plain"] for found in weights.values())


def test_the_options_reach_the_configuration_and_are_no_part_of_a_runs_identity() -> None:
    fields = {"data": "x", "student": "s", "method": "labels-only", "out": "o"}
    near = {"stage": "ssd", "prewarm": True, "resident": "ram"}
    assert StudentConfig(**fields, **near).identity() == StudentConfig(**fields).identity()  # type: ignore[arg-type]


def test_the_flags_of_the_command_line(kd: Callable[..., Shell]) -> None:
    words = ("train-student", "sklearn/digits", "--student", "s", "--method", "labels-only", "--out", "o")
    shown = kd(*words, "--stage", "ssd", "--prewarm", "--resident", "gpu", "--print-config")
    assert {"stage: ssd", "prewarm: true", "resident: gpu"} <= set(shown.out.splitlines())
    kd(*words, "--resident", "disk").refused(2, "resident")


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from training_place import make_place

    place = make_place(tmp_path / "place", views="eval+train:1")
    with pytest.raises(DeviceError, match="--resident gpu"):
        run.train_student(place.config("x", "distill-equal", resident="gpu"))
