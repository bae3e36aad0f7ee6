"""What ``kd doctor`` finds, against what the test arranged or the system says elsewhere."""

import importlib
import os
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kdcli import doctor
from kdcli.doctor import SCHEDULER, Checkup, examine
from kdcli.runtime import parse_shard

ALL_VARIABLES = [name for names in SCHEDULER.values() for name in names]


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALL_VARIABLES, *doctor.HUB_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def words(checkup: Checkup) -> str:
    return "\n".join(f"{problem.message} / {problem.hint}" for problem in checkup.problems)


def test_versions_are_those_of_the_packages() -> None:
    found = examine().versions
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "timm", "zarr", "h5py", "numpy"):
        version = importlib.import_module(name).__version__
        assert version.split("+")[0] == str(found[name]).split("+")[0], name


def test_a_package_that_is_not_there_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    assert examine().versions["no-such-package"] is None


def test_the_processor_is_always_there_and_memory_is_the_kernels() -> None:
    import torch

    checkup = examine()
    names = [device.name for device in checkup.devices]
    assert names == ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    assert set(checkup.devices[0].precisions) == {"bf16", "fp16", "tf32"}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    assert checkup.devices[0].memory_gb == pytest.approx(physical, rel=0.01)
    assert checkup.processors["available"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: A\nflags\t\t: fpu avx512_bf16\n\nflags : avx512_fp16\n", ("A", "yes", "emulated")),
        ("model name : B\nflags : fpu amx_bf16 avx512_fp16", ("B", "yes", "yes")),
        ("Features : fp asimd asimdhp\n", ("processor", "emulated", "yes")),
        ("", ("processor", "unknown", "unknown")),
    ],
)
def test_precisions_of_a_processor_follow_its_flags(
    text: str, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if str(path) == "/proc/cpuinfo":
            if not text:
                raise FileNotFoundError
            return text
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    device = examine().devices[0]
    assert (device.title, device.precisions["bf16"], device.precisions["fp16"]) == expected


def test_without_a_usable_torch_the_rest_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checkup = examine()
    assert [device.name for device in checkup.devices] == ["cpu"]
    assert "torch cannot be imported" in words(checkup)
    assert checkup.extras


def test_folders_say_whether_they_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    folders = examine().folders
    assert list(tmp_path.iterdir()) == before
    assert folders["cache"].path == str(tmp_path / "not/there/yet/kd")
    assert (folders["cache"].exists, folders["cache"].writable) == (False, True)
    assert (folders["cwd"].exists, folders["cwd"].writable) == (True, True)
    assert folders["cwd"].free_gb == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # not even root writes there
    monkeypatch.chdir("/proc")
    checkup = examine()
    assert not checkup.folders["cache"].writable
    assert not checkup.folders["cwd"].writable
    assert "the cache folder /proc/kd cannot be written / Set XDG_CACHE_HOME" in words(checkup)


def test_a_removed_working_folder_is_a_problem_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "cwd" in examine().folders


@pytest.mark.parametrize(
    ("variables", "models", "datasets"),
    [
        ({}, False, False),
        ({"HF_HUB_OFFLINE": "1"}, True, True),
        ({"HF_HUB_OFFLINE": "0"}, False, False),
        ({"HF_HUB_OFFLINE": "yes"}, True, True),
        ({"TRANSFORMERS_OFFLINE": "1"}, True, True),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False, False),
        ({"HF_DATASETS_OFFLINE": "1"}, False, True),
    ],
)
def test_offline_flags_are_read_as_the_hub_reads_them(
    variables: dict[str, str], models: bool, datasets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hub = examine().hub
    assert (hub["models_offline"], hub["datasets_offline"]) == (models, datasets)
    assert hub["variables"] == variables
    # Oracle: the hub's own constants, made in a fresh process of the same environment.
    import subprocess

    code = "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME, c.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(models), hub["home"], hub["cache"]]


@pytest.mark.parametrize(
    ("name", "variables", "gives"),
    [
        ("array", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, "2/4"),
        (
            "array",
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
             "SLURM_ARRAY_TASK_STEP": "2"},
            "2/3",
        ),
        ("array", {"SLURM_ARRAY_TASK_ID": "2"}, None),
        ("array", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        ("srun", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "1/2"),
        ("srun", {"SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, None),
        ("torchrun", {"RANK": "0", "WORLD_SIZE": "8"}, "0/8"),
    ],
)  # fmt: skip
def test_scheduler_variables_are_shown_as_kd_reads_them(
    name: str, variables: dict[str, str], gives: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    shards = examine().shards
    assert shards[name].gives == gives
    assert shards[name].variables == variables
    assert (shards[name].reason is None) == (gives is not None)
    if gives is not None:
        assert str(parse_shard(name)) == gives
    assert all(shards[other].gives is None for other in SCHEDULER if other != name)


def test_limits_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert examine().limits["open_files"] == soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        checkup = examine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert checkup.limits["open_files"] == min(512, soft)
    assert "ulimit -n" in words(checkup)
    usage = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)  # what docker gives without --shm-size
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert "--shm-size" in words(examine())


def test_each_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    groups = declared["project"]["optional-dependencies"]
    extras = examine().extras
    assert {"demo", "datasets", "bench", "dev"} <= set(extras)
    assert set(groups) == set(extras)
    for name, extra in extras.items():
        assert extra.command == f"pip install 'kdcli[{name}]'"
        assert len(extra.packages) == len(groups[name])
    assert extras["dev"].packages["pytest"] == pytest.__version__

    real = metadata.version

    def without_mlxtend(name: str) -> str:
        if name == "mlxtend":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without_mlxtend)
    missing = examine().extras
    assert not missing["demo"].installed
    assert missing["demo"].packages["mlxtend"] is None


def test_the_document_is_json_and_complete() -> None:
    import json
    from dataclasses import fields

    document = examine().document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document) == {field.name for field in fields(Checkup)}
    assert document["devices"][0]["precisions"]["tf32"] == "no"


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((9, 0), None, ("yes", "yes", "yes")),
        ((7, 5), None, ("emulated", "yes", "no")),
        ((9, 0), "6.3", ("yes", "yes", "no")),
    ],
)
def test_what_a_gpu_can_do_follows_its_generation(
    capability: tuple[int, int], hip: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test machine needs a GPU: torch's answers are played."""
    from types import SimpleNamespace

    import torch

    major, minor = capability
    properties = SimpleNamespace(name="A GPU", major=major, minor=minor, total_memory=80 * 10**9)

    def busy(_index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: device is busy")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.version, "hip", hip)
    device = examine().devices[1]
    assert (device.name, device.title, device.memory_gb, device.free_gb) == ("cuda:0", "A GPU", 80.0, 60.0)
    assert tuple(device.precisions[name] for name in ("bf16", "fp16", "tf32")) == expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert examine().devices[1].free_gb is None
