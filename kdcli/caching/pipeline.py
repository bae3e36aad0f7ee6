"""The inner loop: claim a task, decode its images once, run every missing teacher, publish."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcli.cache.backend import checksum
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.writer import CacheWriter, content_digest
from kdcli.caching.outputs import OutputPlan
from kdcli.console import Bar, console
from kdcli.data.views import ViewSet, render
from kdcli.errors import BadDataError, IdentityError
from kdcli.runtime import StopFlag, versions, worker_init
from kdcli.types import Difference, Interpolation

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData
    from kdcli.models.teacher import TeacherRunner

RenderKey = tuple[tuple[int, int], Interpolation]
"""Input size and interpolation: teachers that share both share their pixels."""


@final
@dataclass(frozen=True, slots=True)
class Worker:
    """A teacher ready to run, and what is kept of it."""

    runner: "TeacherRunner"
    plan: OutputPlan
    render: RenderKey
    batch_size: int
    made: dict[str, Any]


@final
@dataclass(slots=True)
class Task:
    """A block and a group of views, for the units of it that this process has claimed."""

    number: int
    block: int
    group: int
    units: list[Unit]
    rows: range
    started: float = field(default_factory=time.monotonic)
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    done: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


@final
@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Rows of one task to decode together; a batch never crosses a block."""

    task: int
    group: int
    rows: range


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode process hands over: pixels per (size, interpolation) as [views, b, h, w, 3] uint8."""

    request: BatchRequest
    pixels: dict[RenderKey, torch.Tensor]
    params: torch.Tensor
    sizes: torch.Tensor
    crcs: torch.Tensor
    bad: tuple[tuple[int, str], ...]


@final
class Decoder(Dataset[Decoded]):
    """Reads, checks and decodes each image once, and draws all views of a group from it."""

    def __init__(
        self, data: "ImageData", views: ViewSet, manifest: Manifest, renders: Sequence[RenderKey]
    ) -> None:
        self._data, self._views, self._manifest, self._renders = data, views, manifest, tuple(renders)

    def __getitems__(self, requests: list[BatchRequest]) -> Decoded:
        """Decode the one request of a batch; a bad image is recorded and drawn black."""
        (request,) = requests
        views, count = self._manifest.views_of(request.group), len(request.rows)
        pixels = {
            (size, interpolation): np.zeros((len(views), count, *size, 3), np.uint8)
            for size, interpolation in self._renders
        }
        width = len(self._manifest.param_names)
        params = np.full((count, len(views), width), np.iinfo(np.int32).max, np.int32)
        sizes, crcs = np.zeros(count, np.int64), np.zeros(count, np.int64)
        bad: list[tuple[int, str]] = []
        for place, row in enumerate(request.rows):
            try:
                encoded = self._data.encoded(row)
                sizes[place], crcs[place] = len(encoded), checksum(encoded)
                image = self._data.decode(row, encoded)
            except BadDataError as error:
                bad.append((row, error.message))
                continue
            key = self._data.keys[row]
            for number, view in enumerate(views):
                params[place, number] = self._views.params(key, view, *image.size)
                for (size, interpolation), canvas in pixels.items():
                    canvas[number, place] = render(image, params[place, number], size, interpolation)
        return Decoded(
            request,
            {key: torch.from_numpy(canvas) for key, canvas in pixels.items()},
            torch.from_numpy(params),
            torch.from_numpy(sizes),
            torch.from_numpy(crcs),
            tuple(bad),
        )

    def __getitem__(self, request: BatchRequest) -> Decoded:
        return self.__getitems__([request])


@final
class TaskQueue(Sampler[list[BatchRequest]]):
    """Claims one task after the other, as the loader asks for more; never waits.

    It must not wait: the loader asks ahead, and a process that waited here would hold finished
    batches of a claimed task that another process may be waiting for.
    """

    def __init__(
        self, writer: CacheWriter, workers: Mapping[str, Worker], missing: Sequence[Unit], stop: StopFlag
    ) -> None:
        self._writer, self._workers, self._stop = writer, workers, stop
        self._places: dict[tuple[int, int, int], list[Unit]] = {}
        smallest = next(iter(workers.values())).batch_size if workers else 1
        for unit in missing:
            batch_size = workers[unit.teacher].batch_size if unit.part != SAMPLES else smallest
            self._places.setdefault((unit.block, unit.group, batch_size), []).append(unit)
        self.tasks: dict[int, Task] = {}

    def __iter__(self) -> Iterator[list[BatchRequest]]:
        for number, ((block, group, batch_size), units) in enumerate(sorted(self._places.items())):
            if self._stop:
                return
            claimed = [unit for unit in units if self._claim(unit)]
            if not claimed:
                continue
            rows = self._writer.manifest.rows_of(block)
            self.tasks[number] = Task(number, block, group, claimed, rows)
            for start in range(rows.start, rows.stop, batch_size):
                yield [BatchRequest(number, group, range(start, min(start + batch_size, rows.stop)))]

    def _claim(self, unit: Unit) -> bool:
        if not self._writer.claims.acquire(unit):
            return False
        if self._writer.is_done(unit):  # somebody finished it since the list was made
            self._writer.claims.release([unit])
            return False
        return True


@final
class TaskRunner:
    """Runs one pass over what is missing and can be claimed."""

    def __init__(
        self,
        writer: CacheWriter,
        data: "ImageData",
        views: ViewSet,
        workers: Mapping[str, Worker],
        *,
        drop_bad: bool,
        processes: int,
        stop: StopFlag,
        grace: float,
    ) -> None:
        self._writer, self._data, self._views, self._workers = writer, data, views, workers
        self._drop_bad, self._processes, self._stop, self._grace = drop_bad, processes, stop, grace
        self.written: Counter[str] = Counter()
        self.failed: dict[tuple[int, int], list[tuple[int, str]]] = {}
        self.images = 0
        self.seconds = 0.0
        self._waited = {"decode": 0.0, "forward": 0.0, "write": 0.0}

    def run(self, missing: Sequence[Unit]) -> None:
        """Claim, compute and publish what can be claimed of ``missing``; return when nothing is left to claim."""
        places = {(unit.block, unit.group) for unit in missing}
        manifest = self._writer.manifest
        total = sum(len(manifest.rows_of(b)) * len(manifest.views_of(g)) for b, g in places)
        queue = TaskQueue(self._writer, self._workers, missing, self._stop)
        start = time.monotonic()
        with (
            ThreadPoolExecutor(1, "kd-writer") as executor,
            console.progress(total, "images", "cache") as bar,
        ):
            try:
                self._consume(queue, executor, bar)
            finally:
                executor.shutdown(wait=True)
                for task in queue.tasks.values():
                    self._writer.claims.release(task.units)
                self.seconds += time.monotonic() - start

    def _loader(self, queue: TaskQueue) -> DataLoader[Decoded]:
        renders = list(dict.fromkeys(worker.render for worker in self._workers.values()))
        decoder = Decoder(self._data, self._views, self._writer.manifest, renders)
        return DataLoader(
            decoder,
            batch_sampler=queue,
            num_workers=self._processes,
            collate_fn=_as_it_is,
            worker_init_fn=worker_init if self._processes else None,
            pin_memory=False,
        )

    def _consume(self, queue: TaskQueue, executor: ThreadPoolExecutor, bar: Bar) -> None:
        pending: Future[None] | None = None
        batches = iter(self._loader(queue))
        while True:
            before = time.monotonic()
            decoded = next(batches, None)
            if decoded is None:
                break
            self._waited["decode"] += time.monotonic() - before
            task = queue.tasks[decoded.request.task]
            if self._stop and (task.done == 0 or self._stop.seconds() > self._grace):
                break  # not begun, or out of time: its claim is released, another run computes it
            self._compute(task, decoded)
            bar.advance(len(decoded.request.rows) * decoded.params.shape[1], bound=self._bound())
            if task.done < len(task.rows):
                continue
            before = time.monotonic()
            if pending is not None:
                pending.result()
            self._waited["write"] += time.monotonic() - before
            del queue.tasks[task.number]
            pending = executor.submit(self._finish, task)
        if pending is not None:
            pending.result()

    def _bound(self) -> str:
        """What the loop waits for most: decode, forward or write."""
        return max(self._waited, key=lambda name: self._waited[name])

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
            raw = worker.runner(decoded.pixels[worker.render][place])
            for kind, arrays in worker.plan.derive(raw, labels, wanted).items():
                kept[kind].append(arrays)
        for kind, views in kept.items():
            stacked = {name: np.stack([view[name] for view in views], axis=1) for name in views[0]}
            self._keep(task, f"{teacher}/{kind}", stacked, inside, len(task.rows))

    @staticmethod
    def _keep(task: Task, part: str, values: Mapping[str, np.ndarray], inside: slice, rows: int) -> None:
        arrays = task.arrays.setdefault(part, {})
        for name, batch in values.items():
            if name not in arrays:
                arrays[name] = np.empty((rows, *batch.shape[1:]), batch.dtype)
            arrays[name][inside] = batch

    def _finish(self, task: Task) -> None:
        """Publish a computed task (in the writer thread)."""
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
                if unit.part == SAMPLES:
                    if unit.group > 0:
                        arrays = {"params": arrays["params"]}
                    made = {"versions": versions()}
                else:
                    for name, values in arrays.items():
                        values[dropped] = self._writer.specs(unit.part)[name].fill
                    made = {**self._workers[unit.teacher].made, "versions": versions()}
                seconds = time.monotonic() - task.started
                if self._writer.publish(unit, arrays, content, task.bad, made, seconds):
                    self.written[unit.part] += 1
        finally:
            self._writer.claims.release(task.units)

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
                f"images of rows {task.rows.start}-{task.rows.stop - 1} changed while they were cached"
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


def _as_it_is(decoded: Any) -> Any:
    return decoded
