"""What a step eats: the student's view of some images, their labels, and what the teachers said about it.

One item of the data set is one whole batch, so that a worker gathers cached outputs in one go. The order
of an epoch follows from (data seed, epoch) alone: not from workers, nor from the number of processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import google_crc32c
import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcli.cache.cacheset import CacheSet
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet, render
from kdcli.errors import IdentityError, KdError
from kdcli.runtime import worker_init
from kdcli.types import Difference, Preprocess


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

    def teacher(self, epoch: int) -> int:
        """View whose cached outputs are read in ``epoch`` (from 0)."""
        return 0 if self.teacher_view == "eval" else self.student(epoch)


@final
@dataclass(frozen=True, slots=True)
class EvalRule:
    """Only ever view 0."""

    views: ViewSet

    def student(self, epoch: int) -> int:
        """0."""
        return 0

    def teacher(self, epoch: int) -> int:
        """0."""
        return 0


@final
@dataclass(frozen=True, slots=True)
class Recording:
    """The cached side of a feed.

    Attributes:
        cache: where outputs are.
        rows: row in the cache of every sample of the data set.
        reads: arrays to gather: teacher -> names.
    """

    cache: CacheSet
    rows: Int64[np.ndarray, " n"]
    reads: Mapping[str, tuple[str, ...]]


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
    """

    pixels: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"]
    index: Int64[Tensor, " b"]
    teacher: dict[str, dict[str, Tensor]]

    def pin_memory(self) -> "FeedBatch":
        """In pinned memory; called by the loader."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "FeedBatch":
        """On ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "FeedBatch":
        teacher = {
            name: {key: change(value) for key, value in arrays.items()}
            for name, arrays in self.teacher.items()
        }
        return FeedBatch(change(self.pixels), change(self.labels), change(self.index), teacher)


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
    """

    def __init__(
        self,
        data: ImageData,
        preprocess: Preprocess,
        rule: ViewRule | EvalRule,
        recording: Recording | None = None,
    ) -> None:
        self._data, self._preprocess, self._rule, self._recording = data, preprocess, rule, recording

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, ticket: Ticket) -> FeedBatch | KdError:
        try:
            return self._batch(ticket)
        except KdError as error:
            return error

    def _batch(self, ticket: Ticket) -> FeedBatch:
        positions = ticket.positions
        encoded = [self._data.encoded(int(position)) for position in positions]
        if self._recording is not None:
            self._check_content(positions, encoded, self._recording)
        view = self._rule.student(ticket.epoch)
        pixels = np.stack(
            [self._pixels(int(p), data, view) for p, data in zip(positions, encoded, strict=True)]
        )
        return FeedBatch(
            torch.from_numpy(pixels),
            torch.from_numpy(self._data.labels[positions]),
            torch.from_numpy(positions),
            {} if self._recording is None else self._outputs(positions, ticket.epoch, self._recording),
        )

    def _pixels(self, position: int, encoded: bytes, view: int) -> UInt8[np.ndarray, "h w 3"]:
        image = self._data.decode(position, encoded)
        params = self._rule.views.params(self._data.keys[position], view, image.width, image.height)
        return render(image, params, self._preprocess.size, self._preprocess.interpolation)

    def _outputs(
        self, positions: Int64[np.ndarray, " b"], epoch: int, recording: Recording
    ) -> dict[str, dict[str, Tensor]]:
        rows, view = recording.rows[positions], self._rule.teacher(epoch)
        return {
            teacher: {
                name: torch.from_numpy(recording.cache.gather(teacher, name, rows, view)) for name in names
            }
            for teacher, names in recording.reads.items()
        }

    def _check_content(
        self, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes], recording: Recording
    ) -> None:
        sizes, crcs = recording.cache.content(recording.rows[positions])
        for position, data, size, crc in zip(positions, encoded, sizes, crcs, strict=True):
            if len(data) != size or google_crc32c.value(data) != crc:
                raise IdentityError(
                    f"{self._data.path(int(position))} changed since the teachers saw it",
                    "Restore the image, or make a new cache for the changed data set.",
                    [
                        Difference(
                            "bytes/crc32c",
                            f"{size}/{crc:08x}",
                            f"{len(data)}/{google_crc32c.value(data):08x}",
                        )
                    ],
                )


@final
class EpochOrder(Sampler[Ticket]):
    """Shuffled batches of one epoch, the same for any number of workers and processes.

    Where some images are unlabelled, labelled and unlabelled ones are spread evenly, so every batch has its
    share of both; labelled images that are fewer come again, newly shuffled, until they are half of each
    batch: P2 (Eq. 4) takes a mean over a batch of either kind, and a mean over two or three labelled images
    is mostly noise. Batches are of equal size up to one image: a last batch of one image would break BatchNorm.

    Args:
        labels: -1 is unlabelled.
        batch_size: images per step, over all processes.
        seed: the data seed.
        rank, world: this process takes every ``world``-th image of each batch.
    """

    def __init__(
        self, labels: Int64[np.ndarray, " n"], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._groups = [
            group for group in (np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)) if len(group)
        ]
        self._length = max(map(len, self._groups)) * 2 if self._repeats() else len(labels)
        self._batches = -(-self._length // batch_size)
        self._seed, self._rank, self._world = seed, rank, world
        self._epoch = self._start = 0

    @property
    def batches(self) -> int:
        """Steps of a whole epoch."""
        return self._batches

    def seek(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration that of ``epoch`` (from 0), from batch ``start`` on."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return self._batches - self._start

    def __iter__(self) -> Iterator[Ticket]:
        for batch in np.array_split(self._positions(), self._batches)[self._start :]:
            yield Ticket(self._epoch, batch[self._rank :: self._world])

    def _positions(self) -> Int64[np.ndarray, " n"]:
        random = np.random.Generator(np.random.Philox(key=[self._seed, self._epoch]))
        shuffled = [self._shuffled(group, random) for group in self._groups]
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


def make_loader(
    feed: Feed, order: Sampler[Ticket] | Sequence[Ticket], workers: int, device: torch.device
) -> Loader:
    """A loader whose items are whole batches.

    Its generator is its own: the loader draws a seed per epoch, which must not move the run's random numbers.
    """
    return DataLoader(
        feed,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=worker_init,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=_unchanged,  # an item is a batch already
        generator=torch.Generator(),
    )


def _unchanged(batch: Any) -> Any:
    return batch
