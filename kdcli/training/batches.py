"""What a step eats: the student's view of some images, their labels, and teacher outputs.

One item of the data set is one whole batch, so that a worker gathers cached outputs in one go.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcli.data.sources import ImageData
from kdcli.data.views import Drawer, Drawn, Params, Render, ViewSet
from kdcli.errors import DeviceError, KdError
from kdcli.methods.batch import Batch, Mixed
from kdcli.training.plan import Plan
from kdcli.training.replay import Recording, Replay, ViewRule
from kdcli.training.samplers import Order, Portion, Ticket
from kdcli.workers import Watched, worker_setup


def stacked(drawn: Sequence[Drawn], renders: Sequence[Render]) -> dict[Render, UInt8[Tensor, "b h w 3"]]:
    """The pixels of a batch by what they are drawn as; what is drawn once for several is one tensor."""
    tensors: dict[int, Tensor] = {}
    for render in renders:
        if (own := id(drawn[0][render])) not in tensors:
            tensors[own] = torch.from_numpy(np.stack([pixels[render] for pixels in drawn]))
    return {render: tensors[id(drawn[0][render])] for render in renders}


@final
class Feed(Dataset[Batch | KdError]):
    """Batches of a data set, decoded and joined with cached outputs, in a worker.

    An item is a batch, or the error that kept it from being one: raised in a worker, it would reach
    the user as a worker's traceback.

    Args:
        data: the images.
        rule: which view an epoch shows.
        renders: what the students are shown, drawn of the same decoded images; the first one's are the pixels.
        recording: cached outputs, if any.
        decoded: whether the images are looked at; if not, batches have no pixels, only cached outputs.
        strong: makes a second view of each live image, of the same number.
    """

    def __init__(
        self,
        data: ImageData,
        rule: ViewRule,
        renders: Sequence[Render],
        recording: Recording | None = None,
        decoded: bool = True,
        strong: ViewSet | None = None,
    ) -> None:
        self._decoded = decoded
        self._data, self._rule, self._recording = data, rule, recording
        self._render, *self._further = distinct = list(dict.fromkeys(renders))
        self._drawer = Drawer(data, rule.views, distinct, range(len(data)))
        self._strong = None if strong is None else Drawer(data, strong, distinct, range(len(data)))
        self._replay = None
        if recording is not None and rule.recorded:
            self._replay = Replay(data, recording, rule.views, self._drawer)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, ticket: Ticket) -> Batch | KdError:
        try:
            return self._batch(ticket)
        except KdError as error:
            return error

    def _batch(self, ticket: Ticket) -> Batch:
        positions, view = ticket.positions, self._rule.student(ticket.epoch)
        if not self._decoded:
            return self._undecoded(ticket)
        encoded = self._data.encoded_at(positions)
        recording = self._recording
        if recording is not None:
            recording.check(self._data, positions, encoded)
        if self._replay is not None:
            drawn, partners, params = self._replay.draw(positions, encoded, view)
        else:
            drawn, partners, params = self._live(positions, encoded, view)
        labels, strong = self._data.labels, None
        pixels = stacked(drawn, (self._render, *self._further))
        if self._strong is not None:
            strong = torch.arange(len(drawn)) >= len(positions)
            positions = np.tile(positions, 2)
        mixed = None
        if (partners >= 0).any():
            theirs = np.where(partners >= 0, labels[partners], -1)
            mixed = Mixed(torch.from_numpy(theirs), torch.from_numpy(self._rule.views.own_share(params)))
        return Batch(
            torch.from_numpy(labels[positions]),
            torch.from_numpy(positions),
            pixels=pixels[self._render],
            teacher={}
            if recording is None
            else recording.outputs(positions, self._rule.teacher(ticket.epoch)),
            mixed=mixed,
            strong=strong,
            further={render: pixels[render] for render in self._further},
        )

    def _undecoded(self, ticket: Ticket) -> Batch:
        """A batch of what the cache holds; no image is read."""
        positions, recording = ticket.positions, self._recording
        return Batch(
            torch.from_numpy(self._data.labels[positions]),
            torch.from_numpy(positions),
            pixels=torch.empty((len(positions), 0, 0, 3), dtype=torch.uint8),
            teacher={}
            if recording is None
            else recording.outputs(positions, self._rule.teacher(ticket.epoch)),
        )

    def _live(
        self, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes], view: int
    ) -> tuple[list[Drawn], Int64[np.ndarray, " b"], Params]:
        """Views that no cache holds, drawn anew, then the strong ones; partners are of the same data set."""
        views: list[tuple[Params, Drawn]] = []
        strong: list[Drawn] = []
        for position, content in zip(positions, encoded, strict=True):
            image = self._data.picture(int(position), content, self._rule.views.decode)
            views.append(self._drawer.draw(int(position), image, view))
            if self._strong is not None:
                strong.append(self._strong.draw(int(position), image, view)[1])
        params = np.stack([own for own, _ in views])
        return [*(drawn for _, drawn in views), *strong], self._rule.views.partners(params), params


@final
class JointFeed(Dataset[Batch | KdError]):
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

    def __getitem__(self, step: tuple[Portion, ...]) -> Batch | KdError:
        batches: list[Batch] = []
        for portion in step:
            batch = self._feeds[portion.stream][portion.ticket]
            if isinstance(batch, KdError):
                return batch
            batches.append(self._marked(batch, portion))
        return join(batches)

    def _marked(self, batch: Batch, portion: Portion) -> Batch:
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


@final
class SeveralLabels(Dataset[Batch | KdError]):
    """Batches of a feed, with the labels that their classes stand for.

    Args:
        feed: whose batches they are.
        table: which labels each class stands for.
    """

    def __init__(self, feed: Dataset[Batch | KdError], table: Bool[np.ndarray, "c l"]) -> None:
        self._feed, self._table = feed, torch.from_numpy(table)

    def __getitem__(self, step: Any) -> Batch | KdError:
        batch = self._feed[step]
        if isinstance(batch, KdError):
            return batch
        mixed = batch.mixed and replace(batch.mixed, targets=self._targets(batch.mixed.labels))
        return replace(batch, targets=self._targets(batch.labels), mixed=mixed)

    def _targets(self, labels: Int64[Tensor, " b"]) -> Float[Tensor, "b l"]:
        return self._table[labels.clamp(min=0)].float()  # of an unlabelled image they are not looked at


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in their order.

    Rows of a batch that has no output of a teacher get zeros: an objective that reads them knows which rows
    are whose (:attr:`Batch.part`).
    """
    sizes = [len(batch.labels) for batch in batches]

    def joined(values: Callable[[Batch], Tensor | None], default: float) -> Tensor | None:
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

    def whole(values: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([values(batch) for batch in batches])

    arrays = dict.fromkeys((t, name) for batch in batches for t, own in batch.teacher.items() for name in own)
    teacher: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays:
        values = joined(lambda b, n=name, a=array: b.teacher.get(n, {}).get(a), 0)  # type: ignore[misc]
        if values is not None:
            teacher.setdefault(name, {})[array] = values
    labels = joined(lambda batch: batch.mixed and batch.mixed.labels, -1)
    own = joined(lambda batch: batch.mixed and batch.mixed.own, 1)
    return Batch(
        labels=whole(lambda batch: batch.labels),
        index=whole(lambda batch: batch.index),
        pixels=whole(lambda batch: batch.pixels),
        teacher=teacher,
        mixed=None if labels is None or own is None else Mixed(labels, own),
        part=joined(lambda batch: batch.part, 0),
        strong=joined(lambda batch: batch.strong, False),
        turn=joined(lambda batch: batch.turn, 0),
        further={render: whole(lambda b, r=render: b.further[r]) for render in batches[0].further},  # type: ignore[misc]
    )


def feed_of(
    plan: Plan, renders: Sequence[Render], recording: Recording | None, decoded: bool = True
) -> Dataset[Batch | KdError]:
    """What makes the batches of :func:`~kdcli.training.samplers.order_of`.

    Args:
        plan: the run.
        renders: see :class:`Feed`.
        recording: the cached side, as the workers read it.
        decoded: likewise.

    Raises:
        DeviceError: outputs of several data sets cannot be held on the training device.
    """
    feed, table = _feed_of(plan, renders, recording, decoded), plan.labels.table(plan.data)
    return feed if table is None else SeveralLabels(feed, table)


def _feed_of(
    plan: Plan, renders: Sequence[Render], recording: Recording | None, decoded: bool = True
) -> Dataset[Batch | KdError]:
    if plan.sets:
        if plan.config.resident == "gpu":
            raise DeviceError(
                "--resident gpu holds the outputs of one data set, and there are several",
                "Use --resident ram.",
            )
        first = Feed(plan.data, plan.rule, renders, recording, decoded)
        feeds = [
            first,
            *(_further_feed(plan, each.data, renders, recording, decoded) for each in plan.sets[1:]),
        ]
        labelled = [plan.needs.labels, *[True] * (len(feeds) - 1)]
        offsets = np.cumsum([0, *(len(each.data) for each in plan.sets[:-1])]).tolist()
        return JointFeed(feeds, labelled, offsets)
    if plan.split:
        # No outputs of teachers are read for the labelled batch; a cut student still needs its maps.
        maps = {} if plan.lower is None else plan.lower.with_maps({})
        silent = None if recording is None else replace(recording, reads=maps)
        return JointFeed(
            [
                Feed(plan.data, plan.rule, renders, silent, decoded),
                Feed(plan.data, plan.rule, renders, recording, decoded, plan.strong),
            ],
            labelled=[True, False],
            offsets=[0, 0],
        )
    return Feed(plan.data, plan.rule, renders, recording, decoded)


def _further_feed(
    plan: Plan, data: ImageData, renders: Sequence[Render], recording: Recording | None, decoded: bool
) -> Feed:
    """Live views of a data set that no teacher is asked about; of a cut student the maps of cached ones."""
    if plan.lower is None or recording is None:
        return Feed(data, ViewRule(replace(plan.rule.views, train_views=0), None), renders)
    rows = recording.cache.rows_of(data, check_content=False)
    return Feed(
        data, plan.rule, renders, replace(recording, rows=rows, reads=plan.lower.with_maps({})), decoded
    )


Loader = Iterable[Batch | KdError]
Item = TypeVar("Item")


def make_loader(
    feed: Dataset[Item], order: Order | Sequence[Ticket], workers: int, device: torch.device
) -> Iterable[Item]:
    """A loader whose items are whole batches.

    Its generator is its own: the loader draws a seed per epoch, which must not move the run's random numbers.
    """
    loader = DataLoader(
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
    return Watched(loader)


def _unchanged(batch: Any) -> Any:
    """As it is; of what steps eat the worker also writes down what the host is to know."""
    return replace(batch, host=batch.known) if isinstance(batch, Batch) else batch
