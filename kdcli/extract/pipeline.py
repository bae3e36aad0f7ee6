"""The inner loop: claim a task, decode its images once, run every missing teacher, publish.

    decode processes -> (pinned) pixels -> teachers, one after the other -> bounded queue -> writer threads

Whichever of decoding, forward and writing the loop waits for most is named on the display.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kdcli.cache.filling import Filling
from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.writer import content_digest
from kdcli.console import Bar, console, size
from kdcli.data.kept_pixels import DRAWN_BY, KeptPixels, drawn_by
from kdcli.data.views import ViewSet
from kdcli.errors import IdentityError
from kdcli.extract.decoding import Decoded, Decoder, Task, TaskQueue, decoded_batches
from kdcli.extract.outputs import OutputPlan, compression_error
from kdcli.geometry import Render
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import PIXELS
from kdcli.runtime import StopFlag, pick_device, versions
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.data.joined import Images
    from kdcli.extract.prepare import Prepared
    from kdcli.extract.teachers import Teacher

WRITERS = 1
"""Finished tasks that may be being written, each by its thread, while the next one is computed; one more makes
the loop wait. A kill loses what is being computed and what is being written, so there are not more."""


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """A teacher ready to run, and what is kept of it."""

    runner: TeacherRunner
    plan: OutputPlan
    render: Render
    batch_size: int
    made: dict[str, Any]

    @classmethod
    def of(cls, teacher: "Teacher", batch_size: int, device: str) -> "Worker":
        """An opened teacher on a device."""
        amp = teacher.record.amp
        return cls(
            TeacherRunner(teacher.model, device, amp, teacher.plan.outputs),
            teacher.plan,
            Render.of(teacher.model.preprocess),
            batch_size,
            {"batch_size": batch_size, "device": device, "amp": amp},
        )


def open_workers(
    prepared: "Prepared", records: Mapping[str, "TeacherRecord"], names: Collection[str]
) -> dict[str, Worker]:
    """Teachers that have something to do, on the device, with the settings of their first run.

    Args:
        prepared: the opened teachers.
        records: what the cache recorded of them.
        names: those wanted.
    """
    config = prepared.config
    device = pick_device(config.device)
    workers = {}
    for name, record in records.items():
        if name not in names:
            continue
        teacher, compute = prepared.teachers[name], record.compute
        if compute["batch_size"] != config.batch_size:
            console.note(f"teacher '{name}': going on with its recorded batch size {compute['batch_size']}")
        if compute["device"] != device.split(":")[0]:
            console.warn(
                f"teacher '{name}' was begun on {compute['device']} and goes on on {device}: rows may differ in "
                "their last bits"
            )
        workers[name] = Worker.of(teacher, compute["batch_size"], device)
    return workers


@final
@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        processes: decode processes.
        stop: raised once no more tasks are to be begun.
        grace: seconds that it leaves for the current task.
        pinned: decode into memory from where a GPU copies without waiting.
        kept: pixels of the cache that need no decoding, if any.
    """

    processes: int
    stop: StopFlag
    grace: float
    pinned: bool = False
    kept: KeptPixels | None = None


@final
class TaskRunner:
    """Runs one pass over what is missing and can be claimed.

    Args:
        writer: of the cache.
        data: the images.
        views: what is drawn of them.
        workers: the teachers that have something to do.
        resources: what it may use.
        drop_bad: record images that cannot be read as absent; else their task fails.
    """

    def __init__(
        self,
        writer: Filling,
        data: "Images",
        views: ViewSet,
        workers: Mapping[str, Worker],
        resources: Resources,
        drop_bad: bool,
    ) -> None:
        self._writer, self._data, self._views, self._workers = writer, data, views, workers
        self._resources, self._drop_bad = resources, drop_bad
        self.written: dict[str, set[tuple[int, int]]] = {name: set() for name in (SAMPLES, *workers)}
        self.failed: dict[tuple[int, int], list[tuple[int, str]]] = {}
        self.images = self.bytes = 0
        self.seconds = 0.0
        self._waited = {"decode": 0.0, "forward": 0.0, "write": 0.0}
        self._compression: dict[str, dict[str, dict[str, float]]] = {}
        self._lock = threading.Lock()

    def run(self, missing: Sequence[Unit]) -> None:
        """Claim, compute and publish what can be claimed of ``missing``; return when nothing is left to claim."""
        places = {(unit.block, unit.group) for unit in missing}
        manifest = self._writer.manifest
        total = sum(len(manifest.rows_of(b)) * len(manifest.views_of(g)) for b, g in places)
        batch_sizes = {name: worker.batch_size for name, worker in self._workers.items()}
        queue = TaskQueue(self._writer, batch_sizes, missing, self._resources.stop, time.monotonic)
        start = time.monotonic()
        with (
            ThreadPoolExecutor(WRITERS, "kd-writer") as executor,
            console.progress(total, "images" if manifest.views == 1 else "views", "cache") as bar,
        ):
            try:
                self._consume(queue, executor, bar)
            finally:
                executor.shutdown(wait=True)
                for task in queue.tasks.values():
                    self._writer.claims.release(task.units)
                self.seconds += time.monotonic() - start

    def said(self) -> str:
        """What the loop waits for most, in words."""
        most = max(self._waited, key=lambda name: self._waited[name])
        spare = self._resources.processes < (os.cpu_count() or 1)
        return {
            "decode": "waiting for image decoding" + (": add --workers" if spare else ""),
            "forward": "waiting for the teachers",
            "write": "waiting for the disk",
        }[most]

    def _batches(self, queue: TaskQueue) -> Iterator[Decoded]:
        renders = list(dict.fromkeys(worker.render for worker in self._workers.values()))
        decoder = Decoder(self._data, self._views, self._writer.manifest, renders, self._resources.kept)
        return decoded_batches(decoder, queue, self._resources.processes, self._resources.pinned)

    def _consume(self, queue: TaskQueue, executor: ThreadPoolExecutor, bar: Bar) -> None:
        pending: deque[Future[None]] = deque()
        batches = self._batches(queue)
        while True:
            before = time.monotonic()
            decoded = next(batches, None)
            if decoded is None:
                break
            self._waited["decode"] += time.monotonic() - before
            task = queue.tasks[decoded.request.task]
            if self._resources.stop and (
                task.done == 0 or self._resources.stop.seconds() > self._resources.grace
            ):
                break  # not begun, or out of time: its claim is released, another run computes it
            self._compute(task, decoded)
            amount = len(decoded.request.rows) * decoded.params.shape[1]
            facts = {"written": size(self.bytes)} if self.bytes else {}
            bar.advance(amount, self.said(), **facts)
            self._settle(pending, WRITERS)
            if task.done == len(task.rows):
                self._settle(pending, WRITERS - 1)
                del queue.tasks[task.number]
                pending.append(executor.submit(self._finish, task))
        self._settle(pending, 0)

    def _settle(self, pending: deque[Future[None]], allowed: int) -> None:
        """Wait until at most ``allowed`` tasks are being written; what a writer raised is raised here."""
        before = time.monotonic()
        while pending and (len(pending) > allowed or pending[0].done()):
            pending.popleft().result()
        self._waited["write"] += time.monotonic() - before

    def _compute(self, task: Task, decoded: Decoded) -> None:
        before = time.monotonic()
        rows = decoded.request.rows
        inside = slice(rows.start - task.rows.start, rows.stop - task.rows.start)
        task.done += len(rows)
        task.bad += decoded.bad
        values = {"content_size": decoded.sizes.numpy(), "content_crc": decoded.crcs.numpy()}
        self._keep(task, SAMPLES, {**values, "params": decoded.params.numpy()}, inside, len(task.rows))
        if task.bad and not self._drop_bad:
            return  # the task cannot be published; decode on, so that every bad file is listed
        for teacher, kinds in self._wanted(task).items():
            self._forward(task, teacher, kinds, decoded, inside)
        self._waited["forward"] += time.monotonic() - before
        self.images += len(rows) * decoded.params.shape[1]

    @staticmethod
    def _wanted(task: Task) -> dict[str, list[str]]:
        """The kinds of output that a task has to compute, by teacher."""
        wanted: dict[str, list[str]] = {}
        for unit in task.units:
            if unit.part != SAMPLES:
                wanted.setdefault(unit.teacher, []).append(unit.kind)
        return wanted

    def _forward(
        self, task: Task, teacher: str, kinds: Sequence[str], decoded: Decoded, inside: slice
    ) -> None:
        """Run one teacher over a batch, view by view, for the kinds that keep the view."""
        worker, store = self._workers[teacher], self._writer.store
        labels = self._data.labels[decoded.request.rows.start : decoded.request.rows.stop]
        kept: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in kinds}
        for place, view in enumerate(self._writer.manifest.views_of(task.group)):
            wanted = [kind for kind in kinds if view < store.views(f"{teacher}/{kind}")]
            if not wanted:
                continue
            raw = worker.runner(decoded.pixels[worker.render][place], wanted)
            derived = worker.plan.derive(raw, labels, wanted)
            if teacher not in self._compression and "logits" in raw:
                errors = compression_error(raw["logits"], derived, worker.plan.temperatures)
                self._measure_compression(teacher, errors)
            for kind, arrays in derived.items():
                kept[kind].append(arrays)
        for kind, views in kept.items():
            stacked = {name: np.stack([view[name] for view in views], axis=1) for name in views[0]}
            self._keep(task, f"{teacher}/{kind}", stacked, inside, len(task.rows))

    def _measure_compression(self, teacher: str, errors: dict[str, dict[str, float]]) -> None:
        """Say, and record with every unit, what rounding and leaving out cost on the first batch."""
        self._compression[teacher] = errors
        for kind, by_temperature in errors.items():
            costs = ", ".join(f"{nats:.2g} nats at T = {t}" for t, nats in by_temperature.items())
            console.detail(
                f"teacher '{teacher}': storing its {kind} in fewer digits changes its softmax by a KL divergence of "
                f"{costs} (mean of the first batch)"
            )

    @staticmethod
    def _keep(task: Task, part: str, values: Mapping[str, np.ndarray], inside: slice, rows: int) -> None:
        arrays = task.arrays.setdefault(part, {})
        for name, batch in values.items():
            if name not in arrays:
                arrays[name] = np.empty((rows, *batch.shape[1:]), batch.dtype)
            arrays[name][inside] = batch

    def _finish(self, task: Task) -> None:
        """Publish a computed task (in a writer thread)."""
        try:
            if task.bad and not self._drop_bad:
                self.failed[task.block, task.group] = task.bad
                return
            samples = task.arrays[SAMPLES]
            content = content_digest(samples["content_size"], samples["content_crc"])
            self._require_recorded_content(task, content)
            dropped = [row - task.rows.start for row, _ in task.bad]
            for unit in task.units:
                arrays = task.arrays[unit.part]
                if unit.part == SAMPLES and unit.group > 0:
                    arrays = {"params": arrays["params"]}
                if unit.part != SAMPLES:
                    for name, values in arrays.items():
                        values[dropped] = self._writer.specs(unit.part)[name].fill
                seconds = time.monotonic() - task.started
                if self._writer.publish(unit, arrays, content, task.bad, self._made(unit), seconds):
                    with self._lock:
                        self.written[unit.teacher].add((unit.block, unit.group))
                        self.bytes += sum(values.nbytes for values in arrays.values())
        finally:
            self._writer.claims.release(task.units)

    def _made(self, unit: Unit) -> dict[str, Any]:
        made: dict[str, Any] = {"versions": versions()}
        if unit.part != SAMPLES:
            made |= self._workers[unit.teacher].made
        if unit.kind == PIXELS:
            made[DRAWN_BY] = drawn_by(self._workers[unit.teacher].render, self._views.decode)
        error = self._compression.get(unit.teacher, {}).get(unit.kind)
        return made if error is None else {**made, "kl": error}

    def _require_recorded_content(self, task: Task, content: str) -> None:
        """The images must be the ones that earlier units of this block saw.

        Raises:
            IdentityError: naming the first image that changed.
        """
        recorded = self._writer.recorded_content(task.block)
        if recorded is None or recorded[0] == content:
            return
        _, sizes, crcs = recorded
        samples = task.arrays[SAMPLES]
        if sizes is None or crcs is None:
            raise IdentityError(
                f"images of rows {task.rows.start}-{task.rows.stop - 1} changed since they were cached",
                "Restore them, or make a new cache: outputs of two versions of an image do not mix.",
                [Difference("content", recorded[0], content)],
            )
        changed = np.flatnonzero((sizes != samples["content_size"]) | (crcs != samples["content_crc"]))
        row = task.rows.start + int(changed[0])
        raise IdentityError(
            f"{len(changed)} images changed since they were cached, first {self._data.path(row)}",
            "Restore them, or make a new cache: outputs of two versions of an image do not mix.",
            [
                Difference(
                    "crc32c", f"{int(crcs[changed[0]]):08x}", f"{int(samples['content_crc'][changed[0]]):08x}"
                )
            ],
        )
