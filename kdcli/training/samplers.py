"""Which images each step takes: one batch of the data, or some of several streams.

The order of an epoch follows from (data seed, epoch) alone: not from workers, nor from the number of processes.

A stream is a set of images that each step takes some of, pass after pass: P2's labelled and unlabelled images, or
one of several data sets. An epoch is one pass over the set that lasts longest; the others come again, newly shuffled
and in fresh views. Where a stream is in its passes follows from the epoch and the step, and each pass from (data
seed, stream, pass): nothing is remembered.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

from kdcli.errors import UsageError
from kdcli.training.plan import Plan


@final
@dataclass(frozen=True, slots=True)
class Ticket:
    """What an order hands to a feed: make this batch."""

    epoch: int
    positions: Int64[np.ndarray, " b"]


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
        pieces: that a step is computed in, see :meth:`~kdcli.methods.batch.Batch.piece`. Processes take runs
            of so many images in turn: whatever their number, a piece is the images that it has in one process.

    Attributes:
        images: of an epoch, those that come again included.
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
        self.images = max(map(len, self._groups)) * 2 if self._repeats() else len(labels)
        super().__init__(-(-self.images // batch_size))
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


# --- several streams --------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Portion:
    """Images of one stream in one step; the ticket's epoch is the pass over the stream."""

    stream: int
    ticket: Ticket


@final
class StreamOrder(Order):
    """Steps that take from every stream in a fixed proportion.

    Args:
        members: positions of each stream's images in its data set.
        shares: images of each stream per step, > 0, at most (up to one).
        seed: the data seed.
        rank, world: this process takes every ``world``-th image of each stream's part of a step.

    Raises:
        UsageError: a stream would have no image in some step.
    """

    def __init__(
        self,
        members: Sequence[Int64[np.ndarray, " n"]],
        shares: Sequence[float],
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._members = tuple(members)
        self._seed, self._rank, self._world = seed, rank, world
        if min(shares) < world:
            _refuse(shares, world)
        longest = int(np.argmax([len(own) / share for own, share in zip(members, shares, strict=True)]))
        size = len(members[longest])
        super().__init__(-(-size // int(shares[longest])))
        # Cut where the longest stream is cut, so that every step has the same proportion up to one image.
        edges = np.arange(self.batches + 1) * size // self.batches
        ratios = [share / shares[longest] for share in shares]
        self._edges = tuple(np.rint(edges * ratio).astype(np.int64) for ratio in ratios)
        if min(int(np.diff(own).min()) for own in self._edges) < world:
            _refuse(shares, world)

    def __iter__(self) -> Iterator[tuple[Portion, ...]]:
        cursors = [_Stream(own, self._seed, number) for number, own in enumerate(self._members)]
        for step in range(self._start, self.batches):
            portions: list[Portion] = []
            for number, (cursor, edges) in enumerate(zip(cursors, self._edges, strict=True)):
                done = self._epoch * int(edges[-1])
                places = np.arange(done + int(edges[step]), done + int(edges[step + 1]))
                portions += [Portion(number, each) for each in cursor.take(places[self._rank :: self._world])]
            yield tuple(portions)


def _refuse(shares: Sequence[float], world: int) -> NoReturn:
    room = math.ceil(2 * world * sum(shares) / min(shares))  # twice: a step may have one image less
    raise UsageError(
        f"a step of {sum(shares):g} images has no room for every kind of them in this proportion",
        f"Raise --batch-size (to {room}), or choose an --unlabelled-ratio nearer to 1, or data sets of nearer size.",
    )


@final
class _Stream:
    """The images of one stream in the order of its passes."""

    def __init__(self, members: Int64[np.ndarray, " n"], seed: int, number: int) -> None:
        self._members, self._seed, self._number = members, seed, number
        self._turn, self._order = -1, members

    def take(self, places: Int64[np.ndarray, " b"]) -> list[Ticket]:
        """The images at these places of the endless row of passes, one ticket a pass."""
        turns = places // len(self._members)
        tickets = []
        for turn in np.unique(turns).tolist():
            if turn != self._turn:
                self._turn, self._order = turn, self._shuffled(turn)
            tickets.append(Ticket(turn, self._order[places[turns == turn] % len(self._members)]))
        return tickets

    def _shuffled(self, turn: int) -> Int64[np.ndarray, " n"]:
        # The top word of the counter keeps the streams apart, and apart from the order of a single batch.
        bits = np.random.Philox(key=[self._seed, turn], counter=[0, 0, 0, 1 + self._number])
        shuffled: Int64[np.ndarray, " n"] = np.random.Generator(bits).permutation(self._members)
        return shuffled


# --- of a plan --------------------------------------------------------------------------------


def order_of(plan: Plan, rank: int = 0, world: int = 1) -> Order:
    """Which images each step of the run takes.

    Raises:
        UsageError: the batch size leaves no room for every kind of image, or none for what is compared.
    """
    numbers, seed = plan.settings, plan.config.data_seed
    if plan.sets:
        members = [np.arange(len(each.data)) for each in plan.sets]
        return StreamOrder(members, set_shares(plan), seed, rank, world)
    if plan.split:
        shares = ratio_shares(numbers.batch_size, plan.unlabelled_ratio or 1.0)
        return StreamOrder(_split(plan), shares, seed, rank, world)
    labels = plan.data.labels if plan.needs.labels else np.zeros(len(plan.data), np.int64)
    order = EpochOrder(labels, numbers.batch_size, seed, rank, world, numbers.accumulate)
    _require_comparable(plan, order.images)
    return order


def smallest_step(images: int, batch_size: int) -> int:
    """How many images the smallest step of an epoch has: steps are of equal size up to one image."""
    return images // max(1, -(-images // batch_size))


def _require_comparable(plan: Plan, images: int) -> None:
    """Refuse steps with fewer images than the method compares with each other, naming a size that is enough."""
    size, least = plan.settings.batch_size, plan.method.least
    if (smallest := smallest_step(images, size)) < least:
        raise UsageError(
            f"{plan.method.name} compares {least} images or more with each other, and {some_step(images, size)} "
            f"has {smallest}",
            f"Use {enough(images, least)}.",
        )


def some_step(images: int, size: int) -> str:
    """The smallest step, to be told."""
    steps = -(-images // size)
    return f"the smallest of {steps} steps ({images} images)" if images % size else "a step"


def enough(images: int, least: int) -> str:
    """The smallest batch size with which every step has ``least`` images, to be told; or that none has."""
    if images < least:
        return f"more images: there {'is' if images == 1 else 'are'} {images}"
    size = next(size for size in range(least, 2 * least + 1) if smallest_step(images, size) >= least)
    return f"--batch-size {size} or more"


def set_shares(plan: Plan) -> list[float]:
    """Images of each data set in a step: a whole batch; in one label space a batch is of all, by their sizes."""
    sizes, batch_size = [len(each.data) for each in plan.sets], plan.settings.batch_size
    return [batch_size * size / sum(sizes) if plan.joint else batch_size for size in sizes]


def ratio_shares(batch_size: int, ratio: float) -> tuple[float, float]:
    """Labelled and unlabelled images of a step of ``batch_size``, ``ratio`` unlabelled ones per labelled one."""
    labelled = batch_size / (1 + ratio)
    return labelled, batch_size - labelled


def stream_sizes(plan: Plan) -> tuple[int, int]:
    """Numbers of images in the labelled and in the unlabelled batches of an epoch's first pass."""
    labelled, unlabelled = _split(plan)
    return len(labelled), len(unlabelled)


def _split(plan: Plan) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " m"]]:
    labels = plan.data.labels
    chosen = np.flatnonzero(labels < 0)
    if plan.repeats_labelled:
        chosen = np.arange(len(labels))
    return np.flatnonzero(labels >= 0), chosen
