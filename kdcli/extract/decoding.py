"""Decode processes: which rows belong together, and what becomes of their images."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcli.cache.backends.base import checksum
from kdcli.cache.filling import Filling
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.views import Drawer, Drawn, ViewSet
from kdcli.errors import BadDataError, KdError
from kdcli.geometry import Render
from kdcli.handing import Handing
from kdcli.runtime import StopFlag
from kdcli.workers import Watched, worker_setup

if TYPE_CHECKING:
    from kdcli.data.joined import Images


@final
@dataclass(slots=True)
class Task:
    """A block and a group of views, for the units of it that this process has claimed.

    Attributes:
        number: of it in this run.
        block, group: its place.
        units: claimed.
        rows: of the block.
        batch_size: how many of them go through the teachers together.
        started: when (monotonic seconds).
        begun: whether images of it have been decoded.
        collected: rows that are in :attr:`arrays`.
        arrays: [rows, ...] by part and name.
        bad: rows whose images cannot be read, and why.
    """

    number: int
    block: int
    group: int
    units: list[Unit]
    rows: range
    batch_size: int
    started: float
    begun: bool = False
    collected: int = 0
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def batch_of(self, rows: range) -> range:
        """The rows that go through the teachers together with these."""
        first = rows.start - (rows.start - self.rows.start) % self.batch_size
        return range(first, min(first + self.batch_size, self.rows.stop))

    def array(self, part: str, name: str, row_shape: Sequence[int], dtype: np.dtype | str) -> np.ndarray:
        """[rows, *row_shape] of an array; the first time not filled."""
        arrays = self.arrays.setdefault(part, {})
        if name not in arrays:
            arrays[name] = np.empty((len(self.rows), *row_shape), dtype)
        return arrays[name]


@final
@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Rows of one task to decode together, at most as many as go through its teachers together.

    Attributes:
        task: its number.
        block, group: its place.
        rows: of the cache.
        views: how many of the group's views are to be drawn: an output kept of view 0 only needs no more.
        known: nothing is wanted but view 0 of images that are recorded already: kept pixels do.
    """

    task: int
    block: int
    group: int
    rows: range
    views: int
    known: bool = False


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode process hands over: pixels by what they are drawn as, [views, b, h, w, 3] uint8; labels [b], -1
    = none; of each image its view parameters, size and checksum."""

    request: BatchRequest
    pixels: dict[Render, torch.Tensor]
    labels: torch.Tensor
    params: torch.Tensor
    sizes: torch.Tensor
    crcs: torch.Tensor
    bad: tuple[tuple[int, str], ...]

    def pin_memory(self) -> "Decoded":
        """With what a GPU needs in pinned memory, from where it copies without waiting; called by the loader."""
        pixels = {render: tensor.pin_memory() for render, tensor in self.pixels.items()}
        return replace(self, pixels=pixels, labels=self.labels.pin_memory())


@final
class Decoder(Dataset[Decoded]):
    """Reads, checks and decodes each image once, and draws all views of a group from it.

    Args:
        data: the images.
        views: what is drawn of them.
        manifest: of the cache.
        renders: what to draw them as.
        kept: pixels of the cache that need no drawing, if any.
    """

    def __init__(
        self,
        data: "Images",
        views: ViewSet,
        manifest: Manifest,
        renders: Sequence[Render],
        kept: KeptPixels | None = None,
    ) -> None:
        self._data, self._views, self._manifest, self._renders = data, views, manifest, tuple(renders)
        self._kept = kept

    def __getitem__(self, request: BatchRequest) -> Decoded:
        """Decode a batch; a bad image is recorded and drawn black."""
        views, count = self._manifest.views_of(request.group), len(request.rows)
        evaluated = views == range(1)  # where view 0 shows several clips, it is a group of its own
        pool = self._manifest.segment_rows(self._manifest.segment_of(request.block))
        drawer = Drawer(self._data, self._views, self._renders, pool)
        pixels = {
            render: np.zeros((request.views, count, *render.drawn(evaluated), 3), np.uint8)
            for render in self._renders
        }
        params = np.full((count, len(views), len(self._manifest.param_names)), _NO_PARAMS, np.int32)
        sizes, crcs = np.zeros(count, np.int64), np.zeros(count, np.int64)
        bad: list[tuple[int, str]] = []
        kept: Sequence[Drawn | None] = [None] * count
        if self._kept is not None and request.known:
            kept = self._kept.draw(np.arange(request.rows.start, request.rows.stop), self._renders)
        for place, (row, ready) in enumerate(zip(request.rows, kept, strict=True)):
            try:
                encoded = self._data.encoded(row)
                sizes[place], crcs[place] = len(encoded), checksum(encoded)
                if ready is not None:
                    for render, canvas in pixels.items():
                        canvas[0, place] = ready[render]
                    continue
                image = self._data.picture(row, encoded, self._views.decode)
                for number, view in enumerate(views):
                    if number >= request.views:
                        params[place, number] = drawer.params(row, image, view)
                        continue
                    params[place, number], drawn = drawer.draw(row, image, view)
                    for render, canvas in pixels.items():
                        canvas[number, place] = drawn[render]
                image.load()  # whether a file is bad does not depend on what is drawn of it
            except BadDataError as error:
                bad.append((row, error.message))
                params[place] = _NO_PARAMS
                for canvas in pixels.values():
                    canvas[:, place] = 0
        return Decoded(
            request,
            {key: torch.from_numpy(canvas) for key, canvas in pixels.items()},
            torch.from_numpy(self._data.labels[request.rows.start : request.rows.stop].astype(np.int64)),
            torch.from_numpy(params),
            torch.from_numpy(sizes),
            torch.from_numpy(crcs),
            tuple(bad),
        )


_NO_PARAMS = np.iinfo(np.int32).max


def decoded_batches(
    decoder: Decoder, order: Iterable[BatchRequest], processes: int, pinned: bool = False
) -> Iterator[Decoded]:
    """Batches, decoded ahead.

    Args:
        decoder: of the images.
        order: what is wanted; asked ahead as well.
        processes: decode processes.
        pinned: into memory from where a GPU copies without waiting.

    Raises:
        DeviceError: a decode process was killed.
        KdError: an image is not bad but cannot be reached (I/O, permission).
    """
    loader: DataLoader[Decoded | KdError] = DataLoader(
        Handing(decoder),
        batch_size=None,
        sampler=order,
        num_workers=processes,
        prefetch_factor={0: None, 1: 2}.get(processes, _AHEAD),
        collate_fn=_as_it_is,
        worker_init_fn=worker_setup(processes),
        pin_memory=pinned,
    )
    for decoded in Watched(loader):
        if isinstance(decoded, KdError):
            raise decoded
        yield decoded


def _as_it_is(decoded: Any) -> Any:
    return decoded


_LEAST_PIECE = 8
"""Rows that are worth a message of a decode process."""
_AHEAD = 4
"""Pieces that each of several decode processes may be ahead: in all about four batches."""


def pieces_of(batch: range, processes: int) -> Iterator[range]:
    """The rows that one decode process is asked for at once: a batch is shared, so that it is there the sooner."""
    size = max(_LEAST_PIECE, -(-len(batch) // max(1, processes)))
    for first in range(batch.start, batch.stop, size):
        yield range(first, min(first + size, batch.stop))


TaskPlace = tuple[int, int, int]
"""Block, group of views, images per forward."""
_Tasks = deque[tuple[TaskPlace, list[Unit]]]


@final
class TaskQueue(Sampler[BatchRequest]):
    """Claims one task after the other, as the loader asks for more; never waits.

    It must not wait: the loader asks ahead, and a process that waited here would hold finished
    batches of a claimed task that another process may be waiting for.

    Args:
        writer: of the cache.
        batch_sizes: images per forward, by teacher.
        missing: units to do.
        stop: raised once no more tasks are to be begun.
        now: clock for how long a task took.
        processes: that decode.
    """

    def __init__(
        self,
        writer: Filling,
        batch_sizes: Mapping[str, int],
        missing: Sequence[Unit],
        stop: StopFlag,
        now: Callable[[], float],
        processes: int = 0,
    ) -> None:
        self._writer, self._stop, self._now, self._processes = writer, stop, now, processes
        self._places: dict[TaskPlace, list[Unit]] = {}
        smallest = min(batch_sizes.values(), default=64)
        for unit in missing:
            batch_size = smallest if unit.part == SAMPLES else batch_sizes[unit.teacher]
            self._places.setdefault((unit.block, unit.group, batch_size), []).append(unit)
        self.tasks: dict[int, Task] = {}

    def __iter__(self) -> Iterator[BatchRequest]:
        for number, ((block, group, batch_size), claimed) in enumerate(self._claimed_tasks()):
            rows = self._writer.manifest.rows_of(block)
            self.tasks[number] = Task(number, block, group, claimed, rows, batch_size, self._now())
            views = self._views_to_draw(claimed)
            # A block whose samples are being recorded is decoded: their parameters need the size of the image.
            known = group == 0 and views == 1 and all(unit.part != SAMPLES for unit in claimed)
            for first in range(rows.start, rows.stop, batch_size):
                batch = range(first, min(first + batch_size, rows.stop))
                for piece in pieces_of(batch, self._processes):
                    yield BatchRequest(number, block, group, piece, views, known)

    def _claimed_tasks(self) -> Iterator[tuple[TaskPlace, list[Unit]]]:
        """Claim one task after the other.

        After one that another process is at, all that seem to be nobody's come before those that are claimed, from a
        random one on: N processes that tried every task in the same order would meet at each (docs/scale.md).
        """
        left, late = _Tasks(sorted(self._places.items())), _Tasks()
        while (left or late) and not self._stop:
            place, units = (left or late).popleft()
            if claimed := self._claim_all(units):
                yield place, claimed
            elif left:
                left, late = self._in_turn([*left, *late])

    def _in_turn(self, tasks: Sequence[tuple[TaskPlace, list[Unit]]]) -> tuple[_Tasks, _Tasks]:
        """The tasks of which a unit seems to be nobody's, in order from a random one on, and those that are claimed."""
        free, claimed = self._writer.open_units([unit for _, units in tasks for unit in units])
        left = deque(task for task in tasks if not free.isdisjoint(task[1]))
        left.rotate(random.SystemRandom().randrange(len(left) or 1))
        return left, deque(t for t in tasks if free.isdisjoint(t[1]) and not claimed.isdisjoint(t[1]))

    def _views_to_draw(self, units: Sequence[Unit]) -> int:
        store, manifest = self._writer.store, self._writer.manifest
        counts = [
            len(manifest.views_of(unit.group, store.views(unit.part)))
            for unit in units
            if unit.part != SAMPLES
        ]
        return max(counts, default=0)

    def _claim_all(self, units: Sequence[Unit]) -> list[Unit]:
        """Claim what can be claimed, all kinds of a teacher or none: two processes that came to a task at the
        same moment and took one kind each would both run the teacher."""
        claimed: list[Unit] = []
        busy: set[str] = set()
        for unit in sorted(units, key=lambda unit: unit.part):  # in every process alike: the first decides
            if unit.teacher not in busy and self._claim(unit):
                claimed.append(unit)
            elif self._writer.claims.is_live(unit):
                busy.add(unit.teacher)
        return claimed

    def _claim(self, unit: Unit) -> bool:
        if not self._writer.claims.acquire(unit):
            return False
        if self._writer.is_done(unit):  # somebody finished it since the list was made
            self._writer.claims.release([unit])
            return False
        return True
