"""Device batches: put together from decoded pieces, and launched through every teacher without waiting."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from kdcli.cache.layout import SAMPLES
from kdcli.extract.decoding import Decoded, Task
from kdcli.extract.lanes import Lanes
from kdcli.extract.outputs import Derived
from kdcli.extract.worker import Worker
from kdcli.geometry import Render
from kdcli.outputs import PIXELS

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.cache.filling import Filling


@final
@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of one teacher over a batch.

    Attributes:
        teacher: its name.
        views: that went through.
        derived: what is stored of it, [views * rows, ...]; on the host once the batch has come down.
        logits: raw ones of view 0 or whichever was first, where the cost of storing is to be measured.
    """

    teacher: str
    views: range
    derived: Derived
    logits: "Tensor | None"

    def mapped(self, change: "Callable[[Tensor], Tensor]") -> "Forward":
        """With every tensor changed."""
        logits = None if self.logits is None else change(self.logits)
        return replace(self, derived=self.derived.mapped(change), logits=logits)


@final
@dataclass(slots=True)
class Batch:
    """Rows of a task that go through the teachers together: as many as a forward takes, whatever was decoded at once.

    Attributes:
        task: which.
        rows: of the cache.
        pieces: as they were decoded, in order.
        pixels: on the device, [views, b, h, w, 3] uint8 by what they are drawn as.
        labels: on the device, [b].
        launched: on the device; kept, as :attr:`pixels` are, until it is done with.
        forwards: the same on the host, once :attr:`event` has come.
        event: None: nothing was launched.
    """

    task: Task
    rows: range
    pieces: list[Decoded] = field(default_factory=list)
    pixels: "dict[Render, Tensor]" = field(default_factory=dict)
    labels: "Tensor | None" = None
    launched: list[Forward] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    event: Any = None

    @property
    def images(self) -> int:
        """Images times views."""
        return len(self.rows) * self.pieces[0].params.shape[1]


@final
class Launcher:
    """Puts batches together, each render on its way up as it is decoded, once for all teachers, and launches them.

    Args:
        lanes: of the device.
        workers: the teachers.
        writer: of the cache.
    """

    def __init__(self, lanes: Lanes, workers: Mapping[str, Worker], writer: "Filling") -> None:
        self._lanes, self._workers, self._writer = lanes, workers, writer
        self._open: Batch | None = None
        self._measured: set[str] = set()

    def add(self, task: Task, piece: Decoded, upload: bool) -> Batch | None:
        """The batch that a piece completes; None while it lacks others.

        Args:
            task: of the piece.
            piece: the rows after those of the piece before.
            upload: whether it is to go through the teachers.
        """
        batch = self._open or Batch(task, task.batch_of(piece.request.rows))
        batch.pieces.append(piece)
        if upload:
            self._upload(batch, piece)
        done = piece.request.rows.stop == batch.rows.stop
        self._open = None if done else batch
        return batch if done else None

    def _upload(self, batch: Batch, piece: Decoded) -> None:
        wanted = {self._workers[name].render for name in self._wanted(batch.task)}
        pixels = {render: values for render, values in piece.pixels.items() if render in wanted}
        if len(piece.request.rows) == len(batch.rows):
            batch.pixels = {render: self._lanes.up(values) for render, values in pixels.items()}
            batch.labels = self._lanes.up(piece.labels)
            return
        count, first = len(batch.rows), piece.request.rows.start - batch.rows.start
        inside = slice(first, first + len(piece.request.rows))
        if batch.labels is None:
            batch.labels = self._lanes.room((count,), piece.labels.dtype)
        self._lanes.up(piece.labels, batch.labels[inside])
        for render, values in pixels.items():
            if render not in batch.pixels:
                shape = (len(values), count, *values.shape[2:])
                batch.pixels[render] = self._lanes.room(shape, values.dtype)
            # View by view, as what lies in one piece on both sides is copied by the device's own engine.
            for view, place in zip(values, batch.pixels[render], strict=True):
                self._lanes.up(view, place[inside])

    def launch(self, batch: Batch) -> None:
        """Every forward of a batch, back to back, and the way down behind them.

        Raises:
            DeviceError: out of memory, or the device fails.
        """
        views, store = self._writer.manifest.views_of(batch.task.group), self._writer.store
        self._lanes.arrive()
        assert batch.labels is not None  # it was uploaded
        for name, kinds in self._wanted(batch.task).items():
            worker = self._workers[name]
            kept = {kind: store.views(f"{name}/{kind}") for kind in kinds}
            for some, wanted in worker.forwards(views, kept):
                pixels = batch.pixels[worker.render][some.start - views.start : some.stop - views.start]
                derived, logits = worker.launch(pixels, batch.labels, wanted)
                if name in self._measured:
                    logits = None
                elif logits is not None:
                    self._measured.add(name)
                batch.launched.append(Forward(name, some, derived, logits))
        batch.forwards, batch.event = self._lanes.down(batch.launched)

    @staticmethod
    def _wanted(task: Task) -> dict[str, list[str]]:
        """The kinds of output that a task has to compute, by teacher; its pixels are those that were decoded."""
        wanted: dict[str, list[str]] = {}
        for unit in task.units:
            if unit.part != SAMPLES and unit.kind != PIXELS:
                wanted.setdefault(unit.teacher, []).append(unit.kind)
        return wanted
