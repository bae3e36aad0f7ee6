"""The inner loop on a device that is told when its work is done: what runs while what is pending, and how it ends."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_cache as small
import torch
from conftest import Shell

import kdcli.extract.collecting as collecting_module
import kdcli.extract.lanes as lanes_module
from kdcli.cache.layout import Unit
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter
from kdcli.data.drawing import show
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, DeviceError, StoppedEarly
from kdcli.extract import cache_teachers
from kdcli.extract.batches import Launcher
from kdcli.extract.config import CacheConfig
from kdcli.extract.publishing import Publisher
from kdcli.extract.worker import Worker
from kdcli.geometry import Render
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output

ROWS = 32
BLOCKS = 8
PATIENCE = 60.0
"""Seconds after which a test gives up waiting for what should have happened."""


class Gates:
    """A device that computes at once and says so when it is told; and what has been done so far.

    ``started`` counts what has begun of each stage, ``finished`` what is done.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.started = dict.fromkeys(("up", "launch", "device", "write"), 0)
        self.finished = dict.fromkeys(self.started, 0)
        self.allowed = {"device": 0, "write": 0}
        self.most_on_device = 0
        self.full = 0

    def begin(self, stage: str) -> int:
        with self._changed:
            self.started[stage] += 1
            flying = self.started["launch"] - self.finished["device"]
            self.most_on_device = max(self.most_on_device, flying)
            self._changed.notify_all()
            return self.started[stage]

    def end(self, stage: str) -> None:
        with self._changed:
            self.finished[stage] += 1
            self._changed.notify_all()

    def await_turn(self, stage: str, number: int) -> None:
        """Be the work of a stage that is pending until it is allowed."""
        self.until(lambda: self.allowed[stage] >= number)

    def allow(self, stage: str, count: int) -> None:
        with self._changed:
            self.allowed[stage] = count
            self._changed.notify_all()

    def until(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(happened, PATIENCE), (self.started, self.finished, self.allowed)

    # --- torch.get_device_module's part ---------------------------------------------------------

    class Stream:
        def __init__(self, *_: Any) -> None:
            pass

        def wait_stream(self, _: Any) -> None:
            pass

    def Event(self) -> "Pending":
        return Pending(self)

    def stream(self, _: Any) -> Any:
        return nullcontext()

    def current_stream(self, _: Any) -> Any:
        return self.Stream()


class Pending:
    """The event behind a batch."""

    def __init__(self, gates: Gates) -> None:
        self._gates = gates

    def record(self, _: Any) -> None:
        self._number = self._gates.begin("device")

    def synchronize(self) -> None:
        self._gates.await_turn("device", self._number)
        self._gates.end("device")


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Gates:
    """The device of a run, and its disk."""
    gates = Gates()
    monkeypatch.setattr(lanes_module.torch, "get_device_module", lambda _: gates)
    launch, upload, finish = Launcher.launch, Launcher._upload, Publisher._finish

    def counted(self: Launcher, batch: Any) -> None:
        gates.begin("launch")
        launch(self, batch)

    def sent(self: Launcher, batch: Any, piece: Any) -> None:
        gates.begin("up")
        upload(self, batch, piece)

    def written(self: Publisher, task: Any) -> None:
        gates.await_turn("write", gates.begin("write"))
        finish(self, task)
        gates.end("write")

    class Room(threading.Semaphore):
        """Says when the main thread finds no room."""

        def acquire(self, *_: Any) -> bool:  # type: ignore[override]
            if not super().acquire(blocking=False):
                with gates._changed:
                    gates.full += 1
                    gates._changed.notify_all()
                super().acquire()
            return True

    monkeypatch.setattr(Launcher, "launch", counted)
    monkeypatch.setattr(Launcher, "_upload", sent)
    monkeypatch.setattr(Publisher, "_finish", written)
    monkeypatch.setattr(collecting_module, "Semaphore", Room)
    return gates


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Images of :data:`BLOCKS` blocks, and two teachers."""
    root = tmp_path_factory.mktemp("overlap")
    images = small.write_images(root / "images", {"a": ROWS * BLOCKS // 2, "b": ROWS * BLOCKS // 2})
    return str(images), small.write_teachers(root)


def config(place: tuple[str, dict[str, str]], root: Path, **changes: Any) -> CacheConfig:
    data, teachers = place
    told = {
        "data": data, "cache": root, "teacher": (f"small={teachers['small']}",), "workers": 0, "device": "cpu",
        "batch_size": ROWS, "block_rows": ROWS, "keep": ("logits",),
    }  # fmt: skip
    return CacheConfig(**{**told, **changes})


class Run(threading.Thread):
    """A run beside the test, and how it ended."""

    def __init__(self, asked: CacheConfig) -> None:
        super().__init__(daemon=True)
        self.asked, self.error = asked, None
        self.start()

    def run(self) -> None:
        try:
            cache_teachers(self.asked)
        except BaseException as error:
            self.error = error

    def ended(self) -> BaseException | None:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.error


def test_every_stage_has_work_while_the_others_are_pending_and_no_more_than_that(
    place: tuple[str, dict[str, str]], gates: Gates, tmp_path: Path
) -> None:
    """A task is a batch here, so the numbers of both are the same."""
    run = Run(config(place, tmp_path / "c.kd"))
    # The device is at its first batch: two more are launched behind it, a fourth is up, and there is no room.
    gates.until(lambda: gates.full == 1)
    assert gates.started == {"up": 4, "launch": 3, "device": 3, "write": 0}
    # The first is done: it is being written while the second computes, the third and fourth wait, the fifth is up.
    gates.allow("device", 1)
    gates.until(lambda: gates.full == 2 and gates.started["write"] == 1)
    assert gates.started == {"up": 5, "launch": 4, "device": 4, "write": 1}
    assert gates.finished["write"] == 0
    # A disk that does not keep up: one task is written, one waits with the collector, and the rest stands still.
    gates.allow("device", BLOCKS)
    gates.until(lambda: gates.finished["device"] == 2 and gates.started["launch"] == 4)
    assert gates.started["write"] == 1
    assert run.is_alive()
    gates.allow("write", BLOCKS)
    assert run.ended() is None
    assert gates.most_on_device == collecting_module.BATCHES
    assert gates.finished["write"] == BLOCKS


@pytest.mark.parametrize("slow", ["device", "write"])
def test_the_total_is_the_longest_stage_not_the_sum(
    place: tuple[str, dict[str, str]], gates: Gates, tmp_path: Path, slow: str
) -> None:
    """A clock that ticks once a unit of the slow stage: at each tick all others have done what they can."""
    other = "write" if slow == "device" else "device"
    run = Run(config(place, tmp_path / "c.kd"))
    gates.allow(other, BLOCKS)
    for tick in range(1, BLOCKS + 1):
        # Whenever the slow stage is to begin, its work is there already: it never waits for the others.
        gates.until(lambda: gates.started[slow] >= tick)  # noqa: B023
        ahead = min(BLOCKS, tick + 1)
        gates.until(lambda: gates.started["launch"] >= ahead)  # noqa: B023
        gates.allow(slow, tick)
    assert run.ended() is None


# --- how it ends ---------------------------------------------------------------------------------


def claims(root: Path) -> list[Path]:
    return [path for path in (root / "claims").rglob("*") if path.is_file() and "probe" not in path.name]


def test_what_a_writer_meets_ends_the_run_at_once(
    place: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CacheWriter, unit: Unit, *_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheWriter, "publish", fail)
    run = Run(config(place, tmp_path / "c.kd"))
    assert isinstance(run.ended(), OSError)
    assert claims(tmp_path / "c.kd") == []


def test_what_the_collector_meets_ends_the_run_at_once(
    place: tuple[str, dict[str, str]], gates: Gates, tmp_path: Path
) -> None:
    """Logits that half precision cannot hold: found on the host, while more batches are on the device."""
    real = TeacherRunner.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TeacherRunner, "__call__",
            lambda self, *args: {name: value + 1e6 for name, value in real(self, *args).items()},
        )  # fmt: skip
        run = Run(config(place, tmp_path / "c.kd"))
        gates.until(lambda: gates.full == 1)
        gates.allow("device", 1)  # the others stay pending: nobody waits for them any more
        error = run.ended()
    assert isinstance(error, BadDataError)
    assert "float16" in error.message
    assert claims(tmp_path / "c.kd") == []


def test_a_device_that_vanishes_is_told_and_the_same_command_goes_on(
    place: tuple[str, dict[str, str]], gates: Gates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch is lost on the device: what came before is written, and only the rest is computed again."""

    def lost(self: Pending) -> None:
        if self._number == 3:
            raise torch.AcceleratorError("CUDA error: the launch timed out and was terminated\nmore", 702)

    monkeypatch.setattr(Pending, "synchronize", lost)
    gates.allow("write", BLOCKS)
    error = Run(config(place, tmp_path / "c.kd")).ended()
    assert isinstance(error, DeviceError)
    assert "CUDA error: the launch timed out" in error.message
    assert "same command" in error.hint
    assert claims(tmp_path / "c.kd") == []
    assert gates.finished["write"] == 2
    monkeypatch.undo()
    result = cache_teachers(config(place, tmp_path / "c.kd"))
    assert result.teachers["small"].written == BLOCKS - 2


# --- memory of the device ------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A device whose memory takes so many images of a forward."""
    most = {"images": 20}
    real = TeacherRunner.__init__

    def begin(self: TeacherRunner, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        forward = self._forward

        def full(images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
            if len(images) > most["images"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return forward(images, names)

        self._forward = full

    monkeypatch.setattr(TeacherRunner, "__init__", begin)
    return most


@pytest.mark.usefixtures("tight")
def test_out_of_memory_names_the_batch_size_that_fits(
    place: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=r"out of memory \(running") as caught:
        cache_teachers(config(place, tmp_path / "c.kd"))
    assert caught.value.exit_code == 30
    assert "--batch-size 16 fits" in caught.value.hint
    assert claims(tmp_path / "c.kd") == []


def test_auto_takes_what_fits_records_it_and_a_resume_goes_on_with_it(
    place: tuple[str, dict[str, str]], tmp_path: Path, tight: dict[str, int]
) -> None:
    root = tmp_path / "c.kd"
    cache_teachers(config(place, root, batch_size="auto", shard="0/2"))
    assert CacheReader(root).teachers["small"].compute["batch_size"] == 16
    tight["images"] = 1000  # more would fit now; the recorded number decides the bits
    cache_teachers(config(place, root, batch_size="auto"))
    plain = tmp_path / "plain.kd"
    cache_teachers(config(place, plain, batch_size=16))
    one, other = (CacheReader(path) for path in (root, plain))
    rows = np.arange(ROWS * BLOCKS)
    assert np.array_equal(one.gather("small", "logits", rows, 0), other.gather("small", "logits", rows, 0))


def test_not_even_one_image_is_said(
    place: tuple[str, dict[str, str]], tmp_path: Path, tight: dict[str, int]
) -> None:
    tight["images"] = 0
    with pytest.raises(DeviceError, match="do not fit into the memory") as caught:
        cache_teachers(config(place, tmp_path / "c.kd", batch_size="auto"))
    assert "Not even one image" in caught.value.hint
    assert not (tmp_path / "c.kd").exists()


# --- compiled teachers ---------------------------------------------------------------------------


def test_compiled_is_recorded_and_a_resume_goes_on_with_it(
    place: tuple[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    for module in ("kdcli.models.compiling", "kdcli.extract.fitting"):
        monkeypatch.setattr(f"{module}.require_compiler", lambda _: None)
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=backend))
    root = tmp_path / "c.kd"
    cache_teachers(config(place, root, compile=True, shard="0/2"))
    assert CacheReader(root).teachers["small"].compute["compile"] is True
    first = len(compiled)
    assert first
    torch._dynamo.reset()
    capsys.readouterr()
    cache_teachers(config(place, root))
    assert len(compiled) > first
    assert "going on with --compile, as recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_compiling_where_there_is_no_compiler_is_refused_plainly(
    place: tuple[str, dict[str, str]], kd: Callable[..., Shell], tmp_path: Path
) -> None:
    data, teachers = place
    done = kd(
        "cache-teachers", data, "--cache", "c.kd", "--teacher", f"small={teachers['small']}", "--compile", "--workers",
        0,
        env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
    )  # fmt: skip
    done.refused(30, "torch.compile does not work here on cpu", "Leave --compile out")
    again = kd(
        "cache-teachers", data, "--cache", "c.kd", "--teacher", f"small={teachers['small']}", "--workers", 0
    )
    assert again.code == 0  # as the hint says: nothing was recorded that would go on with it


def test_a_device_that_fails_after_a_stop_signal_is_a_stop(
    place: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise DeviceError("the compiler was killed", "Leave --compile out.")

    monkeypatch.setattr("kdcli.extract.fitting.require_compiler", killed)
    with pytest.raises(
        StoppedEarly, match="stopped by a signal; meanwhile: the compiler was killed"
    ) as caught:
        cache_teachers(config(place, tmp_path / "c.kd", compile=True))
    assert caught.value.exit_code == 75


# --- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [1, 2])
@pytest.mark.parametrize("processes", [0, 2])
def test_what_is_stored_is_what_a_plain_loop_gives(
    place: tuple[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folded: int,
    processes: int,
) -> None:
    """Batches of 13 rows, view by view (or two training views beside each other), to the bit."""
    from kdcli.data.views import Drawer, ViewSet

    data_spec, teachers = place
    of = Worker.of.__func__  # type: ignore[attr-defined]

    def beside(cls: type[Worker], teacher: Any, compute: dict[str, Any], device: str) -> Worker:
        worker: Worker = of(cls, teacher, {**compute, "views_per_forward": folded}, device)
        return worker

    monkeypatch.setattr(Worker, "of", classmethod(beside))
    root = tmp_path / "c.kd"
    cache_teachers(
        config(
            place, root, batch_size=13, workers=processes, views="eval+train:3",
            teacher=tuple(f"{name}={spec}" for name, spec in teachers.items()), keep=("logits", "features"),
        )
    )  # fmt: skip
    held, data = CacheReader(root), open_data(data_spec)
    views = ViewSet.from_document(held.manifest.view_set)
    forwards = [(0,), (1, 2), (3,)] if folded == 2 else [(0,), (1,), (2,), (3,)]
    for name, spec in teachers.items():
        model = open_model(spec)
        render = Render.of(model.preprocess)
        runner = TeacherRunner(model, "cpu", "off", (Output("logits"), Output("features")))
        for block in range(2):
            rows = held.manifest.rows_of(block)
            drawer = Drawer(data, views, [render], rows)
            for start in range(rows.start, rows.stop, 13):
                batch = range(start, min(start + 13, rows.stop))
                images = {row: data.decode(row, data.encoded(row)) for row in batch}
                for some in forwards:
                    pixels = [
                        show(images[row], render)
                        if view == 0
                        else drawer.draw(row, images[row], view)[1][render]
                        for view in some
                        for row in batch
                    ]
                    for kind, values in runner(np.stack(pixels)).items():
                        for view, wanted in zip(
                            some, values.half().numpy().reshape(len(some), len(batch), -1), strict=True
                        ):
                            found = held.gather(name, kind, np.asarray(batch), view)
                            assert np.array_equal(found, wanted), (name, kind, view, start)
