"""A batch, from the loader to the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int64, UInt8
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
    """

    labels: Int64[Tensor, " b"]
    own: Float[Tensor, " b"]


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


def _no_pixels() -> UInt8[Tensor, "0 0 0 3"]:
    return torch.empty((0, 0, 0, 3), dtype=torch.uint8)


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """The student's view of some images, their labels, and what teachers gave for it.

    Attributes:
        labels: class indices; -1 is unlabelled.
        index: position of each image in the data set (stable over epochs).
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
    """

    labels: Int64[Tensor, " b"]
    index: Int64[Tensor, " b"]
    _: KW_ONLY
    pixels: UInt8[Tensor, "b h w 3"] = field(default_factory=_no_pixels)
    teacher: TeacherOutputs = field(default_factory=dict)
    mixed: Mixed | None = None
    part: Int64[Tensor, " b"] | None = None
    strong: Bool[Tensor, " b"] | None = None
    turn: Int64[Tensor, " b"] | None = None
    counts: Counts | None = None
    further: Mapping[Render, UInt8[Tensor, "b _ _ 3"]] = field(default_factory=dict)

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
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """On ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def piece(self, number: int, of: int) -> "Batch":
        """Every ``of``-th image, from ``number`` on: of each part of the step, and of each kind of view."""
        if of == 1:
            return self
        groups = torch.zeros_like(self.labels)
        if self.part is not None:
            groups += 2 * self.part
        if self.strong is not None:
            groups += self.strong
        # In ascending order, so that weak and strong views of an image are at the same place of their kinds.
        found = [(groups == group).nonzero().squeeze(1)[number::of] for group in sorted(set(groups.tolist()))]
        rows = torch.cat(found).sort().values
        return self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        part, strong, turn = (
            None if each is None else change(each) for each in (self.part, self.strong, self.turn)
        )
        return Batch(
            labels=change(self.labels),
            index=change(self.index),
            pixels=change(self.pixels),
            teacher={
                name: {key: change(value) for key, value in arrays.items()}
                for name, arrays in self.teacher.items()
            },
            mixed=self.mixed and Mixed(change(self.mixed.labels), change(self.mixed.own)),
            part=part,
            strong=strong,
            turn=turn,
            counts=self.counts,
            further={render: change(pixels) for render, pixels in self.further.items()},
        )
