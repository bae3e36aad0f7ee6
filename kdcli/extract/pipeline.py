"""The inner loop: claim a task, decode its images once, run every missing teacher, publish.

    decode processes -> pinned pieces -> device batches -> all teachers, back to back -> collector -> writers
    (up, beside the forwards)           (launched only)        (down, beside the forwards)   (threads)

The main thread only launches. It waits for decoded images, and for room: :data:`~kdcli.extract.collecting.BATCHES` are
on the device at a time. The collector alone waits for the device, once a batch. Whichever of decoding, forward and
writing is waited for most is named on the display.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from kdcli.cache.filling import Filling
from kdcli.cache.layout import Unit
from kdcli.console import Bar, console, size
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.views import ViewSet
from kdcli.devices import device_errors
from kdcli.errors import DeviceError
from kdcli.extract.batches import Launcher
from kdcli.extract.collecting import Collector
from kdcli.extract.decoding import Decoded, Decoder, TaskQueue, decoded_batches
from kdcli.extract.fitting import with_what_fits
from kdcli.extract.lanes import Lanes
from kdcli.extract.publishing import Publisher
from kdcli.extract.worker import Worker
from kdcli.runtime import StopFlag, pick_device, processor_count

if TYPE_CHECKING:
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.data.joined import Images
    from kdcli.extract.prepare import Prepared


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
        if config.batch_size not in ("auto", compute["batch_size"]):
            console.note(f"teacher '{name}': going on with its recorded batch size {compute['batch_size']}")
        if (compiled := compute.get("compile", False)) != config.compile:
            console.note(
                f"teacher '{name}': going on {'with' if compiled else 'without'} --compile, as recorded"
            )
        if compute["device"] != device.split(":")[0]:
            console.warn(
                f"teacher '{name}' was begun on {compute['device']} and goes on on {device}: rows may differ in "
                "their last bits"
            )
        workers[name] = Worker.of(teacher, compute, device)
    return workers


@final
@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        processes: decode processes.
        stop: raised once no more tasks are to be begun.
        grace: seconds that it leaves for the current task.
        kept: pixels of the cache that need no decoding, if any.
    """

    processes: int
    stop: StopFlag
    grace: float
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

    Attributes:
        images: images times views that were computed.
        seconds: that it took.
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
        self._resources = resources
        self._publisher = Publisher(writer, data, workers, drop_bad)
        self._lanes = Lanes(next((worker.device for worker in workers.values()), "cpu"))
        self.images, self.seconds = 0, 0.0
        self._waited = {"decode": 0.0, "forward": 0.0, "write": 0.0}

    @property
    def written(self) -> dict[str, set[tuple[int, int]]]:
        """(block, group) of what was written, by teacher."""
        return self._publisher.written

    @property
    def failed(self) -> dict[tuple[int, int], list[tuple[int, str]]]:
        """Images that cannot be read, by (block, group) of the tasks that failed because of them."""
        return self._publisher.failed

    def run(self, missing: Sequence[Unit]) -> None:
        """Claim, compute and publish what can be claimed of ``missing``; return when nothing is left to claim."""
        places = {(unit.block, unit.group) for unit in missing}
        manifest = self._writer.manifest
        total = sum(len(manifest.rows_of(b)) * len(manifest.views_of(g)) for b, g in places)
        batch_sizes = {name: worker.batch_size for name, worker in self._workers.items()}
        resources = self._resources
        queue = TaskQueue(
            self._writer, batch_sizes, missing, resources.stop, time.monotonic, resources.processes
        )
        start = time.monotonic()
        with console.progress(total, "images" if manifest.views == 1 else "views", "cache") as bar:
            try:
                with (
                    device_errors("running the teachers"),
                    self._publisher,
                    Collector(self._publisher, self._writer, self._workers, queue.tasks) as collector,
                ):
                    self._consume(queue, collector, bar)
                self._tell(bar, collector)
            except DeviceError as error:
                raise with_what_fits(error, self._workers) from error.__cause__
            finally:
                for task in queue.tasks.values():
                    self._writer.claims.release(task.units)
                self.seconds += time.monotonic() - start

    def said(self) -> str:
        """What the run waits for most, in words."""
        waited = {**self._waited, "write": self._publisher.waited}
        most = max(waited, key=lambda name: waited[name])
        spare = self._resources.processes < processor_count()
        return {
            "decode": "waiting for images" + (": add --workers" if spare else ""),
            "forward": "waiting for the teachers",
            "write": "waiting for the disk",
        }[most]

    def _pieces(self, queue: TaskQueue) -> Iterator[Decoded]:
        """What is decoded, as it comes; the time that it is waited for is noted."""
        renders = list(dict.fromkeys(worker.render for worker in self._workers.values()))
        decoder = Decoder(self._data, self._views, self._writer.manifest, renders, self._resources.kept)
        pinned = self._lanes.device.type != "cpu"
        pieces = decoded_batches(decoder, queue, self._resources.processes, pinned)
        while True:
            before = time.monotonic()
            piece = next(pieces, None)
            self._waited["decode"] += time.monotonic() - before
            if piece is None:
                return
            yield piece

    def _consume(self, queue: TaskQueue, collector: Collector, bar: Bar) -> None:
        """Launch everything. What is launched when this ends is still collected."""
        launcher, stop = Launcher(self._lanes, self._workers, self._writer), self._resources.stop
        for piece in self._pieces(queue):
            collector.require_sound()
            task = queue.tasks[piece.request.task]
            if stop and (not task.begun or stop.seconds() > self._resources.grace):
                break  # not begun, or out of time: its claim is released, another run computes it
            task.begun = True
            task.bad += piece.bad
            # A task with bad images may not be published; decode on, so that every one of them is listed.
            wanted = self._publisher.drop_bad or not task.bad
            batch = launcher.add(task, piece, wanted)
            if batch is None:
                continue
            collector.make_room()
            before = time.monotonic()
            if wanted:
                launcher.launch(batch)
            collector.put(batch)
            self._waited["forward"] += time.monotonic() - before
            self._tell(bar, collector)

    def _tell(self, bar: Bar, collector: Collector) -> None:
        """Advance the bar by what was collected since."""
        amount, waited = collector.take()
        self.images += amount
        self._waited["forward"] += waited
        written = self._publisher.bytes
        # What is waited for comes first: a narrow display cuts from the right.
        bar.advance(amount, f"{self.said()}, {size(written)} written" if written else self.said())
