"""A batch, from the loader to the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

from kdcli.geometry import Render

TeacherOutputs = Mapping[str, Mapping[str, Tensor]]
"""Outputs of teachers for one batch: teacher -> array -> [b, ...], in the type they are stored in."""


@final
@dataclass(frozen=True, slots=True)
class Mixed:
    """What the images of a batch are mixed with (MixUp, CutMix).

    Attributes:
        labels: class index of each image's partner; -1 is unlabelled, or no partner.
        own: lambda, the share of each image that is its own, from 0 to 1; 1 without a partner.
        targets: see :attr:`Batch.targets`, of each image's partner.
    """

    labels: Int64[Tensor, " b"]
    own: Float[Tensor, " b"]
    targets: Float[Tensor, "b l"] | None = None


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """Over how many images a mean goes, where a batch is one of several pieces of a step's images.

    Each is the number in the whole step (over all processes) divided by the number of pieces. A loss that
    divides its sums by them has, as mean over the pieces, the mean over the images, however unequal the
    pieces are; a mean over a piece's own images has not.

    Attributes:
        images: all.
        labelled: those with a label (of their own or of the image they are mixed with).
        unlabelled: those without one of their own.
        parts: of each batch that the step is made of, see :attr:`Batch.part`.
    """

    images: float
    labelled: float
    unlabelled: float
    parts: tuple[float, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Known:
    """What the host knows of a batch's rows, wherever the batch is: nobody has to ask the device, and wait.

    Attributes:
        labelled: whether each image has a label of its own.
        partnered: whether the image that it is mixed with has one; None where none is mixed.
        part, strong, turn: those of :class:`Batch`.
    """

    labelled: Bool[np.ndarray, " b"]
    partnered: Bool[np.ndarray, " b"] | None = None
    part: Int64[np.ndarray, " b"] | None = None
    strong: Bool[np.ndarray, " b"] | None = None
    turn: Int64[np.ndarray, " b"] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Images, those with a label of their own or their partner's, those without their own; of each part."""
        rows, images = self.labelled, len(self.labelled)
        either = rows if self.partnered is None else rows | self.partnered
        parts = () if self.part is None else np.bincount(self.part)
        return images, int(either.sum()), images - int(rows.sum()), *map(int, parts)

    def rows(self, part: int, strong: bool) -> Int64[np.ndarray, " k"]:
        """Places of the rows of a part that are strong views, or that are none."""
        kinds = np.zeros(len(self.labelled), np.bool_) if self.strong is None else self.strong
        return np.flatnonzero((self._parts() == part) & (kinds == strong))

    def piece(self, number: int, of: int) -> Int64[np.ndarray, " k"]:
        """See :meth:`Batch.piece`. Weak and strong views of an image are at the same place of their kinds."""
        kinds = 0 if self.strong is None else self.strong
        groups = 2 * self._parts() + kinds
        found = [np.flatnonzero(groups == group)[number::of] for group in np.unique(groups)]
        return np.sort(np.concatenate(found))

    def take(self, rows: Int64[np.ndarray, " k"]) -> "Known":
        """What is known of some of the rows."""
        others = (self.partnered, self.part, self.strong, self.turn)
        return Known(self.labelled[rows], *(None if own is None else own[rows] for own in others))

    def _parts(self) -> Int64[np.ndarray, " b"]:
        return np.zeros(len(self.labelled), np.int64) if self.part is None else self.part


def indexable(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Values of a type whose rows every device can pick: torch picks none of ``uint16``, the type of class numbers."""
    return values.to(torch.int32) if values.dtype == torch.uint16 else values


def _no_pixels() -> UInt8[Tensor, "0 0 0 3"]:
    return torch.empty((0, 0, 0, 3), dtype=torch.uint8)


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """The student's view of some images, their labels, and what teachers gave for it.

    Attributes:
        labels: class indices; -1 is unlabelled.
        index: position of each image in the data set (stable over epochs).
        targets: where an image may have several labels, 1 for each that it has, 0 for the others; the class is then
            a set of labels, and only says whether there is one.
        pixels: in the student's input size, before normalisation; none where only cached outputs are read.
        teacher: cached outputs.
        mixed: partners and shares, where the view mixes images; teachers saw the same mixtures.
        part: which of the batches that the step is made of each image belongs to, from 0; None where it
            is one batch. With several data sets, the number of its set.
        strong: whether a row is the strong view of an image, where images come in two views; strong views follow
            the others, in the same order.
        turn: number (from 0) of the pass over its set that each image is in, which decides its view; None
            where that is the epoch.
        counts: where this is one of several pieces of a step's images: over how many its means go.
        further: the same views in the input sizes of other students that share the batch.
        host: what is known of the rows without looking at the device, see :attr:`known`.
        whole: :attr:`Known.counts` of the step over all processes, where there are several.
    """

    labels: Int64[Tensor, " b"]
    index: Int64[Tensor, " b"]
    _: KW_ONLY
    targets: Float[Tensor, "b l"] | None = None
    pixels: UInt8[Tensor, "b h w 3"] = field(default_factory=_no_pixels)
    teacher: TeacherOutputs = field(default_factory=dict)
    mixed: Mixed | None = None
    part: Int64[Tensor, " b"] | None = None
    strong: Bool[Tensor, " b"] | None = None
    turn: Int64[Tensor, " b"] | None = None
    counts: Counts | None = None
    further: Mapping[Render, UInt8[Tensor, "b _ _ 3"]] = field(default_factory=dict)
    host: Known | None = None
    whole: tuple[int, ...] | None = None

    @property
    def known(self) -> Known:
        """What the host knows of the rows. A batch on a device has it from when it was on the host."""
        if self.host is not None:
            return self.host

        def read(values: Tensor | None) -> np.ndarray | None:
            # A copy: a tensor that goes to another process leaves its memory for a shared one, and is not the view's.
            return None if values is None else values.cpu().numpy().copy()

        partners = None if self.mixed is None else self.mixed.labels.cpu().numpy() >= 0
        own = self.labels.cpu().numpy() >= 0
        return Known(own, partners, read(self.part), read(self.strong), read(self.turn))

    def count(self, of: Literal["images", "labelled", "unlabelled"] | int) -> float | None:
        """What a loss divides its sum over these images, or those of a part, by; None: their number in this batch."""
        if self.counts is None:
            return None
        if isinstance(of, int):
            return self.counts.parts[of]
        return float(getattr(self.counts, of))

    def share(self, render: Render, reads: Mapping[str, Sequence[str]]) -> "Batch":
        """What one of several students takes of the batch, which is what it would be given alone.

        Args:
            render: its input size.
            reads: the arrays that it learns from: teacher -> names.
        """
        teacher = {name: {key: self.teacher[name][key] for key in keys} for name, keys in reads.items()}
        return replace(self, pixels=self.further.get(render, self.pixels), teacher=teacher, further={})

    def pin_memory(self) -> "Batch":
        """In pinned memory; called by the loader."""
        return self._each(Tensor.pin_memory, self.known)

    def to(self, device: torch.device) -> "Batch":
        """On ``device``, without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), self.known)

    def piece(self, number: int, of: int) -> "Batch":
        """Every ``of``-th image, from ``number`` on: of each part of the step, and of each kind of view."""
        if of == 1:
            return self
        known = self.known
        rows = known.piece(number, of)
        places = torch.from_numpy(rows).to(self.labels.device, non_blocking=True)
        return self._each(lambda tensor: tensor.index_select(0, places.to(tensor.device)), known.take(rows))

    def _each(self, change: Callable[[Tensor], Tensor], host: Known) -> "Batch":
        def maybe(values: Tensor | None) -> Tensor | None:
            return None if values is None else change(values)

        mixed = self.mixed
        return Batch(
            labels=change(self.labels),
            index=change(self.index),
            targets=maybe(self.targets),
            pixels=change(self.pixels),
            teacher={
                name: {key: change(value) for key, value in arrays.items()}
                for name, arrays in self.teacher.items()
            },
            mixed=mixed and Mixed(change(mixed.labels), change(mixed.own), maybe(mixed.targets)),
            part=maybe(self.part),
            strong=maybe(self.strong),
            turn=maybe(self.turn),
            counts=self.counts,
            further={render: change(pixels) for render, pixels in self.further.items()},
            host=host,
            whole=self.whole,
        )
