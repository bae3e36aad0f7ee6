"""Rows of all processes of a run, for losses that compare images with each other.

A loss of single images needs none of this: its mean over the processes is the mean over the images. Where a process
group exists, every process calls these functions at the same place of a step, as it does for gradients.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, distributed
from torch.autograd import Function


def processes() -> int:
    """How many share each step; 1 outside a process group."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 1


def gather_rows(*values: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, without a gradient; outside a process group, the values as they are.

    In turn: the first row of every process, then the second of every process, and so on. That is how a step's images
    are dealt out, so it is their order in one process. The numbers of rows may differ.

    Args:
        values: each [b, ...] of this process.
    """
    if processes() == 1:
        return values
    rows = _Rows.of(len(values[0]), values[0].device)
    return tuple(rows.gather(each) for each in values)


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
@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of all processes are among those that are gathered, padded to equal numbers.

    The numbers are exchanged by the processes' hosts, which know them: no device is waited for.

    Attributes:
        most: rows of the process that has most.
        places: of every row, in turn, in [process, row].
        own: which of them are this process's.
    """

    most: int
    places: Int64[Tensor, " n"]
    own: Int64[Tensor, " b"]

    @staticmethod
    def of(count: int, device: torch.device) -> "_Rows":
        sizes = torch.zeros(processes(), dtype=torch.int64)
        sizes[distributed.get_rank()] = count
        distributed.all_reduce(sizes)
        most = int(sizes.max())
        number = np.arange(most)[:, None]
        places = (number + most * np.arange(len(sizes)))[number < sizes.numpy()]
        own = np.flatnonzero(places // most == distributed.get_rank())
        on_device = (torch.from_numpy(each).to(device, non_blocking=True) for each in (places, own))
        return _Rows(most, *on_device)

    def gather(self, values: Tensor) -> Tensor:
        padded = values.new_zeros((self.most, *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(processes())]
        distributed.all_gather(parts, padded)
        return torch.cat(parts).index_select(0, self.places)


@final
class _GatherFeatures(Function):
    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        rows = _Rows.of(len(features), features.device)
        context.own = rows.own
        return rows.gather(features)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        own: Tensor = gradients[0].index_select(0, context.own)
        return own * processes()
