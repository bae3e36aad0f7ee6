"""The thread that takes what the device has made: it alone waits for the device, checks, and fills the tasks."""

import time
from collections.abc import Mapping, MutableMapping
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Self, final

from kdcli.cache.layout import SAMPLES
from kdcli.console import console
from kdcli.devices import device_errors
from kdcli.extract.batches import Batch, Forward
from kdcli.extract.decoding import Task
from kdcli.extract.outputs import compression_error
from kdcli.extract.publishing import Publisher
from kdcli.extract.worker import Worker
from kdcli.outputs import PIXELS

if TYPE_CHECKING:
    from kdcli.cache.filling import Filling

BATCHES = 3
"""Batches that may be on the device, or on their way from it: one computes, one waits, one is being collected."""


@final
class Collector:
    """Collects batches in the order in which they were launched. Leaving its context waits for them.

    Args:
        publisher: who takes complete tasks.
        writer: of the cache.
        workers: the teachers.
        tasks: under way, by number; those that are handed to the publisher are taken out.
    """

    def __init__(
        self,
        publisher: Publisher,
        writer: "Filling",
        workers: Mapping[str, Worker],
        tasks: MutableMapping[int, Task],
    ) -> None:
        self._publisher, self._writer, self._workers, self._tasks = publisher, writer, workers, tasks
        self._collected: tuple[int, float] = 0, 0.0
        self._taken: tuple[int, float] = 0, 0.0
        self._room = Semaphore(BATCHES)
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, name="kd-collector", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.put(None)
        self._thread.join()
        if error[0] is None:
            self.require_sound()

    def make_room(self) -> None:
        """Wait until one more batch may be launched.

        Raises:
            BaseException: what collecting or writing met.
        """
        self._room.acquire()
        self.require_sound()

    def put(self, batch: Batch) -> None:
        """Collect a batch, for which :meth:`make_room` was called."""
        self._batches.put(batch)

    def take(self) -> tuple[int, float]:
        """Images times views that were collected since it was asked, and seconds that the device was waited for."""
        before, self._taken = self._taken, self._collected
        return self._taken[0] - before[0], self._taken[1] - before[1]

    def require_sound(self) -> None:
        """Raise what collecting or writing met, without waiting."""
        failure = self._failure or self._publisher.failure
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                if self._failure is None:
                    self._collect(batch)
            except BaseException as error:  # raised again in the main thread, which may be waiting for room
                self._failure = error
            finally:
                del batch  # and with it what it holds on the device
                self._room.release()
        try:
            if self._failure is None:
                self._publisher.settle(0)
        except BaseException as error:
            self._failure = error

    def _collect(self, batch: Batch) -> None:
        before = time.monotonic()
        if batch.event is not None:
            with device_errors("running the teachers"):
                batch.event.synchronize()
        waited = time.monotonic() - before
        self._keep_samples(batch)
        self._keep_pixels(batch)
        for forward in batch.forwards:
            self._keep(batch, forward)
        task = batch.task
        task.collected += len(batch.rows)
        images, seconds = self._collected
        self._collected = images + batch.images, seconds + waited
        self._publisher.settle()
        if task.collected == len(task.rows):
            self._publisher.put(self._tasks.pop(task.number))

    @staticmethod
    def _keep_samples(batch: Batch) -> None:
        task = batch.task
        for piece in batch.pieces:
            values = {"content_size": piece.sizes, "content_crc": piece.crcs, "params": piece.params}
            inside = _inside(task.rows, piece.request.rows)
            for name, tensor in values.items():
                found = tensor.numpy()
                task.array(SAMPLES, name, found.shape[1:], found.dtype)[inside] = found

    def _keep_pixels(self, batch: Batch) -> None:
        """Pixels that are kept are those that were decoded; they need not come back from the device."""
        task = batch.task
        for unit in task.units:
            if unit.part == SAMPLES or unit.kind != PIXELS:
                continue
            count = len(self._writer.manifest.views_of(task.group, self._writer.store.views(unit.part)))
            for piece in batch.pieces:
                found = piece.pixels[self._workers[unit.teacher].render][:count].numpy()
                whole = task.array(unit.part, PIXELS, (count, *found.shape[2:]), found.dtype)
                whole[_inside(task.rows, piece.request.rows)] = found.swapaxes(0, 1)

    def _keep(self, batch: Batch, forward: Forward) -> None:
        """Check what a forward gave, and copy it into its task.

        Raises:
            BadDataError: see :meth:`~kdcli.extract.outputs.OutputPlan.checked`.
        """
        task, store = batch.task, self._writer.store
        plan = self._workers[forward.teacher].plan
        kept = plan.checked(forward.derived)
        if forward.logits is not None:
            errors = compression_error(forward.logits, kept, plan.temperatures)
            self._say_compression(forward.teacher, errors)
        inside = _inside(task.rows, batch.rows)
        for kind, arrays in kept.items():
            part = f"{forward.teacher}/{kind}"
            views = self._writer.manifest.views_of(task.group, store.views(part))
            for name, values in arrays.items():
                each = values.reshape(len(forward.views), len(batch.rows), *values.shape[1:])
                whole = task.array(part, name, (len(views), *values.shape[1:]), values.dtype)
                for view, found in zip(forward.views, each, strict=True):
                    whole[inside, view - views.start] = found

    def _say_compression(self, teacher: str, errors: dict[str, dict[str, float]]) -> None:
        """Say, and record with every unit, what rounding and leaving out cost on the first batch."""
        self._publisher.compression[teacher] = errors
        for kind, by_temperature in errors.items():
            costs = ", ".join(f"{nats:.2g} nats at T = {t}" for t, nats in by_temperature.items())
            console.detail(
                f"teacher '{teacher}': storing its {kind} in fewer digits changes its softmax by a KL divergence of "
                f"{costs} (mean of the first batch)"
            )


def _inside(whole: range, rows: range) -> slice:
    """Where rows are among those of a block."""
    return slice(rows.start - whole.start, rows.stop - whole.start)
