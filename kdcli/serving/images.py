"""Cached images as a data set of torch, for one's own training loop.

What an item shows is what ``kd train-student`` shows: the same batches are made by the same feed, and cut into images.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcli.cache.cacheset import CacheSet, only_location
from kdcli.data.sizes import require_kind
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.errors import CacheMissingError, KdError, UsageError
from kdcli.geometry import Render
from kdcli.models.spec import open_model
from kdcli.models.teacher import normalise
from kdcli.models.timm_models import preprocess_of
from kdcli.runtime import worker_count
from kdcli.training.batches import Feed
from kdcli.training.replay import Recording, ViewRule, require_partners
from kdcli.training.samplers import EpochOrder, Ticket
from kdcli.training.views import replayed
from kdcli.types import Preprocess
from kdcli.workers import worker_setup

Student: TypeAlias = nn.Module | str | Preprocess | int
"""Whose input images are made for: a network of timm, a model string, a preprocessing, or the side in pixels (then
timm's own defaults: bicubic, ImageNet's mean and deviation)."""
Item: TypeAlias = dict[str, Any]


@final
class CachedImages(Dataset[Item]):
    """Images with their labels and what teachers gave for the same view of them.

    An item is ``{"image": [3, h, w], "label", "index", "teacher": {NAME: {ARRAY: [...]}}}``, of clips [3, t, h, w];
    where views are mixed with other images also ``"mixed_label"`` (-1: none) and ``"own_share"``. Epoch e shows view
    1 + e mod K of the K cached training views, or view 0 where there are none; :meth:`set_epoch` says which epoch it
    is, also to running workers.

    Args:
        caches: what is cached.
        data: where the images are; None: as the cache recorded.
        student: what images are made for, see :data:`Student`.
        teachers: names, each with the arrays to give; or names only, or one, which give all arrays that are kept of
            all views. Default: all teachers.
        teacher_view: ``same``: outputs of the view that is shown. ``eval``: those of view 0; the views never repeat.

    Raises:
        KdError: what ``kd train-student`` refuses, too: images that are not cached, or changed since.
    """

    def __init__(
        self,
        caches: CacheSet,
        data: str | None,
        *,
        student: Student,
        teachers: "str | Sequence[str] | dict[str, Sequence[str]] | None" = None,
        teacher_view: Literal["same", "eval"] = "same",
    ) -> None:
        self.preprocess = _preprocess(student)
        self.data = open_data(_location(caches) if data is None else data)
        require_kind("the student", self.preprocess, self.data)
        # The feed compares the bytes as it decodes them.
        rows = caches.rows_of(self.data, check_content=False)
        views = ViewSet.from_document(caches.views_of(rows))
        eval_only = ViewRule(views, views.train_views, "eval")
        self._rule = replayed(caches, rows, views) if teacher_view == "same" else eval_only
        if teacher_view == "eval" and views.mixes:
            raise UsageError(
                f"recipe {views.recipe} mixes images, and with teacher_view='eval' the teachers saw them unmixed",
                "Leave teacher_view out.",
            )
        shown = sorted({self._rule.teacher(epoch) for epoch in range(max(1, views.train_views))})
        reads = _reads(caches, teachers, with_views=shown != [0])
        usable = caches.require(reads, rows, shown)
        if not usable.any():
            raise CacheMissingError(
                "none of the images has cached outputs", "Run kd cache-teachers to its end."
            )
        if not usable.all():
            self.data, rows = self.data.select(np.flatnonzero(usable)), rows[usable]
        recording = Recording(caches, rows, reads)
        if self._rule.recorded:
            require_partners(recording, self.data, views, [view for view in shown if view])
        self._feed = Feed(self.data, self._rule, [Render.of(self.preprocess)], recording)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def views(self) -> ViewSet:
        """What is shown."""
        return self._rule.views

    @property
    def epoch(self) -> int:
        """Number (from 0) of the epoch that is shown."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Show the views of another epoch; a loader of :func:`loader_of` calls it itself."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items at once, as a DataLoader asks for them: outputs are gathered together."""
        positions = np.asarray(indices, np.int64)
        if len(positions) and not -len(self) <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"of {len(self)} images there is no image {positions.max()}")
        batch = self._feed[Ticket(self.epoch, positions % len(self))]
        if isinstance(batch, KdError):
            raise batch
        images = normalise(batch.pixels, self.preprocess, channels_last=False)
        columns: dict[str, Tensor] = {"label": batch.labels, "index": batch.index}
        if self._rule.views.mixes:
            none = torch.full_like(batch.labels, -1), torch.ones(len(batch.labels))
            mixed = none if batch.mixed is None else (batch.mixed.labels, batch.mixed.own)
            columns |= dict(zip(("mixed_label", "own_share"), mixed, strict=True))
        return [
            {
                "image": images[place],
                **{name: values[place] for name, values in columns.items()},
                "teacher": {
                    teacher: {name: values[place] for name, values in arrays.items()}
                    for teacher, arrays in batch.teacher.items()
                },
            }
            for place in range(len(positions))
        ]


@final
class Batches(Sampler[list[int]]):
    """The batches of ``kd train-student``, epoch after epoch.

    Args:
        images: is told which epoch it is, whenever a pass begins.
        batch_size: images a batch.
        seed: of the order.
    """

    def __init__(self, images: CachedImages, batch_size: int, seed: int) -> None:
        self._images, self._order = images, EpochOrder(images.data.labels, batch_size, seed)
        self.next_epoch = 0

    def __len__(self) -> int:
        return self._order.batches

    def __iter__(self) -> Iterator[list[int]]:
        self._order.seek(self.next_epoch)
        self._images.set_epoch(self.next_epoch)
        self.next_epoch += 1
        for ticket in self._order:
            yield ticket.positions.tolist()


def loader_of(
    images: CachedImages, batch_size: int, seed: int = 0, workers: int | None = None
) -> DataLoader[Item]:
    """A loader over the images, as ``kd train-student`` shuffles them; each pass is the next epoch.

    To go on after N epochs, set ``loader.batch_sampler.next_epoch = N``.
    """
    count = worker_count(workers)
    return DataLoader(
        images,
        batch_sampler=Batches(images, batch_size, seed),
        num_workers=count,
        worker_init_fn=worker_setup(count),
        persistent_workers=count > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a loader draws a seed a pass: not of the run's random numbers
    )


def _preprocess(student: Student) -> Preprocess:
    if isinstance(student, Preprocess):
        return student
    if isinstance(student, str):
        return open_model(student, weights="random").preprocess
    if isinstance(student, nn.Module):
        return preprocess_of(student)
    return preprocess_of(None, (student, student))


def _location(caches: CacheSet) -> str:
    places = {only_location(member.manifest) for member in caches.members}
    if len(places) > 1 or None in places:
        raise UsageError("the images of the cache are from several places", "Say where they are: data=...")
    return str(places.pop())


def _reads(
    caches: CacheSet, teachers: "str | Sequence[str] | dict[str, Sequence[str]] | None", with_views: bool
) -> dict[str, tuple[str, ...]]:
    """The arrays of each teacher; of those that are not told, what is kept of the views that are shown."""
    if isinstance(teachers, dict):
        return {name: tuple(arrays) for name, arrays in teachers.items()}
    names = (
        list(caches.teachers)
        if teachers is None
        else [teachers]
        if isinstance(teachers, str)
        else list(teachers)
    )
    return {name: tuple(caches.teacher(name).array_specs(with_views)) for name in names}
