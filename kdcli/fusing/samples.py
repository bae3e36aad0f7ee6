"""Which cached rows a joint teacher learns from and is judged on, and in which order they are read."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.matching import class_numbers
from kdcli.data.philox import permutation
from kdcli.data.subset import draw, fractions_of
from kdcli.errors import BadDataError, UsageError
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.parents import Source

WINDOW = 16
"""Blocks among whose rows a batch is drawn: reads stay near each other, and batches are mixed all the same."""

AHEAD = 2
"""Steps whose rows are read while an earlier one computes."""

Rows = Int64[np.ndarray, " n"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows that are computed together.

    Attributes:
        rows: their numbers.
        inputs: the parents' outputs at view 0, as they are cached.
        parts: of each data set among them: its number, places of its images in the piece, and their labels.
    """

    rows: Rows
    inputs: tuple[Tensor, ...]
    parts: tuple[tuple[int, Int64[Tensor, " m"], Int64[Tensor, " m"]], ...]

    def to(self, device: str) -> "Piece":
        """On a device, without waiting where the piece is in pinned memory; inputs as the joint teacher takes them."""

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Piece(
            self.rows,
            tuple(there(tensor).float() for tensor in self.inputs),
            tuple((number, there(places), there(labels)) for number, places, labels in self.parts),
        )


@final
@dataclass(frozen=True, slots=True)
class Samples:
    """Everything that is read, numbered through over all caches.

    Attributes:
        caches: those to learn from, then those to test on.
        sources: what is read of each parent.
        classes: names of the classes of each data set.
        labels: of every row, in its own data set; -1 = unlabelled.
        part: number of the data set of every row.
        blocks: number of the block of every row.
        train, validation, test: labelled rows, ascending; the last two may be empty.
    """

    caches: CacheSet
    sources: tuple[Source, ...]
    classes: Mapping[str, tuple[str, ...]]
    labels: Rows
    part: Rows
    blocks: Rows
    train: Rows
    validation: Rows
    test: Rows

    def ahead(self, steps: Iterable[Sequence[Rows]], device: str) -> Iterator[list["Piece"]]:
        """The pieces of each step, brought to a device; those of the next steps are read while one computes."""
        pinned = torch.device(device).type != "cpu"
        waiting: deque[Future[list[Piece]]] = deque()
        with ThreadPoolExecutor(1, "fuse-reader") as reader:
            for pieces in steps:
                waiting.append(reader.submit(lambda rows: [self._piece(r, pinned) for r in rows], pieces))
                if len(waiting) > AHEAD:
                    yield [piece.to(device) for piece in waiting.popleft().result()]
            while waiting:
                yield [piece.to(device) for piece in waiting.popleft().result()]

    def _piece(self, rows: Rows, pinned: bool) -> "Piece":
        inputs = [self.caches.gather(source.record.name, source.array, rows) for source in self.sources]
        labels, part = self.labels[rows], self.part[rows]
        places = [(int(number), np.flatnonzero(part == number)) for number in np.unique(part)]

        def ready(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(values)
            return tensor.pin_memory() if pinned else tensor

        return Piece(
            rows,
            tuple(map(ready, inputs)),
            tuple((number, ready(where), ready(labels[where])) for number, where in places),
        )

    def steps(self, batch_size: int) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.train) / batch_size)

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[Rows]:
        """The rows of each step of an epoch; sizes differ by at most one, so none is too small for BatchNorm."""
        edges = np.flatnonzero(np.diff(self.blocks[self.train])) + 1
        blocks = np.split(self.train, edges)
        order = permutation(len(blocks), "fuse-blocks", str(seed), str(epoch))
        shuffled = []
        for start in range(0, len(order), WINDOW):
            rows = np.concatenate([blocks[number] for number in order[start : start + WINDOW]])
            shuffled.append(rows[permutation(len(rows), "fuse-rows", str(seed), str(epoch), str(start))])
        return np.array_split(np.concatenate(shuffled), self.steps(batch_size))


def data_set_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """What each data set is called: its cache's folder without ending.

    Raises:
        UsageError: two have the same name.
    """
    names = tuple(path.absolute().stem for path in paths)
    if len(set(names)) < len(names):
        raise UsageError(
            f"two of the caches have the same name: {', '.join(names)}",
            "A head is named after its cache's folder: rename one of them.",
        )
    return names


def choose_samples(config: FuseConfig, caches: CacheSet, sources: tuple[Source, ...]) -> Samples:
    """Decide what is learnt from and judged on.

    Args:
        config: the share set aside, and its seed.
        caches: those of ``config.cache``, then those of ``config.test``.
        sources: what is read of each parent.

    Raises:
        BadDataError: fewer than two labelled rows are left to learn from, or none to validate on; or a test
            cache names classes that its data set has not.
        CorruptError: bytes changed since they were written.
    """
    names = data_set_names(config.cache)
    members, count = caches.members, len(names)
    classes = {n: m.manifest.data.class_names or () for n, m in zip(names, members, strict=False)}
    reads = {source.record.name: [source.array] for source in sources}
    labels, part, blocks, chosen = [], [], [], []
    first_block = 0
    for number, member in enumerate(members):
        name = names[number % count]
        own = member.manifest.data.class_names or ()
        foreign = set(own) - set(classes[name])
        if foreign:
            raise BadDataError(
                f"{member.layout.root} names a class that '{name}' does not have: '{min(foreign)}'",
                "Give a test cache of the same classes.",
            )
        count_rows = member.manifest.rows
        labels.append(class_numbers(own, classes[name])[member.labels])
        part.append(np.full(count_rows, number % count))
        blocks.append(first_block + np.arange(count_rows) // member.manifest.block_rows)
        first_block += member.manifest.blocks
        chosen.append(member.manifest.sample_rows() + caches.offsets[number])
    all_labels = np.concatenate(labels)
    rows = np.concatenate(chosen)
    rows = rows[caches.require(reads, rows, [0], allow_partial=None)]
    rows = np.sort(rows[all_labels[rows] >= 0])
    learnt = rows[rows < caches.offsets[count]]
    aside = np.zeros(len(learnt), bool)
    if config.validation is not None:
        aside = _aside(config, learnt, all_labels, np.concatenate(part))
    if len(learnt) - aside.sum() < 2:
        raise BadDataError("there are fewer than two labelled images to learn from", "Give a larger cache.")
    return Samples(
        caches, sources, classes, all_labels, np.concatenate(part), np.concatenate(blocks),
        learnt[~aside], learnt[aside], rows[rows >= caches.offsets[count]],
    )  # fmt: skip


def _aside(config: FuseConfig, rows: Rows, labels: Rows, part: Rows) -> np.ndarray:
    """Which rows are set aside: as large a share of every class of every data set; one of each stays."""
    share = config.validation or 0.0
    found = np.zeros(len(rows), bool)
    for number in np.unique(part[rows]):
        mine = np.flatnonzero(part[rows] == number)
        own = labels[rows[mine]]
        sizes = np.bincount(own + 1, minlength=1)
        quotas = np.minimum(fractions_of(own, share), np.maximum(sizes - 1, 0))
        found[mine] = draw(own, quotas, "validation", config.data_seed)
    if not found.any():
        raise BadDataError(
            f"--validation {share:g} is no image: no class has two labelled ones",
            "Give more labelled images, or leave --validation out.",
        )
    return found
