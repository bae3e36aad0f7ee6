"""Steps made of several batches: P2's labelled and unlabelled images, FixMatch's views, several data sets.

A stream is a set of images that each step takes some of, pass after pass. An epoch is one pass over the set
that lasts longest; the others come again, newly shuffled and in fresh views. Where a stream is in its passes
follows from the epoch and the step, and each pass from (data seed, stream, pass): nothing is remembered.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from kdcli.errors import KdError, UsageError
from kdcli.methods.base import Mixed
from kdcli.training.batches import Feed, FeedBatch, Order, Ticket


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
            _refuse(shares)
        longest = int(np.argmax([len(own) / share for own, share in zip(members, shares, strict=True)]))
        size = len(members[longest])
        super().__init__(-(-size // int(shares[longest])))
        # Cut where the longest stream is cut, so that every step has the same proportion up to one image.
        edges = np.arange(self.batches + 1) * size // self.batches
        ratios = [share / shares[longest] for share in shares]
        self._edges = tuple(np.rint(edges * ratio).astype(np.int64) for ratio in ratios)
        if min(int(np.diff(own).min()) for own in self._edges) < world:
            _refuse(shares)

    def __iter__(self) -> Iterator[tuple[Portion, ...]]:
        cursors = [_Stream(own, self._seed, number) for number, own in enumerate(self._members)]
        for step in range(self._start, self.batches):
            portions: list[Portion] = []
            for number, (cursor, edges) in enumerate(zip(cursors, self._edges, strict=True)):
                done = self._epoch * int(edges[-1])
                places = np.arange(done + int(edges[step]), done + int(edges[step + 1]))
                portions += [Portion(number, each) for each in cursor.take(places[self._rank :: self._world])]
            yield tuple(portions)


def _refuse(shares: Sequence[float]) -> NoReturn:
    raise UsageError(
        f"a step of {sum(shares):g} images has no room for every kind of them in this proportion",
        "Raise --batch-size, or choose an --unlabelled-ratio nearer to 1.",
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


@final
class JointFeed(Dataset[FeedBatch | KdError]):
    """Batches of several feeds, joined to one.

    Args:
        feeds: one a stream.
        labelled: whether each stream shows its labels; labels of the others are -1.
        offsets: what is added to the positions in each feed's data, so that they tell all images apart.
    """

    def __init__(self, feeds: Sequence[Feed], labelled: Sequence[bool], offsets: Sequence[int]) -> None:
        self._feeds, self._labelled, self._offsets = tuple(feeds), tuple(labelled), tuple(offsets)

    def __len__(self) -> int:
        return sum(map(len, self._feeds))

    def __getitem__(self, step: tuple[Portion, ...]) -> FeedBatch | KdError:
        batches: list[FeedBatch] = []
        for portion in step:
            batch = self._feeds[portion.stream][portion.ticket]
            if isinstance(batch, KdError):
                return batch
            batches.append(self._marked(batch, portion))
        return join(batches)

    def _marked(self, batch: FeedBatch, portion: Portion) -> FeedBatch:
        number, mixed = portion.stream, batch.mixed
        labels = batch.labels
        if not self._labelled[number]:
            labels = torch.full_like(labels, -1)
            mixed = mixed and Mixed(torch.full_like(mixed.labels, -1), mixed.own)
        return replace(
            batch,
            labels=labels,
            index=batch.index + self._offsets[number],
            mixed=mixed,
            part=torch.full_like(labels, number),
            turn=torch.full_like(labels, portion.ticket.epoch),
        )


def join(batches: Sequence[FeedBatch]) -> FeedBatch:
    """One batch of several, in their order.

    Rows of a batch that has no output of a teacher get zeros: an objective that reads them knows which rows
    are whose (:attr:`FeedBatch.part`).
    """
    sizes = [len(batch.labels) for batch in batches]

    def joined(values: Callable[[FeedBatch], Tensor | None], default: float) -> Tensor | None:
        given = [values(batch) for batch in batches]
        like = next((each for each in given if each is not None), None)
        if like is None:
            return None
        return torch.cat(
            [
                like.new_full((size, *like.shape[1:]), default) if each is None else each
                for each, size in zip(given, sizes, strict=True)
            ]
        )

    def whole(values: Callable[[FeedBatch], Tensor]) -> Tensor:
        return torch.cat([values(batch) for batch in batches])

    arrays = dict.fromkeys((t, name) for batch in batches for t, own in batch.teacher.items() for name in own)
    teacher: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays:
        values = joined(lambda b, n=name, a=array: b.teacher.get(n, {}).get(a), 0)  # type: ignore[misc]
        if values is not None:
            teacher.setdefault(name, {})[array] = values
    labels = joined(lambda batch: batch.mixed and batch.mixed.labels, -1)
    own = joined(lambda batch: batch.mixed and batch.mixed.own, 1)
    return FeedBatch(
        whole(lambda batch: batch.pixels),
        whole(lambda batch: batch.labels),
        whole(lambda batch: batch.index),
        teacher,
        None if labels is None or own is None else Mixed(labels, own),
        joined(lambda batch: batch.part, 0),
        joined(lambda batch: batch.strong, False),
        joined(lambda batch: batch.turn, 0),
        {render: whole(lambda b, r=render: b.further[r]) for render in batches[0].further},  # type: ignore[misc]
    )


def ratio_shares(batch_size: int, ratio: float) -> tuple[float, float]:
    """Labelled and unlabelled images of a step of ``batch_size``, ``ratio`` unlabelled ones per labelled one."""
    labelled = batch_size / (1 + ratio)
    return labelled, batch_size - labelled
