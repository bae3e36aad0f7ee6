"""Shards, signals and files that are whole or absent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli.cgroups import processor_quota
from kdcli.errors import KdError, OutputExistsError, StorageError, UsageError
from kdcli.files import atomic_write_text, holds_files, write_json
from kdcli.reading import read_json
from kdcli.runtime import parse_shard, processor_count, stop_signals, worker_count
from kdcli.training.out import require_folder


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_share_the_blocks_without_overlap(count: int) -> None:
    shards = [parse_shard(f"{index}/{count}") for index in range(count)]
    owners = [[shard.owns(block) for shard in shards].count(True) for block in range(50)]
    assert owners == [1] * 50


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1/0", "1", "a/b", "1/2/3", "", " 1/2"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shard(text)


def test_an_array_that_does_not_start_at_zero_or_steps_is_counted_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"TASK_ID": 14, "TASK_COUNT": 3, "TASK_MIN": 10, "TASK_STEP": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
    assert str(parse_shard("array")) == "2/3"


def test_a_shard_is_never_implied_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert parse_shard(None) is None
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_COUNT"):
        parse_shard("array")


def test_a_stop_signal_raises_a_flag_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"a": float("nan")})
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(StorageError) as caught:
        atomic_write_text(tmp_path / "none" / "b", "x")
    assert isinstance(caught.value, KdError)
    assert isinstance(caught.value, OSError)


def test_a_folder_with_what_a_killed_write_left_is_as_good_as_empty(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from kdcli.files import write_json;"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL);"
        "write_json(Path(sys.argv[1]) / 'run.json', {})"
    )
    assert not holds_files(tmp_path)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert not holds_files(tmp_path)
    require_folder(tmp_path)
    (tmp_path / ".notes.tmp").touch()  # the user's own
    assert holds_files(tmp_path)
    with pytest.raises(OutputExistsError, match="holds no kd run"):
        require_folder(tmp_path)


def test_two_trainings_do_not_spin_each_other_off_the_processors() -> None:
    code = "from kdcli.runtime import calm_openmp; calm_openmp(); import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }

    def spins(**extra: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**clean, **extra}, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert spins() == "2000"
    assert spins(OMP_WAIT_POLICY="ACTIVE") == "None"
    assert spins(GOMP_SPINCOUNT="7") == "7"


def test_a_scheduler_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "x")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UsageError, match="SLURM_PROCID is 'x'"):
        parse_shard("srun")


def test_workers_end_with_a_process_whose_error_still_holds_the_loader() -> None:
    program = """
import torch
from torch.utils.data import DataLoader
from kdcli.workers import worker_setup

loader = DataLoader(list(range(4)), num_workers=1, persistent_workers=True, worker_init_fn=worker_setup(1))
for _ in loader:
    raise ValueError("the traceback holds the loader, and Python waits for its workers at exit")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "ValueError" in done.stderr


# --- processors -----------------------------------------------------------------------------------


def group(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "200000 100000"}, 2),  # docker run --cpus 2
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 50000"}, 1),
        ("0::/../host", {"cpu.max": "400000 100000"}, 4),  # a path of the machine, seen from a container
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        (
            "5:memory:/x\n4:cpu:/job/step",
            {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "50000"},
            5,
        ),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, own: str, files: dict[str, str], quota: int | None
) -> None:
    group(tmp_path, {"own": own, **{f"root/{name}": text for name, text in files.items()}})
    assert processor_quota(tmp_path / "root", tmp_path / "own") == quota
    assert processor_quota(tmp_path / "nothing", tmp_path / "nobody") is None


@pytest.mark.parametrize(
    ("affinity", "quota", "environment", "processors", "workers"),
    [
        (64, None, {}, 64, 16),
        (8, None, {}, 8, 7),
        (64, 2, {}, 2, 1),
        (64, 1, {}, 1, 0),
        (16, None, {"SLURM_CPUS_PER_TASK": "4"}, 4, 3),  # four tasks on a node, none bound to its processors
        (4, None, {"SLURM_CPUS_PER_TASK": "16"}, 4, 3),
        (64, None, {"LOCAL_WORLD_SIZE": "8"}, 64, 7),
        (64, 16, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "32"}, 16, 1),
        (2, None, {"LOCAL_WORLD_SIZE": "8"}, 2, 0),
    ],
)
def test_decode_processes_follow_what_limits_the_job(
    monkeypatch: pytest.MonkeyPatch,
    affinity: int,
    quota: int | None,
    environment: dict[str, str],
    processors: int,
    workers: int,
) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr("kdcli.runtime.processor_quota", lambda: quota)
    assert processor_count() == processors
    assert worker_count(None) == workers
    assert worker_count(40) == 40
