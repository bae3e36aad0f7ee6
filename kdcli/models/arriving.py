"""What a device computed, brought to the host while it computes on."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Key = TypeVar("Key")
Copies = tuple[Key, dict[str, Tensor], Any]

BEHIND = 2
"""Batches that are computed and copied while an earlier one is used."""


def arriving(
    computed: Iterable[tuple[Key, Mapping[str, Tensor]]], device: str | torch.device
) -> Iterator[tuple[Key, dict[str, np.ndarray]]]:
    """Tensors of a device as arrays, in their order and a little behind, so that the device never waits for the host.

    Each batch is copied into pinned memory behind its own computation; only its own event is waited for, when
    ``BEHIND`` later batches are on their way. On a CPU nothing is copied.

    Args:
        computed: a key and tensors at a time; taking the next one launches its computation.
        device: where the tensors are.
    """
    module = torch.get_device_module(torch.device(device))
    waiting: deque[Copies[Key]] = deque()
    for key, tensors in computed:
        copies = {name: _on_its_way(tensor) for name, tensor in tensors.items()}
        event = module.Event()
        event.record()
        waiting.append((key, copies, event))
        if len(waiting) > BEHIND:
            yield _arrived(waiting.popleft())
    while waiting:
        yield _arrived(waiting.popleft())


def _on_its_way(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _arrived(copies: Copies[Key]) -> tuple[Key, dict[str, np.ndarray]]:
    key, tensors, event = copies
    event.synchronize()
    return key, {name: tensor.numpy() for name, tensor in tensors.items()}
