"""``--engine``: supervised workers. Killed ones are replaced, and the cache is that of one process, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import cache_tools as tools
import pytest
from conftest import Shell, make_folder
from store_servers import Faulty
from store_writing import bucket
from test_cache_stores import objects, server, store

from kdcli.cache.claims import Owner, is_running, read_owner
from kdcli.cache.layout import Layout, Unit
from kdcli.cache.stores.pull import Choice, pull
from kdcli.cache.stores.push import push
from kdcli.engines import local, on_ray, supervisor
from kdcli.engines.base import Attempt, Engine, Job, Outcome
from kdcli.engines.config import EngineOptions
from kdcli.engines.opening import open_engine
from kdcli.errors import (
    ConfigError,
    DeviceError,
    IdentityError,
    KdError,
    MissingExtraError,
    UsageError,
    raised_elsewhere,
)
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.extract.overseen import OverseenBucket, OverseenFolder
from kdcli.runtime import StopFlag
from kdcli.training.sweep_workers import shared_out
from kdcli.types import Difference

__all__ = ["server", "store"]  # fixtures
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
SECONDS = 300.0
"""After which a test gives up; nothing asserts how long anything takes."""


# --- real workers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Images, a teacher that takes its time, and the cache that one process made."""

    images: Path
    teacher: str
    alone: Path

    def command(self, root: Path | str, *more: str) -> list[str]:
        words = [self.images, "--cache", root, "--teacher", f"t={self.teacher}", "--block-rows", 32]
        return [sys.executable, "-m", "kdcli", "cache-teachers", *map(str, words), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    import torch

    from kdcli.models.export import export_model
    from kdcli.models.spec import open_model

    root = tmp_path_factory.mktemp("engines")
    make_folder(root / "images", classes=3, per_class=64)
    names = [f"class{label}" for label in range(3)]
    torch.manual_seed(0)
    model = open_model("resnet18", weights="random", num_classes=3, image_size=64)
    export_model(model, root / "teacher", names)
    made = Place(root / "images", f"local-dir:{root / 'teacher'}", root / "alone.kd")
    subprocess.run(made.command(made.alone, "--workers", "0"), check=True, capture_output=True)
    return made


def owners_in(cache: Path | str) -> dict[str, Owner]:
    """Of all claims, by name."""
    if isinstance(cache, Path):
        return {path.name: read_owner(path) for path in (cache / "claims").rglob("*.json")}
    place, found = bucket(cache), {}
    for name in place.versions("claims"):
        with suppress(FileNotFoundError):  # given back
            if "/probe/" not in name:
                found[name] = Owner(**json.loads(place.read(name))["owner"])
    return found


@contextmanager
def holders(running: subprocess.Popen[str], cache: Path | str, *lives: str) -> Iterator[list[int]]:
    """The processes of workers' lives, such as ``1.0``: the first of worker 1. Each has claimed something, and stands
    still until the block ends, so that the others cannot finish without it."""
    found: dict[str, int] = {}
    until = time.monotonic() + SECONDS
    try:
        while not found.keys() >= set(lives):
            assert running.poll() is None, f"ended before {lives} had claimed something: {found}"
            assert time.monotonic() < until, f"{lives} never claimed anything: {found}"
            for owner in owners_in(cache).values():
                life = owner.worker.rpartition("-")[2]
                if owner.pid is not None and life and life not in found and is_running(owner.pid):
                    with suppress(ProcessLookupError):
                        os.kill(owner.pid, signal.SIGSTOP)
                        found[life] = owner.pid
            time.sleep(0.01)
        yield [found[life] for life in lives]
    finally:
        for pid in found.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def equal(root: Path, place: Place) -> None:
    """Byte-equal to one process's, and nothing is left of those who died."""
    assert tools.payload(root) == tools.payload(place.alone)
    assert not [path for path in Layout(root).claims.rglob("*") if path.is_file()]
    compared = subprocess.run(
        [sys.executable, "-m", "kdcli", "cache", "diff", str(root), str(place.alone)], capture_output=True
    )
    assert compared.returncode == 0, compared.stdout


ENGINES = {
    "local": ("--engine", "local"),
    "submitit": ("--engine", "submitit", "--address", "local"),
    "ray": ("--engine", "ray", "--address", "local"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_workers_are_replaced_and_the_cache_is_that_of_one_process(
    tmp_path: Path, place: Place, engine: str
) -> None:
    root = tmp_path / "c.kd"
    command = place.command(root, *ENGINES[engine], "--num-workers", "2", "--json")
    running = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for life in ("1.0", "0.0", "0.1"):
        with holders(running, root, life) as (pid,):
            actor = engine == "ray" and life == "0.0"  # what is left when a node is lost
            os.kill(parent(pid) if actor else pid, signal.SIGKILL)
    out, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, err
    assert err.count("; what it held is free, and another takes its place") == 3
    assert err.count(" was killed by SIGKILL; ") == (2 if engine == "ray" else 3)
    equal(root, place)
    tasks = json.loads(out)["teachers"]["t"]["tasks"]
    assert tasks == {"total": 6, "done": 6, "written": 6}
    (logs,) = (tmp_path / "c.kd.logs").iterdir()
    assert (logs / "worker-0.log").read_text().count("--- worker 0 on ") == 3
    assert (logs / "worker-1.log").read_text().count("--- worker 1 on ") == 2


def test_a_killed_worker_of_a_cache_in_a_bucket(store: Faulty, tmp_path: Path, place: Place) -> None:
    url, freed = "s3://bucket/team/w", set[str]()
    command = place.command(
        url, "--engine", "local", "--num-workers", "2", "--claim-timeout", "9999", "--json"
    )
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def held(life: str) -> set[str]:
        return {name for name, owner in owners_in(url).items() if owner.worker.endswith(f"-{life}")}

    with holders(running, url, "0.0", "1.0") as (_, pid):
        (log,) = tmp_path.glob("w.logs/*/worker-1.log")
        before = held("1.0")

        def fault(method: str, path: str, _: int) -> None:
            name = path.partition("/team/w/")[2]
            if method == "PUT" and name in before and log.read_text().count("--- worker 1 on ") == 1:
                freed.add(name)

        store.fault = fault
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + SECONDS
        while not held("1.1"):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert freed == before != set(), "it went before another took its place: by who knew it dead"
    out, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, err
    assert err.count("; what it held is free, and another takes its place") == 1
    assert {name for name in bucket(url).versions("claims") if "/probe/" not in name} == set()
    pull(url, tmp_path / "pulled.kd", Choice())
    equal(tmp_path / "pulled.kd", place)
    assert json.loads(out)["teachers"]["t"]["tasks"] == {"total": 6, "done": 6, "written": 6}
    assert "very/secret+key" not in out + err + log.read_text()


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("s3://nobucket/c", 32, "no bucket 'nobucket'"),
        ("file:///tmp/c.kd", 2, "Give /tmp/c.kd"),
        ("hf://datasets/org/c", 2, "no conditional writes"),
    ],
)
def test_no_worker_starts_where_none_could_write(
    store: Faulty, tmp_path: Path, kd: Callable[..., Shell], place: Place, url: str, code: int, words: str
) -> None:
    command = place.command(url, "--engine", "local", "--num-workers", "2")
    kd(*command[3:], "--logs", tmp_path / "logs").refused(code, words)
    assert not (tmp_path / "logs").exists()


def test_what_a_supervisor_sees_of_joined_records_in_a_bucket(store: Faulty, place: Place) -> None:
    push(place.alone, "s3://bucket/w")
    overseen, parts = OverseenBucket(bucket("s3://bucket/w")), ["samples", "t/logits", "u/logits"]
    records = {name: data for name, data in objects(store).items() if name.startswith("w/commits/t/logits/")}
    assert overseen.look(parts) == OverseenFolder(place.alone).look(parts)
    lines = b"".join(json.dumps(json.loads(data)).encode() + b"\n" for data in records.values())
    store.client.put_object(Bucket="bucket", Key="w/commits/t/logits.jsonl", Body=lines)  # type: ignore[attr-defined]
    for name in records:
        store.client.delete_object(Bucket="bucket", Key=name)  # type: ignore[attr-defined]
    store.seen.clear()
    for _ in range(3):
        look = overseen.look(parts)
        assert look == OverseenFolder(place.alone).look(parts)
    assert look is not None
    assert look.has(Unit("t/logits", 5, 0))
    assert not look.has(Unit("u/logits", 5, 0))
    assert sum(path.endswith("logits.jsonl") for _, path in store.seen) == 1
    assert len(store.seen) == 3 * 2 + 1, "a manifest and a listing each, and what is joined once"
    assert OverseenBucket(bucket("s3://bucket/nothing")).look(parts) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_ends_all_and_the_same_command_goes_on(
    tmp_path: Path, place: Place, number: int, code: int
) -> None:
    root = tmp_path / "c.kd"
    command = place.command(root, "--engine", "local", "--num-workers", "2")
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with holders(running, root, "0.0", "1.0") as pids:
        running.send_signal(number)
    _, err = running.communicate(timeout=SECONDS)
    assert running.returncode == code, err
    assert err.count("error: ") == 1
    assert "images left; what is finished is kept" in err
    assert not any(map(is_running, pids))
    assert not [path for path in Layout(root).claims.rglob("*") if path.is_file()]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    equal(root, place)


def test_workers_end_with_a_supervisor_that_was_killed(tmp_path: Path, place: Place) -> None:
    root = tmp_path / "c.kd"
    command = place.command(root, "--engine", "local", "--num-workers", "2", "--grace", "0")
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, text=True)
    with holders(running, root, "0.0", "1.0") as pids:
        running.kill()
        running.wait()
    until = time.monotonic() + SECONDS
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    equal(root, place)


def test_what_a_worker_refuses_is_refused_once_with_its_code(
    tmp_path: Path, place: Place, kd: Callable[..., Shell]
) -> None:
    command = place.command(
        tmp_path / "c.kd", "--engine", "local", "--num-workers", "2", "--min-accuracy", "1"
    )
    found = kd(*command[3:], "--json")
    found.refused(12, "labelled images right", "worker", "its log:")
    assert found.json["error"]["code"] == 12
    config = CacheConfig(cache="c.kd", teacher="t=x", engine="local", wait=False)
    with pytest.raises(UsageError, match="--no-wait is of one process"):
        cache_teachers(config)


# --- sweeps -----------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    found = []
    for number in numbers:
        with suppress(FileNotFoundError, ProcessLookupError):
            if parent(number) == pid:
                found.append(number)
    return found


def test_a_sweep_over_workers_gives_the_students_of_one_process(tmp_path: Path, images: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("grid: {seed: [0, 1, 2], lr: [0.1, 0.01]}")
    words = [
        images,
        "--test",
        images,
        "--method",
        "labels-only",
        "--student",
        "test_resnet",
        "--image-size",
        "32",
    ]
    words += [
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--sweep",
        "sweep.yaml",
    ]
    command = [sys.executable, "-m", "kdcli", "train-student", *map(str, words), "--out"]
    subprocess.run([*command, "one"], check=True, cwd=tmp_path, capture_output=True)
    running = subprocess.Popen(
        [*command, "many", "--engine", "local", "--num-workers", "2", "--json"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + SECONDS
    while not list((tmp_path / "many").glob("seed*/run.json")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(children(running.pid)[0], signal.SIGKILL)
    out, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, err
    assert err.count("another takes its place") == 1
    names = {f"seed{seed}-lr{lr}" for seed in range(3) for lr in (0.1, 0.01)}
    assert {one["name"] for one in json.loads(out)["students"]} == names
    assert json.loads((tmp_path / "many/sweep.json").read_text()) == json.loads(out)
    for name in names:
        weights = [tmp_path / sweep / name / "export/model.safetensors" for sweep in ("one", "many")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), name


@pytest.mark.parametrize(("students", "workers"), [(1, 1), (1, 4), (5, 2), (6, 4), (7, 7), (1000, 16)])
def test_neighbours_of_a_sweep_stay_together(students: int, workers: int) -> None:
    names = [str(number) for number in range(students)]
    parts = shared_out(names, workers)
    assert [name for part in parts for name in part] == names
    assert len(parts) == min(students, workers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_engine_of_one_student_is_refused(kd: Callable[..., Shell], images: Path) -> None:
    line = [images, "--method", "labels-only", "--student", "test_resnet", "--out", "o", "--engine", "local"]
    kd("train-student", *line).refused(2, "--engine is of --sweep", "torchrun")


# --- the supervisor, with workers that are told what becomes of them -----------------------------------


class Fake(Attempt):
    """A worker that ends as it is told: after so many looks, with an outcome."""

    def __init__(self, log: list[str], job: Job, looks: int, outcome: Outcome | None) -> None:
        self._log, self._job, self._looks, self._outcome = log, job, looks, outcome

    @property
    def started(self) -> bool:
        return self._looks != -1

    def poll(self) -> Outcome | None:
        self._looks -= self._looks > 0
        return self._outcome if self._looks == 0 else None

    def stop(self) -> None:
        self._log.append(f"stop {self._job.number}")
        self._looks = 0
        self._outcome = self._outcome or Outcome(75)

    def kill(self) -> None:
        self._log.append(f"kill {self._job.number}")

    def where(self) -> str:
        return "somewhere"


@dataclass
class Script(Engine, supervisor.Task):
    """An engine and a task in one: the lives of each worker, and how much is done at each look."""

    lives: dict[int, list[tuple[int, Outcome | None]]]
    progresses: list[tuple[int, int] | None] = field(default_factory=lambda: [(0, 9)])
    log: list[str] = field(default_factory=list)
    title, unit = "cache", "images"

    def start(self, job: Job) -> Attempt:
        self.log.append(f"start {job.number}")
        assert job.arguments == ("train", str(job.number))
        return Fake(self.log, job, *self.lives[job.number].pop(0))

    def arguments(self, number: int) -> Sequence[str]:
        return ["train", str(number)]

    def progress(self) -> tuple[int, int] | None:
        return self.progresses.pop(0) if len(self.progresses) > 1 else self.progresses[0]

    def bury(self, *workers: str) -> None:
        self.log += [f"bury {worker.rpartition('-')[2]}" for worker in workers]

    def run(self, folder: Path) -> list[Outcome]:
        options = EngineOptions(engine="local", num_workers=len(self.lives))
        return supervisor._Supervisor(self, options, self, folder).run(StopFlag())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.0)


KILLED, GOOD = Outcome(-9, last="its last words"), Outcome(0)


def test_the_dead_are_buried_before_another_life_begins(tmp_path: Path) -> None:
    script = Script({0: [(1, KILLED), (1, KILLED), (5, GOOD)], 1: [(3, GOOD)]})
    assert script.run(tmp_path) == [GOOD, GOOD]
    assert script.log == ["start 0", "start 1", "bury 0.0", "start 0", "bury 0.1", "start 0"]


def test_one_that_dies_again_and_again_ends_the_run_with_its_name_log_and_last_line(tmp_path: Path) -> None:
    script = Script({0: [(-1, None)], 1: [(1, KILLED)] * 9})
    with pytest.raises(
        DeviceError, match=r"worker 1 .*killed by SIGKILL, 3 times .*its last words"
    ) as caught:
        script.run(tmp_path)
    assert str(tmp_path / "worker-1.log") in caught.value.hint
    assert script.log.count("start 1") == 3
    assert "stop 0" in script.log
    assert "kill 0" in script.log


@pytest.mark.parametrize("pause", [0.0, 1e9])
def test_deaths_count_while_nothing_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr(Script, "pause", pause)  # looks at the disk may be as rare as they like
    script = Script({0: [(1, KILLED)] * 5 + [(1, GOOD)]}, [(done, 9) for done in range(7)])
    assert script.run(tmp_path) == [GOOD]


def test_a_refusal_is_that_of_all(tmp_path: Path) -> None:
    refused = Outcome(21, IdentityError("other data", "use another", [Difference("rows", 1, 2)]).document())
    script = Script({0: [(9, GOOD)], 1: [(1, refused)]})
    with pytest.raises(IdentityError, match="other data: rows was 1, is 2") as caught:
        script.run(tmp_path)
    assert (caught.value.exit_code, caught.value.hint) == (21, "use another")
    assert "stop 0" in script.log


def test_every_error_comes_back_as_it_was() -> None:
    for kind in KdError.__subclasses__():
        error = raised_elsewhere(kind("what", "do").document())
        assert (type(error), error.message, error.hint) == (kind, "what", "do")


def test_a_worker_that_never_starts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.01)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.02)

    script = Script({0: [(9, GOOD)], 1: [(-1, None)]})
    stop, options = StopFlag(), EngineOptions(engine="local", num_workers=2)
    script.progresses = [(0, 9)] * 20 + [(9, 9)]
    real = script.progress

    def progress() -> tuple[int, int] | None:
        found = real()
        if found == (9, 9):
            stop.set()
        return found

    monkeypatch.setattr(script, "progress", progress)
    with pytest.raises(KdError) as caught:
        supervisor._Supervisor(script, options, script, tmp_path).run(stop)
    assert caught.value.exit_code == 75
    told = [line for line in capsys.readouterr().err.splitlines() if "has not started" in line]
    assert told
    assert all(line.startswith("warning: worker 1 has not started after") for line in told)


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_workers": 2}, "--num-workers is of --engine"),
        ({"engine": "ray", "slurm": ("time=5",)}, "--slurm is of --engine submitit"),
        ({"engine": "local", "address": "auto"}, "--address is of --engine ray or submitit"),
        ({"engine": "submitit", "slurm": ("partition",)}, "is not KEY=VALUE"),
    ],
)
def test_options_that_do_not_belong_together(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**options)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("submitit", "submitit")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package) as caught:
        open_engine(EngineOptions(engine=engine), tmp_path)
    assert caught.value.hint == f"pip install 'kdcli[{'ray' if engine == 'ray' else 'slurm'}]'"


def test_without_slurm_submitit_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="no cluster 'slurm'"):
        open_engine(EngineOptions(engine="submitit"), tmp_path)


def test_a_setting_that_slurm_does_not_know(tmp_path: Path) -> None:
    options = EngineOptions(engine="submitit", address="local", slurm=("partitoin=gpu",))
    with pytest.raises(UsageError, match="partitoin"):
        open_engine(options, tmp_path)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_ray_that_does_not_answer_is_named_in_a_stated_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_port: int
) -> None:
    monkeypatch.setattr(on_ray, "ANSWER_SECONDS", 4.0)
    options = EngineOptions(engine="ray", address=f"127.0.0.1:{silent_port}")
    with pytest.raises(DeviceError, match=rf"no Ray answers at 127.0.0.1:{silent_port} within 4 s"):
        open_engine(options, tmp_path)
    with pytest.raises(DeviceError, match="at nobody"):
        open_engine(options.model_copy(update={"address": "nobody"}), tmp_path)


def test_each_local_worker_sees_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(local, "Process", lambda text: SimpleNamespace(**json.loads(text)["environment"]))

    def seen(workers: int, each: int | None) -> list[str | None]:
        engine = local.LocalEngine(EngineOptions(engine="local", num_workers=workers, gpus_per_worker=each))
        jobs = [Job(f"r-{n}.0", n, (), ".", "log", {"A": "1"}) for n in range(workers)]
        return [engine.start(job).CUDA_VISIBLE_DEVICES for job in jobs]  # type: ignore[attr-defined]

    assert seen(2, 2) == ["4,5", "6,7"]
    assert seen(4, 1) == ["4", "5", "6", "7"]
    assert seen(6, None) == ["4", "5", "6", "7", "4", "5"]
    assert seen(2, 0) == ["", ""]
    with pytest.raises(UsageError, match="5 workers with --gpus-per-worker 1 take 5 GPUs, and there are 4"):
        seen(5, 1)
