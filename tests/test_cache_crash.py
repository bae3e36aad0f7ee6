"""kill -9 at any instant, full and broken disks, writers that were taken for dead: nothing committed is lost.

Kill points are steps on disk (tests/crash_tools.py): before each one is after the one before it.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cache_tools as tools
import numpy as np
import pytest
from crash_tools import Server, Watch, assert_clean, computed, steps

from kdcli.cache import claims as claims_module
from kdcli.cache.admin.inventory import inspect_cache
from kdcli.cache.claims import Claims, is_running
from kdcli.cache.commits import Commit, compact, read_commit, read_commits
from kdcli.cache.garbage import collect_garbage
from kdcli.cache.layout import BackendName, Layout, Unit, load_manifest
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.cache.verify import verify_part
from kdcli.cache.writer import CacheWriter
from kdcli.errors import ClaimedError, IdentityError, NoSpaceError, StorageError
from kdcli.files import create_text, scratch_name

BOTH = ("zarr", "hdf5")
NAMES = ("t", "u")
ROWS = 600
"""19 blocks, 2 groups of views, 5 parts: 190 units."""
UNITS = 190


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a place: a kill takes nothing back from a disk, so none is needed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("h5py", "kdcli.cache.hdf5_index") as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What an uninterrupted run leaves, by backend."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for backend in BOTH:
            tools.fill(folder / backend, NAMES, ROWS, backend=backend)
    return {backend: tools.payload(folder / backend) for backend in BOTH}


@pytest.fixture(params=BOTH)
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody kills need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def parts(root: Path) -> list[str]:
    return CacheReader(root).store.parts()


def assert_finished(root: Path, expected: dict[str, bytes]) -> None:
    assert tools.payload(root) == expected
    reader = CacheReader(root)
    for part in reader.store.parts():
        assert not verify_part(reader, part)
        assert len(reader.commits(part)) == len(list(reader.store.units_of(part)))
        assert not list((root / "commits" / part).glob("*.json")), "records of a finished part are joined"
    if reader.manifest.backend == "hdf5":
        assert_index_holds(root, reader)
    assert_clean(root)


def assert_index_holds(root: Path, reader: CacheReader) -> None:
    import h5py

    rows = np.arange(reader.manifest.rows)
    with h5py.File(root / "index.h5") as index:
        for name in reader.teachers:
            for view in range(2):
                np.testing.assert_array_equal(
                    index[f"teachers/{name}/logits"][:, view], tools.logits_of(name, rows, view)
                )


# --- kills -----------------------------------------------------------------------------------------


def damaged(root: Path, backend: BackendName) -> None:
    """A finished cache of which a file was lost, with all that a killed writer may leave in it."""
    tools.fill(root, ("t",), 32, backend=backend)
    manifest = load_manifest(root)
    store = Store(root, manifest)
    spec = store.specs("t/logits")["logits"]
    store.chunk("t/logits", "logits", spec, 0, 1).unlink()
    dead = Claims(store.layout)
    dead._owner = replace(dead._owner, pid=2**22 + 1, started="1")  # above the largest process number
    for unit in (Unit("t/logits", 0, 1), Unit("t/logits", 0, 0), Unit("t/logits", -1, 0)):
        assert dead.acquire(unit)
    (root / "tmp" / scratch_name().replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")).write_bytes(b"half")


@pytest.mark.parametrize("begin", ["nothing", "damaged"])
def test_a_kill_at_every_single_step(
    server: Server, tmp_path: Path, backend: BackendName, begin: str, unsynced: None
) -> None:
    """Creating, adding a teacher, claiming, taking over, publishing, withdrawing, joining records, the index."""
    tools.fill(tmp_path / "whole", ("t",), 32, backend=backend)
    expected = tools.payload(tmp_path / "whole")
    before: dict[str, Commit] = {}
    if begin == "damaged":
        damaged(tmp_path / "begin", backend)
        before = {
            str(c.unit): c
            for part in tools.parts_of(("t",))
            for c in records(tmp_path / "begin", part).values()
        }
    kill_at, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        kill_at += 1 if backend == "zarr" else 3  # most steps do not depend on the backend
        folder = tmp_path / f"k{kill_at}"
        folder.mkdir()
        root, log = folder / "c.kd", tmp_path / f"log{kill_at}"
        if begin == "damaged":
            shutil.copytree(tmp_path / "begin", root)
        code = server.wait(server.fill(root, log, names=["t"], rows=32, backend=backend, kill_at=kill_at))
        watch = Watch(root, before)
        if begin == "nothing":  # else the lost file is lost until it is computed again
            watch.look()
        again = tools.fill(root, ("t",), 32, backend=backend)
        watch.look()
        assert again + sum(computed(log).values()) <= (6 if begin == "nothing" else 1) + 1, kill_at
        assert_finished(root, expected)
        shutil.rmtree(folder)
    assert code == 0
    assert kill_at > (200 if begin == "nothing" else 60)


@pytest.mark.parametrize("writers", [1, 3, 8])
def test_writers_killed_at_random_steps_again_and_again(
    server: Server, tmp_path: Path, backend: BackendName, whole: dict[str, dict[str, bytes]], writers: int
) -> None:
    root, log, draw = tmp_path / "c.kd", tmp_path / "log", random.Random(writers)
    watch, kills = Watch(root), 0
    while kills < 24:
        before = computed(log)
        running = [
            server.fill(root, log, names=NAMES, rows=ROWS, backend=backend, kill_at=draw.randrange(1, 240))
            for _ in range(writers)
        ]
        codes = [server.wait(pid) for pid in running]
        assert set(codes) <= {0, -signal.SIGKILL}
        kills += codes.count(-signal.SIGKILL)
        assert not (computed(log) - before).keys() & watch.seen.keys(), "done units are never computed again"
        watch.look()
        if 0 in codes:
            break  # killed before its own last step, but others had done everything
    last = [server.fill(root, log, names=NAMES, rows=ROWS, backend=backend) for _ in range(writers)]
    assert [server.wait(pid) for pid in last] == [0] * writers
    watch.look()
    assert len(watch.seen) == UNITS
    assert sum(computed(log).values()) - UNITS <= kills
    assert_finished(root, whole[backend])


def test_writers_killed_at_random_instants(
    server: Server, tmp_path: Path, backend: BackendName, whole: dict[str, dict[str, bytes]]
) -> None:
    root, log, draw = tmp_path / "c.kd", tmp_path / "log", random.Random(7)
    watch, kills = Watch(root), 0
    for _ in range(15):
        running = [
            server.fill(root, log, names=NAMES, rows=ROWS, backend=backend, pause=0.001) for _ in range(2)
        ]
        for pid in running:
            time.sleep(draw.uniform(0.0, 0.08))
            os.kill(pid, signal.SIGKILL)
        kills += [server.wait(pid) for pid in running].count(-signal.SIGKILL)
        watch.look()
    assert server.wait(server.fill(root, log, names=NAMES, rows=ROWS, backend=backend)) == 0
    assert kills > 20
    assert sum(computed(log).values()) - UNITS <= kills
    assert_finished(root, whole[backend])


def test_two_requeued_jobs_beside_a_dying_one(
    server: Server, tmp_path: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    root, log = tmp_path / "c.kd", tmp_path / "log"
    jobs = [
        server.fill(root, log, names=NAMES, rows=ROWS, backend="zarr", pause=0.002, kill_at=kill_at)
        for kill_at in (500, None, None)
    ]
    assert [server.wait(pid) for pid in jobs] == [-signal.SIGKILL, 0, 0]
    assert sum(computed(log).values()) <= UNITS + 1
    assert_finished(root, whole["zarr"])


def test_eight_writers_that_find_the_same_dead_claims_compute_nothing_twice(
    server: Server, tmp_path: Path
) -> None:
    """Each finds them dead; a slower one must not remove the claim of a faster one."""
    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root, ROWS)
    with CacheWriter(root, manifest) as writer:
        for name in NAMES:
            writer.add_teacher(tools.record_of(name))
        layout = writer.layout
    dead = Claims(layout)
    dead._owner = replace(dead._owner, pid=2**22 + 1, started="1")
    for part in parts(root):
        for block, group in Store(root, manifest).units_of(part):
            dead.acquire(Unit(part, block, group))
    log = tmp_path / "log"
    running = [server.fill(root, log, names=NAMES, rows=ROWS, backend="zarr") for _ in range(8)]
    assert [server.wait(pid) for pid in running] == [0] * 8
    assert set(computed(log).values()) == {1}
    assert len(computed(log)) == UNITS


# --- claims ----------------------------------------------------------------------------------------


UNIT = Unit("t/logits", 0, 0)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A cache that knows its teacher and holds nothing yet."""
    root = tmp_path / "c.kd"
    with CacheWriter(root, tools.new_cache(root)) as writer:
        writer.add_teacher(tools.record_of("t"))
    return root


def far_claim(layout: Layout, age: float) -> Claims:
    far = Claims(layout)
    far._owner = replace(far._owner, host="elsewhere")
    assert far.acquire(UNIT)
    touched = layout.claim(UNIT).stat().st_mtime - age
    os.utime(layout.claim(UNIT), (touched, touched))
    return far


@pytest.mark.parametrize("clock", [-3600.0, 0.0, 3600.0])
def test_a_claim_of_another_host_is_as_old_as_the_file_system_says(
    small: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock)
    layout = Layout(small)
    far_claim(layout, age=500)
    assert not Claims(layout).acquire(UNIT)
    assert Claims(layout).is_live(UNIT)
    layout.claim(UNIT).unlink()
    far = far_claim(layout, age=700)
    assert not Claims(layout).is_live(UNIT)
    assert Claims(layout).acquire(UNIT)
    assert not far.owns(UNIT)


@pytest.mark.parametrize(
    ("lease", "judge", "age", "free"),
    [
        (None, None, 599, False),
        (None, None, 601, True),
        (60, None, 59, False),  # the claim's own limit counts, whoever looks
        (60, None, 61, True),
        (60, 3600, 61, True),
        (None, 120, 119, False),  # a judge may be less patient
        (None, 120, 121, True),
        (None, 1, 89, False),  # but waits for three heartbeats of 30 s
        (None, 1, 91, True),
        (3, 1, 2, False),
        (3, 1, 4, True),
    ],
)
def test_how_long_a_silent_claim_holds_is_a_setting(
    small: Path, lease: float | None, judge: float | None, age: float, free: bool
) -> None:
    layout = Layout(small)
    far = Claims(layout, lease)
    far._owner = replace(far._owner, host="elsewhere")
    assert far.acquire(UNIT)
    touched = layout.claim(UNIT).stat().st_mtime - age
    os.utime(layout.claim(UNIT), (touched, touched))
    assert Claims(layout, judge).acquire(UNIT) == free


def test_a_cache_records_the_usual_limit_of_its_claims(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    writer = CacheWriter(root, tools.new_cache(root).model_copy(update={"claim_timeout": 42.0}))
    assert writer.claims._owner.timeout == 42
    assert writer.claims._owner.beat == 14
    assert CacheWriter(root, writer.manifest, timeout=6).claims._owner.beat == 2
    assert CacheWriter(root, writer.manifest, timeout=6000).claims._owner.beat == 30


def test_a_supervisor_frees_what_a_dead_worker_of_another_host_holds(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, units = Layout(small), [Unit("t/logits", block, 0) for block in range(3)]
    for unit, worker in zip(units, ("s-0.0", "s-1.0", ""), strict=True):
        monkeypatch.setenv("KD_WORKER", worker)
        far = Claims(layout)
        far._owner = replace(far._owner, host="elsewhere", machine="another")
        assert far.acquire(unit)
    monkeypatch.delenv("KD_WORKER")
    other, supervisor = Claims(layout), Claims(layout)
    supervisor.bury("s-0.0")
    assert [other.is_live(unit) for unit in units] == [False, True, True]
    assert not layout.claim(units[0]).exists()
    assert [other.acquire(unit) for unit in units] == [True, False, False]
    supervisor.bury("s-0.0")  # what another one has taken since is not touched
    assert other.owns(units[0])


def test_a_claim_from_the_future_is_waited_for_as_long_as_any_other(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server's clock was set back: the age of the claim would stay below zero for an hour."""
    layout = Layout(small)
    far_claim(layout, age=-3600)
    mine, real = Claims(layout), time.monotonic
    assert not mine.acquire(UNIT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 599)
    assert not mine.acquire(UNIT)
    later = layout.claim(UNIT).stat().st_mtime + 30
    os.utime(layout.claim(UNIT), (later, later))  # a sign of life
    monkeypatch.setattr(time, "monotonic", lambda: real() + 700)
    assert not mine.acquire(UNIT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 1300)
    assert mine.acquire(UNIT)


@pytest.mark.parametrize("late", ["before the right", "with the right"])
def test_a_slower_heir_of_a_dead_claim_leaves_the_faster_one_alone(small: Path, late: str) -> None:
    """Both found the claim dead; the faster one had it, and buried it, when the slower one went on."""
    layout = Layout(small)
    far_claim(layout, age=700)
    fast, slow, path = Claims(layout), Claims(layout), layout.claim(UNIT)
    if late == "before the right":
        real = slow.is_dead

        def is_dead(asked: Path) -> bool:
            return (real(asked), asked == path and fast.acquire(UNIT))[0]

        slow.is_dead = is_dead  # type: ignore[method-assign]
        assert not slow.acquire(UNIT)
    else:
        identity = slow._identity(path)
        assert slow._take(path.with_name(f"{path.name}.{identity}"))
        assert not fast.acquire(UNIT)  # the slower one has the right to bury it, and is alive
        slow._owner = replace(slow._owner, pid=2**22 + 1)
        path.with_name(f"{path.name}.{identity}").unlink()
        assert slow._take(path.with_name(f"{path.name}.{identity}"))
        assert fast.acquire(UNIT)  # it died with the right: that is inherited
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert fast.owns(UNIT)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"host": 1, "pid": "x"}', b"\xff\xfe"])
def test_a_claim_that_is_no_claim_is_respected_until_it_is_old(small: Path, content: bytes) -> None:
    layout = Layout(small)
    path = layout.claim(UNIT)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert not Claims(layout).acquire(UNIT)
    assert "unknown" in Claims(layout).holder(UNIT) or content.startswith(b'{"host"')
    old = path.stat().st_mtime - 601
    os.utime(path, (old, old))
    mine = Claims(layout)
    assert mine.acquire(UNIT)
    assert mine.owns(UNIT)


def test_a_process_number_that_was_given_again_is_another_process(small: Path) -> None:
    layout = Layout(small)
    other = Claims(layout)
    process = subprocess.Popen(["sleep", "60"])
    try:
        other._owner = replace(
            other._owner, pid=process.pid, started=claims_module.process_start(process.pid)
        )
        assert other.acquire(UNIT)
        assert not Claims(layout).acquire(UNIT)
        layout.claim(UNIT).unlink()
        other._owner = replace(other._owner, started="12345")
        assert other.acquire(UNIT)
        assert Claims(layout).acquire(UNIT)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def stopped(small: Path) -> Iterator[int]:
    """A process that claimed a unit and the records of a part, and is stopped."""
    pid = os.fork()
    if not pid:
        Claims(Layout(small)).acquire(UNIT)
        Claims(Layout(small), 0.2).acquire(Unit("t/logits", -1, 0))
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_the_claim_of_a_stopped_process_ages_like_all_others(small: Path, stopped: int) -> None:
    layout = Layout(small)
    assert not Claims(layout).acquire(UNIT)
    (writer,) = inspect_cache(small).writers
    assert (writer.pid, writer.alive, writer.host) == (stopped, True, socket.gethostname())
    assert inspect_cache(small).writers == {writer: 2}
    old = layout.claim(UNIT).stat().st_mtime - claims_module.STALE_SECONDS - 1
    os.utime(layout.claim(UNIT), (old, old))
    assert Claims(layout).acquire(UNIT)
    with Claims(layout).alone("t/logits"):  # waited for, then taken over
        pass


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_running_process_keeps_its_claim_whatever_the_clock_says(
    small: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slept for a day: its writers' hearts have not beaten yet."""
    layout = Layout(small)
    os.utime(layout.claim(UNIT), (1, 1))
    monkeypatch.setattr(claims_module, "is_stopped", lambda _: False)
    claims, real = Claims(layout), time.monotonic
    assert not claims.acquire(UNIT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + claims_module.STALE_SECONDS - 1)
    assert not claims.acquire(UNIT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + claims_module.STALE_SECONDS + 1)
    assert claims.acquire(UNIT), "no heartbeat for as long as it was watched"


def test_a_wait_says_for_whom_and_ends(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer that hangs while its heart beats."""
    monkeypatch.setattr(claims_module, "WORD_SECONDS", 0.05)
    layout = Layout(small)
    with Claims(layout, 0.6) as hanging, hanging.alone("t/logits"):
        with (
            pytest.raises(
                ClaimedError, match=f"pid {os.getpid()} has rewritten the records of t/logits"
            ) as caught,
            Claims(layout, 0.2).alone("t/logits"),
        ):
            pass
        assert "kd cache info" in caught.value.hint
    assert capsys.readouterr().err.count(f"pid {os.getpid()}, which rewrites the records of t/logits") == 1


def test_a_host_of_the_same_name_is_not_this_one(small: Path) -> None:
    """Nodes of a cloud and containers are often all called the same: a number says nothing about them."""
    layout = Layout(small)
    far = Claims(layout)
    far._owner = replace(far._owner, machine="another", pid=2**22 + 1, started="1")
    assert far.acquire(UNIT)
    assert not Claims(layout).acquire(UNIT)


def test_processes_of_others_and_numbers_that_cannot_be_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert is_running(os.getpid())
    assert is_running(1)
    assert not any(is_running(pid) for pid in (0, -1, 2**22 + 1, 2**80))

    def refuse(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(claims_module, "_stat", lambda _: ("?", None))
    assert is_running(4711, "1"), "what /proc hides may be alive"


def test_only_an_own_claim_is_refreshed_and_a_disk_that_refuses_does_not_end_it(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT_SECONDS", 0.01)
    layout, other = Layout(small), Unit("t/logits", 1, 0)
    with Claims(layout) as claims:
        assert claims.acquire(UNIT)
        assert claims.acquire(other)
        layout.claim(UNIT).write_text(json.dumps({"token": "theirs"}))
        (layout.claims / "t/logits/000002-0000.json").mkdir()
        claims._held.add(Unit("t/logits", 2, 0))
        for unit in (UNIT, other):
            os.utime(layout.claim(unit), (1, 1))
        deadline = time.monotonic() + 20
        while layout.claim(other).stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert layout.claim(other).stat().st_mtime > 1
        assert layout.claim(UNIT).stat().st_mtime == 1


# --- taken for dead --------------------------------------------------------------------------------


def publish(
    writer: CacheWriter, unit: Unit, change: Callable[[np.ndarray], np.ndarray] = lambda x: x
) -> bool:
    arrays, content = tools.unit_arrays(writer.manifest, unit)
    return writer.publish(unit, {n: change(v) for n, v in arrays.items()}, content, [], {}, 0.0)


def write_pauses(root: Path, gate: Path, differ: bool) -> int:
    """A fork that stops itself at its first chunk, after all checks of publish; woken, it writes."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with CacheWriter(root, load_manifest(root)) as writer:
            writer.claims.acquire(UNIT)
            real = writer.store.write

            def write(path: Path, values: np.ndarray) -> list[int]:
                gate.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
                return real(path, values)

            writer.store.write = write  # type: ignore[method-assign]
            publish(writer, UNIT, (lambda values: values + 1) if differ else lambda values: values)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("differ", [False, True])
def test_a_writer_that_slept_through_its_own_funeral(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differ: bool
) -> None:
    """Stopped in the midst of publishing, taken over and committed by another host, then woken."""
    gate = tmp_path / "gate"
    sleeper = write_pauses(small, gate, differ)
    while not gate.exists():
        time.sleep(0.01)
    with CacheWriter(small, load_manifest(small)) as writer:
        writer.claims._owner = replace(writer.claims._owner, host="elsewhere")
        claim = writer.layout.claim(UNIT)
        os.utime(claim, (1, 1))
        assert writer.claims.acquire(UNIT)
        assert publish(writer, UNIT)
        writer.claims.release([UNIT])
        theirs = read_commit(writer.layout, UNIT)
        os.kill(sleeper, signal.SIGCONT)
        os.waitpid(sleeper, 0)
        if differ:  # what it wrote is not what the record says: the record had to go
            assert writer.missing("t/logits")[0] == UNIT
            assert publish(writer, UNIT)
        else:
            assert read_commit(writer.layout, UNIT) == theirs
    reader = CacheReader(small)
    assert not verify_part(reader, "t/logits")
    np.testing.assert_array_equal(
        reader.gather("t", "logits", np.arange(32)), tools.logits_of("t", np.arange(32), 0)
    )


def test_who_lost_its_claim_writes_nothing(small: Path) -> None:
    manifest = load_manifest(small)
    with CacheWriter(small, manifest) as slow, CacheWriter(small, manifest) as fast:
        assert slow.claims.acquire(UNIT)
        fast.layout.claim(UNIT).unlink()
        assert fast.claims.acquire(UNIT)
        assert not publish(slow, UNIT, lambda values: values + 1)  # the other is still at it
        assert not tools.payload(small).keys() & {"teachers/t/logits/c.0.0.0"}
        assert publish(fast, UNIT)
        before = tools.payload(small)
        assert not publish(slow, UNIT, lambda values: values + 1)
        assert tools.payload(small) == before


# --- records ---------------------------------------------------------------------------------------


def records(root: Path, part: str = "t/logits") -> dict[tuple[int, int], Commit]:
    return read_commits(Layout(root), part)


@pytest.mark.parametrize("kept", ["single", "joined", "both"])
def test_a_record_is_taken_back_wherever_it_is_kept(tmp_path: Path, kept: str) -> None:
    root = tmp_path / "c.kd"
    tools.fill(root)
    layout = Layout(root)
    commit, single = records(root)[1, 0], layout.commits / "t/logits/000001-0000.json"
    joined = layout.compacted("t/logits")
    lines = joined.read_text().splitlines(keepends=True)
    if kept != "joined":
        single.write_text(next(line for line in lines if '"block": 1, "group": 0' in line))
    if kept == "single":
        joined.write_text("".join(line for line in lines if '"block": 1, "group": 0' not in line))
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.withdraw(commit)
        assert writer.missing("t/logits") == [commit.unit]
        assert not writer.is_done(commit.unit)
    assert len(records(root)) == 7
    assert tools.fill(root) == 1


def test_only_the_very_record_is_taken_back(tmp_path: Path) -> None:
    """Two writers find the same damage; the slower one must not take back what the faster one made since."""
    root = tmp_path / "c.kd"
    tools.fill(root)
    old = records(root)[0, 0]
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.withdraw(old)
        assert publish(writer, old.unit)
        new = records(root)[0, 0]
        assert new != old
        writer.withdraw(old)
        assert records(root)[0, 0] == new


def test_records_are_joined_and_taken_back_one_at_a_time(tmp_path: Path) -> None:
    """Else a record that is taken back while others are joined would be in the joined file again."""
    import threading

    root = tmp_path / "c.kd"
    tools.fill(root)
    with (
        CacheWriter(root, load_manifest(root)) as one,
        CacheWriter(root, load_manifest(root)) as two,
        one.claims.alone("t/logits"),
    ):
        thread = threading.Thread(target=two.withdraw, args=(records(root)[2, 1],))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert len(records(root)) == 8
        compact(one.store, "t/logits")
        assert len(records(root)) == 8
        one.claims.release([Unit("t/logits", -1, 0)])
        thread.join()
        assert (2, 1) not in records(root)


def test_the_loser_of_a_race_for_a_name_leaves_no_output_with_the_winner(small: Path) -> None:
    """Both saw a cache without the teacher; they are different, and one of them keeps more."""
    outputs = tools.outputs_of()
    with CacheWriter(small, load_manifest(small)) as writer:
        (small / "teachers/t/stats.json").unlink()  # the winner keeps logits only
        writer.store.teachers.pop("t")
        with pytest.raises(IdentityError):
            writer.add_teacher(tools.record_of("t", weights="other", outputs=outputs))
    assert [path.name for path in sorted((small / "teachers/t").iterdir())] == ["logits.json", "teacher.json"]


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="no hard links"):
        create_text(tmp_path / "a", "x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_answer_was_lost_is_found_to_be_the_own_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the server made the link, the answer got lost, the client asks again and hears that it is there."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert create_text(tmp_path / "a", "x", tmp_path)
    assert not create_text(tmp_path / "a", "y", tmp_path)
    assert (tmp_path / "a").read_text() == "x"


# --- litter ----------------------------------------------------------------------------------------


def dead_name() -> str:
    return scratch_name().replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")


def test_all_litter_is_found_counted_and_removed_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    tools.fill(root)
    layout = Layout(root)
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.withdraw(records(root)[3, 1])
    skeleton = tmp_path / f".c.kd.{dead_name()}.tmp"
    (skeleton / "tmp").mkdir(parents=True)
    litter = {
        layout.tmp / dead_name(): 10,
        layout.tmp / "of-an-older-kd-4711": 20,
        layout.commits / f"t/.logits.jsonl.{dead_name()}.tmp": 30,
        root / f".manifest.json.{dead_name()}.tmp": 40,
        skeleton / "manifest.json": 50,
    }
    for path, size in litter.items():
        path.write_bytes(bytes(size))
    os.utime(layout.tmp / "of-an-older-kd-4711", (1, 1))
    dead = Claims(layout)
    dead._owner = replace(dead._owner, pid=2**22 + 1)
    assert dead.acquire(UNIT)
    chunk = root / "data.zarr/teachers/t/logits/c.3.1.0"
    litter |= {layout.claim(UNIT): layout.claim(UNIT).stat().st_size, chunk: chunk.stat().st_size}
    kept = {path for path in root.rglob("*") if path.is_file()} - litter.keys()
    named = {str(path) for path in litter} - {str(skeleton / "manifest.json")} | {str(skeleton)}
    planned = collect_garbage(root, dry_run=True)
    assert all(path.exists() for path in litter)
    done = collect_garbage(root)
    assert planned == done
    assert set(done.paths) == named
    assert (done.files, done.bytes) == (7, sum(litter.values()))
    assert {path for path in root.rglob("*") if path.is_file()} == kept
    assert not skeleton.exists()
    assert collect_garbage(root).paths == ()


def test_what_a_live_writer_works_on_is_no_litter(tmp_path: Path) -> None:
    root = tmp_path / "c.kd"
    tools.fill(root)
    layout = Layout(root)
    with CacheWriter(root, load_manifest(root)) as writer:
        for block in (2, 3):
            writer.withdraw(records(root)[block, 0])
        here, far = Claims(layout), Claims(layout)
        far._owner = replace(far._owner, host="elsewhere")
        assert here.acquire(Unit("t/logits", 2, 0))
        assert far.acquire(Unit("t/logits", 3, 0))
        ours, theirs = layout.tmp / scratch_name(), layout.tmp / f"{'0' * 12}-1-{'0' * 16}"
        skeleton = tmp_path / f".c.kd.{scratch_name()}.tmp"
        for path in (ours, theirs, skeleton):
            path.write_bytes(b"x")
        os.utime(ours, (1, 1))  # slow, but alive
        os.utime(skeleton, (1, 1))
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert collect_garbage(root, dry_run=True).files == 0
        assert collect_garbage(root).files == 0
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
        old = layout.claim(Unit("t/logits", 3, 0)).stat().st_mtime - 601
        for path in (theirs, layout.claim(Unit("t/logits", 3, 0))):
            os.utime(path, (old, old))
        assert collect_garbage(root).files == 3  # both, and the chunk of block 3


def test_collecting_garbage_under_the_hands_of_writers_takes_nothing_from_them(
    server: Server, tmp_path: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    root, log, watch = tmp_path / "c.kd", tmp_path / "log", Watch(tmp_path / "c.kd")
    server.wait(server.fill(root, log, names=NAMES, rows=ROWS, backend="zarr", kill_at=400))
    for kill_at in (300, 300, None):
        running = [
            server.fill(root, log, names=NAMES, rows=ROWS, backend="zarr", pause=0.001, kill_at=kill_at)
            for _ in range(2)
        ]
        while any(is_running(pid) for pid in running):
            collect_garbage(root)
        assert {server.wait(pid) for pid in running} <= {0, -signal.SIGKILL}
        watch.look()
    assert_finished(root, whole["zarr"])


# --- full and broken disks -------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own; calling it again with other options changes it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        how = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", place], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.75, 0.9])
def test_a_full_disk_stops_the_run_and_keeps_what_was_committed(
    disk: Callable[[str], Path], whole: dict[str, dict[str, bytes]], backend: BackendName, share: float
) -> None:
    """From a disk on which not even an empty cache fits to one on which the last records do not."""
    pages = sum(-(-len(content) // 4096) for content in whole[backend].values()) + UNITS  # a record each
    root = disk(f"size={int(4 * share * pages)}k") / "c.kd"
    watch = Watch(root)
    for _ in range(3):
        with pytest.raises(NoSpaceError) as caught:
            tools.fill(root, NAMES, ROWS, backend=backend)
        assert "Free some space" in caught.value.hint
        watch.look()
        if root.exists():
            assert_clean_but_for_chunks(root)
    disk("size=20m")
    tools.fill(root, NAMES, ROWS, backend=backend)
    watch.look()
    assert_finished(root, whole[backend])


def assert_clean_but_for_chunks(root: Path) -> None:
    """What failed is taken away, also on a full disk; a chunk without its record is written again in place."""
    assert not [path for path in (root / "tmp").iterdir() if path.is_file()]
    assert not [path for path in (root / "claims").rglob("*") if path.is_file()]
    assert all("/c." in path for path in collect_garbage(root, dry_run=True).paths)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_disk_that_becomes_read_only_in_the_midst(
    disk: Callable[[str], Path],
    whole: dict[str, dict[str, bytes]],
    backend: BackendName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, real, count = disk("size=20m") / "c.kd", tools.unit_arrays, 0

    def unit_arrays(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 50:
            disk("ro")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tools, "unit_arrays", unit_arrays)
    with pytest.raises(StorageError, match="Read-only"):
        tools.fill(root, NAMES, ROWS, backend=backend)
    watch = Watch(root)
    watch.look()
    assert len(watch.seen) == 49
    disk("rw")
    assert tools.fill(root, NAMES, ROWS, backend=backend) == UNITS - 49
    watch.look()
    assert_finished(root, whole[backend])


def test_the_server_counts_steps(server: Server, tmp_path: Path) -> None:
    """The harness itself: a run that is killed after its last step is not killed at all."""
    job = {"names": ["t"], "rows": 32, "backend": "zarr"}
    assert server.wait(server.fill(tmp_path / "a", tmp_path / "log", **job)) == 0
    count = steps(tmp_path / "log")
    assert server.wait(server.fill(tmp_path / "b", tmp_path / "log", **job, kill_at=count + 1)) == 0
    assert server.wait(server.fill(tmp_path / "c", tmp_path / "log", **job, kill_at=count)) == -9
