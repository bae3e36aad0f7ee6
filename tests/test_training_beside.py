"""What goes on beside the steps: copies to the device, the next epoch's workers, checkpoints, pixels of tests."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_loop import build, make_batch
from test_training_run import same_student
from test_training_state import make, train
from training_place import Place, make_place

from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, KdError, NoSpaceError, StorageError
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.methods.weighted import LabelsOnly
from kdcli.models.student import LABEL_HEAD
from kdcli.runtime import StopFlag
from kdcli.training import checkpoint, evaluate
from kdcli.training.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint
from kdcli.training.distributed import Ranks, Together
from kdcli.training.evaluate import Conditions, Examinee, ExamRoom, accuracies
from kdcli.training.progress import Progress
from kdcli.training.replay import ViewRule
from kdcli.training.samplers import EpochOrder
from kdcli.training.stream import Stream
from kdcli.training.train import train_student
from kdcli.training.transfers import Fetched, forked_random

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("beside"))


# --- batches ----------------------------------------------------------------------------------


class Loader:
    """Three batches an epoch; notes when an epoch is begun and when a batch is asked for."""

    def __init__(self, order: EpochOrder, events: list[str], broken: int = -1) -> None:
        self.order, self.events, self.broken = order, events, broken

    def __iter__(self) -> Iterator[Batch | KdError]:
        epoch = self.order.epoch
        self.events.append(f"begin {epoch}")
        return self.items(epoch)

    def items(self, epoch: int) -> Iterator[Batch | KdError]:
        for number, _ in enumerate(self.order):
            self.events.append(f"fetch {epoch}.{number}")
            yield BadDataError("broken", "mend it") if number == self.broken else make_batch()


class Device:
    """A device's module that notes what is launched where, in order; it computes nothing."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.made = 0

    def Stream(self, *_: Any) -> "Lane":
        return Lane(self, "copies")

    def current_stream(self, *_: Any) -> "Lane":
        return Lane(self, "steps")

    def stream(self, _: "Lane") -> Any:
        return torch.cpu.stream(torch.cpu.current_stream())

    def Event(self) -> "There":
        self.made += 1
        return There(self, self.made)


class Lane:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: "Lane") -> None:
        self.device.events.append(f"{self.name} after {other.name}")

    def wait_event(self, event: "There") -> None:
        self.device.events.append(f"{self.name} after copy {event.number}")


class There:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def record(self, lane: Lane) -> None:
        self.device.events.append(f"copy {self.number} on {lane.name}")


def stream_of(events: list[str], epochs: int = 2, broken: int = -1) -> Stream:
    order = EpochOrder(np.zeros(12, np.int64), 4, seed=0)
    together = Together(Loader(order, events, broken), Ranks(), StopFlag())
    return Stream(together, order, ViewRule.__new__(ViewRule), epochs, CPU)


def test_each_batch_is_copied_while_the_step_before_computes_and_waited_for_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    device = Device(events)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda _: device)
        stream = stream_of(events)
    for number, _ in enumerate(stream.batches(0, 0), 1):
        events.append(f"step {number}")
    launched = [event for event in events if not event.startswith(("fetch", "begin"))]
    for number in (1, 2, 3):
        step = launched.index(f"step {number}")
        assert launched[step - 1] == f"steps after copy {number}"
        if number < 3:  # the next copy is launched before, and behind all that the steps so far read
            copied = launched.index(f"copy {number + 1} on copies")
            assert copied < step
            assert launched[copied - 1] == "copies after steps"
    assert launched.count("copies after steps") == 3


def test_the_next_epoch_begins_before_the_last_step_of_the_one_before() -> None:
    events: list[str] = []
    stream = stream_of(events)
    for epoch in (0, 1):
        for number, (batch, waited) in enumerate(stream.batches(epoch, 0)):
            assert isinstance(batch, Batch)
            assert waited >= 0
            events.append(f"step {epoch}.{number}")
    assert events.index("begin 1") < events.index("step 0.2") < events.index("fetch 1.0")
    assert [event for event in events if event.startswith("begin")] == [
        "begin 0",
        "begin 1",
    ]  # none after the last
    assert [event for event in events if event.startswith("step")] == [
        f"step {epoch}.{number}" for epoch in (0, 1) for number in (0, 1, 2)
    ]


def test_an_epoch_that_was_begun_for_nothing_is_begun_anew_elsewhere() -> None:
    events: list[str] = []
    stream = stream_of(events, epochs=4)
    list(stream.batches(0, 0))
    assert len(list(stream.batches(2, 1))) == 2
    assert [event for event in events if event.startswith("begin")] == [
        "begin 0",
        "begin 1",
        "begin 2",
        "begin 3",
    ]


def test_an_error_of_a_batch_comes_after_the_steps_before_it() -> None:
    batches = stream_of([], broken=2).batches(0, 0)
    assert all(isinstance(next(batches)[0], Batch) for _ in range(2))
    with pytest.raises(BadDataError, match="broken"):
        next(batches)


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 2), st.booleans()), min_size=1), st.integers(1, 3)
)
def test_what_the_host_knows_of_the_rows_is_what_they_are(
    rows: list[tuple[int, int, bool]], pieces: int
) -> None:
    labels, part, strong = (torch.tensor(column) for column in zip(*rows, strict=True))
    pixels = torch.zeros(len(rows), 1, 1, 3, dtype=torch.uint8)
    batch = Batch(labels, torch.arange(len(rows)), pixels=pixels, part=part, strong=strong).to(CPU)
    labelled = sum(label >= 0 for label, _, _ in rows)
    sizes = [sum(own == number for _, own, _ in rows) for number in range(int(part.max()) + 1)]
    assert batch.known.counts == (len(rows), labelled, len(rows) - labelled, *sizes)
    seen: list[int] = []
    for number in range(pieces):
        piece = batch.piece(number, pieces)
        for kind in {row[1:] for row in rows}:  # of every kind each piece has its share, in the same order
            own = [place for place, row in enumerate(rows) if row[1:] == kind]
            assert [place for place in piece.index.tolist() if place in own] == own[number::pieces]
            there = piece.known.rows(*kind)
            assert piece.index[torch.from_numpy(there)].tolist() == own[number::pieces]
        assert piece.known.counts[0] == len(piece.labels)
        seen += piece.index.tolist()
    assert sorted(seen) == list(range(len(rows)))


def test_values_on_their_way_are_those_of_when_they_were_sent() -> None:
    values = torch.arange(4.0, requires_grad=True)
    fetched = Fetched(values * 2)
    assert fetched.read().tolist() == [0, 2, 4, 6]
    assert not fetched.read().requires_grad


def test_forked_random_numbers_come_again_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(5)
    with forked_random(CPU):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3))
    assert not recwarn.list


# --- checkpoints ------------------------------------------------------------------------------


class Gate:
    """Holds a writing thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered, self.inside = threading.Event(), threading.Event(), 0
        real = checkpoint._write

        def write(*arguments: Any) -> None:
            self.inside += 1
            assert self.inside == 1, "two writers at once"
            self.entered.set()
            assert self.open.wait(60)
            real(*arguments)
            self.inside -= 1

        monkeypatch.setattr(checkpoint, "_write", write)


def test_a_checkpoint_is_of_its_moment_whatever_is_trained_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, first = Gate(monkeypatch), make("adamw", 0)
    train(first, 3)
    progress = Progress(epoch=1, step=2, steps=3, sums={"loss": 0.1})
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "state", first, progress)
        assert gate.entered.wait(60)
        expected = train(first, 4)
        progress.add({"loss": 9.0}, 1, 1.0)
        writer.check()
        assert latest_checkpoint(tmp_path / "state") is None  # not a part of one is seen
        gate.open.set()
    second = make("adamw", 1)
    place = latest_checkpoint(tmp_path / "state")
    assert place is not None
    assert load_checkpoint(place, second) == Progress(epoch=1, step=2, steps=3, sums={"loss": 0.1})
    assert train(second, 4) == expected


def test_who_saves_again_waits_for_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, stateful = Gate(monkeypatch), make("sgd", 0)
    threading.Timer(0.2, gate.open.set).start()
    with CheckpointWriter() as writer:
        for steps in (1, 2, 3):
            writer.save(tmp_path, stateful, Progress(steps=steps))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_went_wrong_in_the_thread_is_raised_once_and_the_last_one_is_kept(tmp_path: Path) -> None:
    stateful = make("sgd", 0)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "state", stateful, Progress(steps=1))
        writer.wait()
        (tmp_path / "state" / "step-00000002").write_text("in the way")
        writer.save(tmp_path / "state", stateful, Progress(steps=2))
        assert writer._thread is not None
        writer._thread.join()
        with pytest.raises(StorageError):
            writer.check()
        writer.check()
    assert (tmp_path / "state" / "step-00000001" / "state.json").is_file()


def test_a_full_disk_beside_the_steps_ends_the_run_with_its_exit_code(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.training.fit.CHECKPOINT_SECONDS", 0.0)
    real = checkpoint._write

    def full(folder: Path, tensors: Any, document: Any) -> None:
        if document["progress"]["epoch"] == 2:
            raise NoSpaceError("no space left", "Make room.")
        real(folder, tensors, document)

    config = place.config("full")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(NoSpaceError) as caught:
            train_student(config)
    assert caught.value.exit_code == 31
    whole = place.config("room")
    train_student(whole)
    train_student(config)  # goes on from the one before
    assert same_student(config.out, whole.out)


# --- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_images_of_a_test_are_decoded_once_where_memory_allows(
    place: Place, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(evaluate, "KEPT_BYTES", budget)
    made, decoded = [0], [0]
    real, draw = evaluate.make_loader, evaluate.Exam._draw

    def loader(*arguments: Any) -> Any:
        made[0] += 1
        return real(*arguments)

    def drawing(self: Any, positions: Any) -> Any:
        decoded[0] += len(positions)
        return draw(self, positions)

    monkeypatch.setattr(evaluate, "make_loader", loader)
    monkeypatch.setattr(evaluate.Exam, "_draw", drawing)
    data, built = open_data(place.test), build(LabelsOnly())
    one = Examinee(built.student, LABEL_HEAD, data.labels, built.model.preprocess)
    how = Conditions(CPU, 4, 0, StopFlag())
    room = ExamRoom(data, [Render.of(one.preprocess)], how)
    with_room = [accuracies([one], data, how, room)[0] for _ in range(3)]
    assert (made[0], decoded[0]) == (1, len(data) * (1 if budget else 3))
    assert with_room == [accuracies([one], data, how)[0]] * 3
    student = built.student.eval()
    drawn = evaluate.Exam(data, [Render.of(one.preprocess)])._draw(np.arange(len(data)))
    pixels = torch.from_numpy(np.stack([each[Render.of(one.preprocess)] for each in drawn]))
    with torch.inference_mode():
        logits = student(evaluate.normalise(pixels, one.preprocess), [LABEL_HEAD]).logits[LABEL_HEAD]
    assert with_room[0]["top1"] == pytest.approx(float(np.mean(logits.argmax(1).numpy() == data.labels)))


def test_a_student_that_is_judged_every_epoch_is_the_same_without_kept_pixels(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"validation": 0.25, "select": "best"}
    kept = train_student(place.config("kept", **changes))
    monkeypatch.setattr(evaluate, "KEPT_BYTES", 0)
    anew = train_student(place.config("anew", workers=2, **changes))
    names = [name for name in kept.history[0] if name.startswith("val_")]
    assert names
    assert [[epoch[name] for name in names] for epoch in kept.history] == [
        [epoch[name] for name in names] for epoch in anew.history
    ]
    assert same_student(Path(kept.out), Path(anew.out))
