"""Computed tasks on their way to the disk, in threads beside the forwards."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np

from kdcli.cache.filling import Filling
from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.writer import content_digest
from kdcli.data.kept_pixels import DRAWN_BY, drawn_by
from kdcli.data.views import decode_of
from kdcli.errors import IdentityError
from kdcli.extract.decoding import Task
from kdcli.extract.worker import Worker
from kdcli.outputs import PIXELS
from kdcli.runtime import versions
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.data.joined import Images

TASKS = 1
"""Finished tasks that may be being written while the next one is computed; one more makes the run wait. A kill loses
what is being computed and what is being written, so there are not more."""
WRITERS = 4
"""Threads that write the units of a task: a disk over a network takes milliseconds a file, for several at once too."""


@final
class Publisher:
    """Publishes tasks. Leaving its context waits for what is under way.

    Args:
        writer: of the cache.
        data: the images.
        workers: the teachers.
        drop_bad: record images that cannot be read as absent; else their task fails.

    Attributes:
        written: (block, group) by teacher.
        failed: images that cannot be read, by (block, group) of tasks that failed because of them.
        bytes: written.
        compression: what storing costs, by teacher and kind.
        waited: seconds that somebody waited for the disk.
        failure: what the first writer raised that raised anything.
    """

    def __init__(
        self, writer: Filling, data: "Images", workers: Mapping[str, Worker], drop_bad: bool
    ) -> None:
        self._writer, self._data, self._workers, self.drop_bad = writer, data, workers, drop_bad
        self.written: dict[str, set[tuple[int, int]]] = {name: set() for name in (SAMPLES, *workers)}
        self.failed: dict[tuple[int, int], list[tuple[int, str]]] = {}
        self.compression: dict[str, dict[str, dict[str, float]]] = {}
        self.bytes, self.waited = 0, 0.0
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._tasks = ThreadPoolExecutor(TASKS, "kd-task")
        self._units = ThreadPoolExecutor(WRITERS, "kd-writer")
        return self

    def __exit__(self, *_: object) -> None:
        self._tasks.shutdown(wait=True)
        self._units.shutdown(wait=True)

    def put(self, task: Task) -> None:
        """Publish a computed task, once there is room; what a writer raised is raised here."""
        self.settle(TASKS - 1)
        writing = self._tasks.submit(self._finish, task)
        self._pending.append(writing)
        writing.add_done_callback(self._note)

    def settle(self, allowed: int = TASKS) -> None:
        """Wait until at most ``allowed`` tasks are being written; what a writer raised is raised here."""
        before = time.monotonic()
        while self._pending and (len(self._pending) > allowed or self._pending[0].done()):
            self._pending.popleft().result()
        self.waited += time.monotonic() - before

    def _note(self, writing: Future[None]) -> None:
        self.failure = self.failure or writing.exception()

    def _finish(self, task: Task) -> None:
        """Publish a task, its units side by side (in a thread)."""
        try:
            if task.bad and not self.drop_bad:
                self.failed[task.block, task.group] = task.bad
                return
            samples = task.arrays[SAMPLES]
            content = content_digest(samples["content_size"], samples["content_crc"])
            self._require_recorded_content(task, content)
            writing = [self._units.submit(self._publish, task, unit, content) for unit in task.units]
            wait(writing)  # all of them: none may still write when their claims are given back
            for each in writing:
                each.result()
        finally:
            self._writer.claims.release(task.units)

    def _publish(self, task: Task, unit: Unit, content: str) -> None:
        arrays = task.arrays[unit.part]
        if unit.part == SAMPLES and unit.group > 0:
            arrays = {"params": arrays["params"]}
        if unit.part != SAMPLES:
            dropped = [row - task.rows.start for row, _ in task.bad]
            for name, values in arrays.items():
                values[dropped] = self._writer.specs(unit.part)[name].fill
        seconds = time.monotonic() - task.started
        if self._writer.publish(unit, arrays, content, task.bad, self._made(unit), seconds):
            with self._lock:
                self.written[unit.teacher].add((unit.block, unit.group))
                self.bytes += sum(values.nbytes for values in arrays.values())

    def _made(self, unit: Unit) -> dict[str, Any]:
        made: dict[str, Any] = {"versions": versions()}
        if unit.part != SAMPLES:
            made |= self._workers[unit.teacher].made
        if unit.kind == PIXELS:
            made[DRAWN_BY] = drawn_by(
                self._workers[unit.teacher].render, decode_of(self._writer.manifest.view_set)
            )
        error = self.compression.get(unit.teacher, {}).get(unit.kind)
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
