"""Rows of all processes of a run, for losses that compare images with each other.

A loss of single images needs none of this: its mean over the processes is the mean over the images. Where a process
group exists, every process calls these functions at the same place of a step, as it does for gradients.
"""

from typing import Any, final

import torch
from torch import Tensor, distributed
from torch.autograd import Function


def processes() -> int:
    """How many share each step; 1 outside a process group."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 1


def gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes, without a gradient; outside a process group, the values as they are.

    In turn: the first row of every process, then the second of every process, and so on. That is how a step's images
    are dealt out, so it is their order in one process. The numbers of rows may differ.

    Args:
        values: [b, ...] of this process.
    """
    return values if processes() == 1 else _gathered(values)[0]


def gather_features(features: Tensor) -> Tensor:
    """:func:`gather_rows` with a gradient, for a loss that every process computes of all rows alike.

    Gradients of such equal losses are equal, so what a row of this process gets is the number of processes times
    what it gets here: the sum over all of them, of which the mean that data-parallel training takes afterwards is
    the gradient of the one loss.

    Args:
        features: [b, d] of this process.
    """
    return features if processes() == 1 else _GatherFeatures.apply(features)


@final
class _GatherFeatures(Function):
    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        gathered, context.own = _gathered(features)
        return gathered

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        own: Tensor = gradients[0][context.own]
        return own * processes()


def _gathered(values: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes, and which of them are this one's."""
    world = processes()
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    distributed.all_gather(counts, count)
    sizes = torch.cat(counts)
    padded = values.new_zeros((int(sizes.max()), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    there = torch.arange(len(padded), device=values.device)[:, None] < sizes
    ranks = torch.arange(world, device=values.device).expand_as(there)[there]
    own = (ranks == distributed.get_rank()).nonzero().squeeze(1)
    return torch.stack(parts, dim=1)[there], own
