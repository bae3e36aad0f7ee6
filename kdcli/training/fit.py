"""The one loop over batches, for any number of students: a lone run is a sweep of one.

Batches are made once and handed to every student in turn. What each of them draws, learns and saves is its
own, so none can tell whether it was alone. Students may be at different places, when a kill came between
their checkpoints or one was added later: the stream starts where the last of them is, and those ahead wait.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn, final

from kdcli.console import console
from kdcli.documents import from_document
from kdcli.errors import DeviceError, DivergedError, StoppedEarly
from kdcli.files import storage_errors, write_json
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.reading import read_json
from kdcli.runtime import StopFlag
from kdcli.training.checkpoint import (
    CheckpointWriter,
    append_metrics,
    latest_checkpoint,
    load_checkpoint,
    write_metrics,
)
from kdcli.training.engine import Engine
from kdcli.training.progress import Meter, Progress
from kdcli.training.scores import JUDGED
from kdcli.training.stream import Stream
from kdcli.training.tracking import track_epoch
from kdcli.training.transfers import OwnRandom
from kdcli.training.validation import VAL, Watch

CHECKPOINT_SECONDS = 10.0
"""An epoch's end is saved unless the last checkpoint is younger: epochs of a second cost more to save than to run.
Of n students each may take as much longer, so that saving takes the same share of the time."""
_SHOWN = 4


@final
class Lane:
    """A student on its way: its engine, where it is, and its random numbers.

    Args:
        name: what messages call it; empty for a lone run.
        engine: student and objective.
        folder: its own OUT.
        reads: arrays that it learns from: teacher -> names.
        random: its random numbers, as they are after its weights were drawn.
        watch: judges it after every epoch, if anything does.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        folder: Path,
        reads: Mapping[str, Sequence[str]],
        random: OwnRandom,
        watch: Watch | None = None,
    ) -> None:
        self.name, self.engine, self.random, self.watch = name, engine, random, watch
        self.progress = Progress()
        self.diverged: DivergedError | None = None
        self._folder, self._reads = folder, reads
        self._render = Render.of(engine.preprocess).single
        self._checkpoints, self._stateful = folder / "state", engine.stateful()
        if watch is not None and watch.best is not None:
            modules = {**self._stateful.modules, "best": watch.best}
            self._stateful = replace(self._stateful, modules=modules)
        self._main = engine.ranks.first
        self._saved = self.place

    @property
    def place(self) -> tuple[int, int]:
        """Epochs done, and steps of the next one."""
        return self.progress.epoch, self.progress.step

    def resume(self, epochs: int) -> None:
        """Go to the last checkpoint, if there is one; ``epochs`` is what a message says of it."""
        if (place := latest_checkpoint(self._checkpoints)) is not None:
            with self.random():
                self.progress = load_checkpoint(place, self._stateful)
            self.engine.resume_after(self.progress.steps)
            self._saved = self.place
            console.note(
                f"{self.name}{': ' if self.name else ''}going on from step {self.progress.steps} "
                f"(epoch {min(self.progress.epoch + 1, epochs)} of {epochs})"
            )
        if self._main:
            write_metrics(self._folder / "metrics.jsonl", self.progress.history)

    def step(self, batch: Batch, waited: float) -> dict[str, float]:
        """Learn from a batch that all students share.

        Args:
            batch: on the training device.
            waited: this student's part of the time that making the batch took, in seconds.

        Returns:
            The loss and its parts.

        Raises:
            DivergedError, DeviceError: see :meth:`Engine.step`.
        """
        started = time.perf_counter()
        with self.random():
            values = self.engine.step(batch.share(self._render, self._reads), self.progress.steps)
        self.progress.add(values, self.engine.images, waited + time.perf_counter() - started)
        return values

    def close_epoch(self, view: int) -> None:
        """Judge the epoch whose last step was taken, and write it down; the student saw ``view`` in it.

        Raises:
            StoppedEarly: a signal arrived; the epoch is not closed, and is judged when the run goes on.
        """
        facts = {"lr": self.engine.lr, "view": view}
        if self.watch is not None:
            with self.engine.kept():
                facts |= self.watch.after_epoch(self.progress.epoch + 1)
        document = self.progress.close_epoch(facts)
        if self._main:
            append_metrics(self._folder / "metrics.jsonl", document)
            track_epoch(self.engine.accelerator, document)
        title = f"{self.name}: epoch" if self.name else "epoch"
        console.detail(f"{title} {self.progress.epoch}: loss {document['loss']:.4f}, lr {document['lr']:g}")

    def save(self, writer: CheckpointWriter) -> None:
        """Begin to write a checkpoint of this moment, unless the last one is of it."""
        if self.place != self._saved:
            with self.random():
                writer.save(self._checkpoints, self._stateful, self.progress)
        self._saved = self.place

    def give_up(self, error: DivergedError) -> None:
        """Stop for good, with the last checkpoint kept; a sweep that goes on does not try again."""
        self.diverged = error
        if self._main:
            note_divergence(self._folder, error, self.progress.steps)


@final
@dataclass(frozen=True, slots=True)
class _Divergence:
    """diverged.json."""

    steps: int
    message: str
    hint: str


def note_divergence(folder: Path, error: DivergedError, steps: int) -> None:
    """Leave word beside the checkpoint of a student that it diverged after ``steps`` steps."""
    with storage_errors(folder):
        (folder / "state").mkdir(parents=True, exist_ok=True)
    write_json(folder / "state" / "diverged.json", asdict(_Divergence(steps, error.message, error.hint)))


def known_divergence(folder: Path) -> DivergedError | None:
    """How the run in ``folder`` ended, if it diverged and has not come past that step since."""
    path = folder / "state" / "diverged.json"
    if not path.is_file():
        return None
    found = from_document(_Divergence, read_json(path), path)
    place = latest_checkpoint(folder / "state")
    if place is not None and int(place.name.removeprefix("step-")) > found.steps:
        return None
    return DivergedError(found.message, found.hint)


def fit(lanes: Sequence[Lane], stream: Stream, stop: StopFlag) -> None:
    """Train every student to its end, each from its last checkpoint if it has one, and save it there.

    One that diverges is left where it was, see :attr:`Lane.diverged`, and the others go on.

    Raises:
        StoppedEarly: a signal arrived; everything is saved.
        DeviceError: out of memory.
        KdError: a batch could not be made.
    """
    for lane in lanes:
        lane.resume(stream.epochs)
    with CheckpointWriter() as writer:
        try:
            _train(lanes, stream, stop, writer)
        except StoppedEarly:
            _save(lanes, writer)
            writer.wait()
            console.detail(f"saved {stop.seconds():.1f} s after the signal")
            raise
        _save(lanes, writer)


def _train(lanes: Sequence[Lane], stream: Stream, stop: StopFlag, writer: CheckpointWriter) -> None:
    size, end = stream.order.batches, stream.epochs * stream.order.batches
    at = min((lane.progress.epoch * size + lane.progress.step for lane in lanes), default=end)
    patience = CHECKPOINT_SECONDS * len(lanes)
    saved = time.monotonic()
    meter, ranks = Meter(), lanes[0].engine.ranks
    with console.progress(end - at, "steps", "training") as bar:
        while left := _running(lanes, stream.epochs):
            epoch, step = min(lane.place for lane in left)
            if epoch * size + step > at:  # those who were here diverged: on to where the next one waits
                bar.advance(epoch * size + step - at)
            at = epoch * size + step
            for batch, waited in stream.batches(epoch, step):
                here = [lane for lane in left if lane.place == (epoch, step) and lane.diverged is None]
                if not here:
                    break
                arrived = time.perf_counter()
                writer.check()
                values = _step(here, batch, waited)
                meter.add(here[0].engine.images, waited, time.perf_counter() - arrived)
                at, step = at + 1, step + 1
                facts = meter.facts(_shown(values), _judged(lanes), f"{epoch + 1}/{stream.epochs}")
                bar.advance(1, meter.said, **facts)
                if stop and step < size:
                    _stop(here[0])
            for lane in left:
                if lane.place == (epoch, size):
                    _close_epoch(lane, stream)
            if stop:
                _stop(left[0])
            console.detail(f"{meter.waiting:.0%} of the time waiting for batches")
            # The first process's clock decides for all, since all take part in saving.
            due, *_ = ranks.gather(time.monotonic() - saved >= patience)
            if due:
                _save(lanes, writer)
                saved = time.monotonic()


def _close_epoch(lane: Lane, stream: Stream) -> None:
    try:
        lane.close_epoch(stream.rule.student(lane.progress.epoch))
    except StoppedEarly:
        _stop(lane)


def _running(lanes: Sequence[Lane], epochs: int) -> list[Lane]:
    return [lane for lane in lanes if lane.diverged is None and lane.progress.epoch < epochs]


def _step(here: Sequence[Lane], batch: Batch, waited: float) -> dict[str, dict[str, float]]:
    """Every student's step on one batch; loss and parts of those that did not diverge."""
    values: dict[str, dict[str, float]] = {}
    for lane in here:
        try:
            values[lane.name] = lane.step(batch, waited / len(here))
        except DivergedError as error:
            lane.give_up(error)
            if lane.name:
                console.warn(f"student '{lane.name}' is given up: {error.message}")
        except DeviceError as error:
            if len(here) > 1:
                error.hint = f"{error.hint}, or fewer students in a sweep than these {len(here)}"
            raise
    return values


def _judged(lanes: Sequence[Lane]) -> dict[str, float]:
    """The best of the students' last scores on the images set aside; nothing before the first epoch's end."""
    last = [lane.progress.history[-1] for lane in lanes if lane.progress.history]
    found = {name: [each[f"{VAL}_{name}"] for each in last if f"{VAL}_{name}" in each] for name in JUDGED}
    short = {"top1": "val acc", "mAP": "val mAP", "r2": "val R2"}
    return {short[name]: max(scores) for name, scores in found.items() if scores}


def _shown(values: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """What the display shows of a step: all parts of one student's loss, else the losses, or their range."""
    if len(values) == 1:
        return next(iter(values.values()))
    losses = {f"loss of {name}": parts["loss"] for name, parts in values.items()}
    if len(losses) > _SHOWN:
        return {"lowest loss": min(losses.values()), "highest": max(losses.values())}
    return losses


def _save(lanes: Sequence[Lane], writer: CheckpointWriter) -> None:
    for lane in lanes:
        if lane.diverged is None:
            lane.save(writer)


def _stop(first: Lane) -> NoReturn:
    progress = first.progress
    raise StoppedEarly(
        f"stopped by a signal after step {progress.steps} (epoch {progress.epoch + 1}); everything is saved",
        "Run the same command again to go on.",
    )
