"""What a step eats: the student's view of some images, their labels, and what the teachers said about it.

One item of the data set is one whole batch, so that a worker gathers cached outputs in one go. The order
of an epoch follows from (data seed, epoch) alone: not from workers, nor from the number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, final

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcli.data.draw import Drawer, Drawn
from kdcli.data.sources import ImageData
from kdcli.data.views import Params, Render, ViewSet
from kdcli.errors import KdError
from kdcli.methods.base import Mixed
from kdcli.runtime import worker_setup
from kdcli.training.replay import Recording, Replay
from kdcli.types import Preprocess


@final
@dataclass(frozen=True, slots=True)
class ViewRule:
    """Which view of an image an epoch shows, to the student and to the teachers.

    Attributes:
        views: the cache's view set, or the live one.
        cached: number K of training views in the cache; None where nothing is cached.
        teacher_view: ``same``: the teachers' outputs are of the student's view, so epoch e shows view
            1 + e mod K, or view 0 where K is 0. ``eval``: they are of view 0, and the student's views
            never repeat.
    """

    views: ViewSet
    cached: int | None = None
    teacher_view: Literal["same", "eval"] = "same"

    def student(self, epoch: int) -> int:
        """View that the student sees in ``epoch`` (from 0)."""
        if self.cached is None or self.teacher_view == "eval":
            return 1 + epoch
        return 1 + epoch % self.cached if self.cached else 0

    @property
    def recorded(self) -> bool:
        """Whether the student's views are those of the cache, with their parameters recorded there."""
        return self.cached is not None and self.teacher_view == "same"

    def teacher(self, epoch: int) -> int:
        """View whose cached outputs are read in ``epoch`` (from 0)."""
        return 0 if self.teacher_view == "eval" else self.student(epoch)


@final
@dataclass(frozen=True, slots=True)
class Ticket:
    """What the order hands to the feed: make this batch."""

    epoch: int
    positions: Int64[np.ndarray, " b"]


@final
@dataclass(frozen=True, slots=True)
class FeedBatch:
    """One batch, before normalisation.

    Attributes:
        pixels: the student's view, in its input size.
        labels: class indices, -1 is unlabelled.
        index: position of each image in the data set.
        teacher: cached outputs: teacher -> array -> [b, ...], in the type they are stored in.
        mixed: what the images are mixed with, in a view that mixes.
        part: see :class:`~kdcli.methods.base.Batch`.
        strong: likewise; strong views follow the others, in the same order.
        turn: number (from 0) of the pass over its set that each image is in, which decides its view; None
            where that is the epoch.
        further: the same views in the input sizes of other students that share the batch.
    """

    pixels: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"]
    index: Int64[Tensor, " b"]
    teacher: dict[str, dict[str, Tensor]]
    mixed: Mixed | None = None
    part: Int64[Tensor, " b"] | None = None
    strong: Bool[Tensor, " b"] | None = None
    turn: Int64[Tensor, " b"] | None = None
    further: dict[Render, UInt8[Tensor, "b _ _ 3"]] = field(default_factory=dict)

    def share(self, render: Render, reads: Mapping[str, Sequence[str]]) -> "FeedBatch":
        """What one of several students takes of the batch, which is what it would be given alone.

        Args:
            render: its input size.
            reads: the arrays that it learns from: teacher -> names.
        """
        teacher = {name: {key: self.teacher[name][key] for key in keys} for name, keys in reads.items()}
        pixels = self.further.get(render, self.pixels)
        return replace(self, pixels=pixels, teacher=teacher, further={})

    def pin_memory(self) -> "FeedBatch":
        """In pinned memory; called by the loader."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "FeedBatch":
        """On ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def piece(self, number: int, of: int) -> "FeedBatch":
        """Every ``of``-th image, from ``number`` on: of each part of the step, and of each kind of view."""
        groups = torch.zeros_like(self.labels)
        if self.part is not None:
            groups += 2 * self.part
        if self.strong is not None:
            groups += self.strong
        # In ascending order, so that weak and strong views of an image are at the same place of their kinds.
        found = [(groups == group).nonzero().squeeze(1)[number::of] for group in sorted(set(groups.tolist()))]
        rows = torch.cat(found).sort().values
        return self if of == 1 else self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "FeedBatch":
        teacher = {
            name: {key: change(value) for key, value in arrays.items()}
            for name, arrays in self.teacher.items()
        }
        mixed = self.mixed and Mixed(change(self.mixed.labels), change(self.mixed.own))
        further = {render: change(pixels) for render, pixels in self.further.items()}
        part, strong, turn = (
            None if each is None else change(each) for each in (self.part, self.strong, self.turn)
        )
        return FeedBatch(
            change(self.pixels),
            change(self.labels),
            change(self.index),
            teacher,
            mixed,
            part,
            strong,
            turn,
            further,
        )


@final
class Feed(Dataset[FeedBatch | KdError]):
    """Batches of a data set, decoded and joined with cached outputs, in a worker.

    An item is a batch, or the error that kept it from being one: raised in a worker, it would reach
    the user as a worker's traceback.

    Args:
        data: the images.
        preprocess: size and interpolation of the student's input.
        rule: which view an epoch shows.
        recording: cached outputs, if any.
        decoded: whether the images are looked at; if not, batches have no pixels, only cached outputs.
        further: input sizes of other students, drawn of the same decoded images.
        strong: makes a second view of each live image, of the same number; for FixMatch.
    """

    def __init__(
        self,
        data: ImageData,
        preprocess: Preprocess,
        rule: ViewRule,
        recording: Recording | None = None,
        decoded: bool = True,
        further: Sequence[Render] = (),
        strong: ViewSet | None = None,
    ) -> None:
        self._decoded = decoded
        self._data, self._rule, self._recording = data, rule, recording
        self._render = render_of(preprocess)
        self._further = [render for render in dict.fromkeys(further) if render != self._render]
        renders = [self._render, *self._further]
        self._drawer = Drawer(data, rule.views, renders, range(len(data)))
        self._strong = None if strong is None else Drawer(data, strong, renders, range(len(data)))
        self._replay = None
        if recording is not None and rule.recorded:
            self._replay = Replay(data, recording, rule.views, self._drawer)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, ticket: Ticket) -> FeedBatch | KdError:
        try:
            return self._batch(ticket)
        except KdError as error:
            return error

    def _batch(self, ticket: Ticket) -> FeedBatch:
        positions, view = ticket.positions, self._rule.student(ticket.epoch)
        if not self._decoded:
            return self._undecoded(ticket)
        encoded = [self._data.encoded(int(position)) for position in positions]
        recording = self._recording
        if recording is not None:
            recording.check(self._data, positions, encoded)
        if self._replay is not None:
            drawn, partners, params = self._replay.draw(positions, encoded, view)
        else:
            drawn, partners, params = self._live(positions, encoded, view)
        labels, strong = self._data.labels, None
        if self._strong is not None:
            strong = torch.arange(len(drawn)) >= len(positions)
            positions = np.tile(positions, 2)
        mixed = None
        if (partners >= 0).any():
            theirs = np.where(partners >= 0, labels[partners], -1)
            mixed = Mixed(torch.from_numpy(theirs), torch.from_numpy(self._rule.views.own_share(params)))
        return FeedBatch(
            _stacked(drawn, self._render),
            torch.from_numpy(labels[positions]),
            torch.from_numpy(positions),
            {} if recording is None else recording.outputs(positions, self._rule.teacher(ticket.epoch)),
            mixed,
            strong=strong,
            further={render: _stacked(drawn, render) for render in self._further},
        )

    def _undecoded(self, ticket: Ticket) -> FeedBatch:
        """A batch of what the cache holds; no image is read."""
        positions, recording = ticket.positions, self._recording
        return FeedBatch(
            torch.empty((len(positions), 0, 0, 3), dtype=torch.uint8),
            torch.from_numpy(self._data.labels[positions]),
            torch.from_numpy(positions),
            {} if recording is None else recording.outputs(positions, self._rule.teacher(ticket.epoch)),
        )

    def _live(
        self, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes], view: int
    ) -> tuple[list[Drawn], Int64[np.ndarray, " b"], Params]:
        """Views that no cache holds, drawn anew, then the strong ones; partners are of the same data set."""
        views: list[tuple[Params, Drawn]] = []
        strong: list[Drawn] = []
        for position, content in zip(positions, encoded, strict=True):
            image = self._data.decode(int(position), content)
            views.append(self._drawer.draw(int(position), image, view))
            if self._strong is not None:
                strong.append(self._strong.draw(int(position), image, view)[1])
        params = np.stack([own for own, _ in views])
        return [*(drawn for _, drawn in views), *strong], self._rule.views.partners(params), params


class Order(Sampler[Any], ABC):
    """Which batches an epoch has, in which order: the same for any number of workers and processes.

    Args:
        batches: steps of a whole epoch.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._epoch = self._start = 0

    @property
    def batches(self) -> int:
        """Steps of a whole epoch."""
        return self._batches

    @property
    def epoch(self) -> int:
        """Number (from 0) of the epoch that is drawn."""
        return self._epoch

    def seek(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration that of ``epoch`` (from 0), from batch ``start`` on."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return self._batches - self._start

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """What the feed makes batches of."""


def render_of(preprocess: Preprocess) -> Render:
    """What a view is drawn as for a model's input."""
    return preprocess.size, preprocess.interpolation


def _stacked(drawn: Sequence[Drawn], render: Render) -> UInt8[Tensor, "b h w 3"]:
    return torch.from_numpy(np.stack([pixels[render] for pixels in drawn]))


@final
class EpochOrder(Order):
    """Shuffled batches of one epoch, the same for any number of workers and processes.

    Where some images are unlabelled, labelled and unlabelled ones are spread evenly, so every batch has its
    share of both; labelled images that are fewer come again, newly shuffled, until they are half of each
    batch: P2 (Eq. 4) takes a mean over a batch of either kind, and a mean over two or three labelled images
    is mostly noise. Batches are of equal size up to one image: a last batch of one image would break BatchNorm.

    Args:
        labels: -1 is unlabelled.
        batch_size: images per step, over all processes.
        seed: the data seed.
        rank, world: number of this process, and how many there are.
        pieces: that a step is computed in, see :meth:`FeedBatch.piece`. Processes take runs of so many images in
            turn: whatever their number, a piece is the same images, those that it has in one process.
    """

    def __init__(
        self,
        labels: Int64[np.ndarray, " n"],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pieces: int = 1,
    ) -> None:
        self._groups = [
            group for group in (np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)) if len(group)
        ]
        length = max(map(len, self._groups)) * 2 if self._repeats() else len(labels)
        super().__init__(-(-length // batch_size))
        self._seed, self._rank, self._world, self._pieces = seed, rank, world, pieces

    def __iter__(self) -> Iterator[Ticket]:
        for batch in np.array_split(self._positions(), self._batches)[self._start :]:
            taken_by = np.arange(len(batch)) // self._pieces % self._world
            yield Ticket(self._epoch, batch[taken_by == self._rank])

    def _positions(self) -> Int64[np.ndarray, " n"]:
        random = np.random.Generator(np.random.Philox(key=[self._seed, self._epoch]))
        shuffled = [self._shuffled(group, random) for group in self._groups]
        if len(shuffled) == 1:
            return shuffled[0]
        places = [(np.arange(len(group)) + random.random()) / len(group) for group in shuffled]
        positions: Int64[np.ndarray, " n"] = np.concatenate(shuffled)[
            np.argsort(np.concatenate(places), kind="stable")
        ]
        return positions

    def _repeats(self) -> bool:
        """Whether there are labelled images, but fewer than unlabelled ones."""
        return len(self._groups) == 2 and len(self._groups[0]) < len(self._groups[1])

    def _shuffled(
        self, group: Int64[np.ndarray, " k"], random: np.random.Generator
    ) -> Int64[np.ndarray, " m"]:
        """A group in random order; the labelled one as often as it takes to match the unlabelled one."""
        if not self._repeats() or group is self._groups[1]:
            return random.permutation(group)
        size = len(self._groups[1])
        rounds = [random.permutation(group) for _ in range(-(-size // len(group)))]
        return np.concatenate(rounds)[:size]


def plain_order(count: int, batch_size: int) -> list[Ticket]:
    """All images once, in their own order."""
    return [
        Ticket(0, np.arange(first, min(first + batch_size, count))) for first in range(0, count, batch_size)
    ]


Loader = DataLoader[FeedBatch | KdError]
Item = TypeVar("Item")


def make_loader(
    feed: Dataset[Item], order: Order | Sequence[Ticket], workers: int, device: torch.device
) -> DataLoader[Item]:
    """A loader whose items are whole batches.

    Its generator is its own: the loader draws a seed per epoch, which must not move the run's random numbers.
    """
    return DataLoader(
        feed,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=worker_setup(workers),
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=_unchanged,  # an item is a batch already
        generator=torch.Generator(),
    )


def _unchanged(batch: Any) -> Any:
    return batch
