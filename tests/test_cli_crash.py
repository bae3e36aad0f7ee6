"""``kd cache-teachers`` with decode processes, killed, signalled and short of disk; forked for speed, else as it is."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_tools import payload
from conftest import make_folder
from crash_tools import Server, Watch, assert_clean

BLOCKS = 17
BASE = ("--block-rows", 32, "--batch-size", 16, "--workers", 2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(
        "h5py", "kdcli.extract.extract", "kdcli.extract.pipeline", "kdcli.models.spec", "kdcli.models.teacher",
        "kdcli.data.sources",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", classes=4, per_class=130)


class Kd:
    """``kd cache-teachers`` over the data, in this test's folder."""

    def __init__(self, server: Server, data: Path, teacher: str, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._command = ("cache-teachers", data, "--teacher", f"a={teacher}")

    def start(self, cache: Path, *options: object, env: dict[str, str] | None = None) -> int:
        return self._server.kd(
            *self._command, "--cache", cache, *(options or BASE), cwd=self._folder, err=self._folder / "err",
            env={"XDG_CACHE_HOME": str(self._folder / ".cache"), **(env or {})},
        )  # fmt: skip

    def wait(self, pid: int) -> tuple[int, str]:
        """Exit code, and what was said since the last call."""
        code = self._server.wait(pid, 120)
        said = (self._folder / "err").read_text()
        (self._folder / "err").write_text("")
        assert "Traceback" not in said, said
        return code, said

    def run(self, cache: Path, *options: object, env: dict[str, str] | None = None) -> tuple[int, str]:
        return self.wait(self.start(cache, *options, env=env))


@pytest.fixture
def kd(server: Server, data: Path, tmp_path: Path, teachers: dict[str, str]) -> Kd:
    return Kd(server, data, teachers["a"], tmp_path)


@pytest.fixture(scope="module")
def whole(
    server: Server, data: Path, teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """What an uninterrupted run leaves, by backend."""
    folder = tmp_path_factory.mktemp("whole")
    kd = Kd(server, data, teachers["a"], folder)
    for backend in ("zarr", "hdf5"):
        code, said = kd.run(folder / backend, *BASE, "--backend", backend)
        assert code == 0, said
    return {backend: payload(folder / backend) for backend in ("zarr", "hdf5")}


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def done(root: Path) -> int:
    return len(list((root / "commits").rglob("*-*.json")))


def until_done(root: Path, units: int) -> None:
    until(lambda: done(root) >= units)


def assert_finished(root: Path, expected: dict[str, bytes]) -> None:
    Watch(root).look()
    assert payload(root) == expected
    assert_clean(root)


# --- kill -9 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_groups_killed_at_random_instants(
    kd: Kd, tmp_path: Path, whole: dict[str, dict[str, bytes]], backend: str
) -> None:
    """Two jobs with two decode processes each; whole groups die, as a scheduler kills them."""
    root, draw = tmp_path / "c.kd", random.Random(3)
    watch = Watch(root)
    for _ in range(3):
        before = done(root)
        jobs = [kd.start(root, *BASE, "--backend", backend) for _ in range(2)]
        until_done(root, before + draw.randrange(1, 12))
        for job in jobs:
            os.killpg(job, signal.SIGKILL)
        assert {kd.wait(job)[0] for job in jobs} <= {0, -signal.SIGKILL}
        watch.look()
    code, said = kd.run(root, *BASE, "--backend", backend)
    assert code == 0, said
    watch.look()
    assert_finished(root, whole[backend])


@pytest.mark.parametrize(
    ("shard", "names"), [("srun", ("SLURM_PROCID", "SLURM_NTASKS")), ("torchrun", ("RANK", "WORLD_SIZE"))]
)
def test_a_rank_dies_and_the_step_is_requeued(
    kd: Kd, tmp_path: Path, whole: dict[str, dict[str, bytes]], shard: str, names: tuple[str, str]
) -> None:
    root = tmp_path / "c.kd"
    ranks = [{names[0]: str(rank), names[1]: "2"} for rank in range(2)]
    options = (*BASE[:-1], 1, "--shard", shard)
    jobs = [kd.start(root, *options, env=rank) for rank in ranks]
    until_done(root, 4)
    os.killpg(jobs[0], signal.SIGKILL)
    assert [kd.wait(job)[0] for job in jobs] == [-signal.SIGKILL, 0]
    watch = Watch(root)
    watch.look()
    assert 0 < len(watch.seen) < 4 * BLOCKS
    jobs = [kd.start(root, *options, env=rank) for rank in ranks]
    assert [kd.wait(job)[0] for job in jobs] == [0, 0]
    watch.look()
    assert_finished(root, whole["zarr"])


# --- signals ---------------------------------------------------------------------------------------


def test_every_signal_to_the_whole_group_keeps_what_is_finished(
    kd: Kd, tmp_path: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    root = tmp_path / "c.kd"
    watch = Watch(root)
    for number, code in (
        (signal.SIGTERM, 75),
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 75),
    ):
        before = done(root)
        job = kd.start(root)
        until_done(root, before + 1)
        os.killpg(job, number)
        if number == signal.SIGINT:
            time.sleep(0.1)
            os.killpg(job, number)  # who presses ^C presses it twice
        found, said = kd.wait(job)
        assert found == code, said
        assert len([line for line in said.splitlines() if line.startswith(("error:", "hint:"))]) == 2, said
        watch.look()
        assert before < len(watch.seen) < 4 * BLOCKS
        assert not [path for path in (root / "claims").rglob("*") if path.is_file()]
        assert not [path for path in (root / "tmp").iterdir() if path.is_file()]
    code, said = kd.run(root)
    assert code == 0, said
    watch.look()
    assert_finished(root, whole["zarr"])


@pytest.fixture(scope="module")
def long_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that make one task of some seconds."""
    return make_folder(tmp_path_factory.mktemp("long") / "images", classes=2, per_class=1200)


@pytest.mark.parametrize("how", ["no grace", "second signal"])
def test_a_task_is_dropped_without_grace_or_at_a_second_signal(
    server: Server, teachers: dict[str, str], long_task: Path, tmp_path: Path, how: str
) -> None:
    root, kd = tmp_path / "c.kd", Kd(server, long_task, teachers["a"], tmp_path)
    grace = 0 if how == "no grace" else 600
    job = kd.start(root, "--block-rows", 2400, "--batch-size", 1, "--workers", 2, "--grace", grace)
    until(lambda: any((root / "claims").rglob("*-*.json")) if root.exists() else False)
    time.sleep(0.3)
    os.killpg(job, signal.SIGTERM)
    if how == "second signal":
        time.sleep(1.2)
        os.killpg(job, signal.SIGTERM)
    code, said = kd.wait(job)
    assert code == 75, said
    assert "with 1 tasks left" in said, said
    assert done(root) == 0
    assert not [path for path in (root / "claims").rglob("*") if path.is_file()]


# --- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own; calling it again with other options changes it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if mounted else options, "tmpfs", place]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_31_and_the_same_command_goes_on(
    kd: Kd, disk: Callable[[str], Path], whole: dict[str, dict[str, bytes]]
) -> None:
    pages = sum(-(-len(content) // 4096) for content in whole["zarr"].values())
    root = disk(f"size={2 * pages}k") / "c.kd"
    watch = Watch(root)
    for _ in range(2):
        code, said = kd.run(root)
        assert code == 31, said
        assert "Free some space" in said
        watch.look()
        assert watch.seen
        assert not [path for path in (root / "tmp").iterdir() if path.is_file()]
    disk("size=20m")
    code, said = kd.run(root)
    assert code == 0, said
    watch.look()
    assert_finished(root, whole["zarr"])


def test_a_disk_that_becomes_read_only_is_32_and_the_same_command_goes_on(
    kd: Kd, disk: Callable[[str], Path], whole: dict[str, dict[str, bytes]]
) -> None:
    root = disk("size=20m") / "c.kd"
    job = kd.start(root)
    until_done(root, 4)
    disk("ro")
    code, said = kd.wait(job)
    assert code == 32, said
    assert "Read-only" in said
    watch = Watch(root)
    watch.look()
    assert watch.seen
    code, said = kd.run(root)
    assert code == 32, said
    disk("rw")
    code, said = kd.run(root)
    assert code == 0, said
    watch.look()
    assert_finished(root, whole["zarr"])
