"""Between the host and the device, without waiting; and the random numbers of both.

All of it runs on the CPU as well, where torch's streams and events do nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import final

import torch
from jaxtyping import Shaped
from torch import Tensor

from kdcli.devices import device_errors


@final
class Fetched:
    """Values on their way to the host, begun as soon as the device has them; whatever is launched later goes on.

    Args:
        values: on any device.
    """

    def __init__(self, values: Shaped[Tensor, "..."]) -> None:
        module = torch.get_device_module(values.device)
        self._values = values.detach().to("cpu", non_blocking=True)  # torch takes pinned memory for it
        self._there = module.Event()
        self._there.record(module.current_stream(values.device))

    def read(self) -> Shaped[Tensor, "..."]:
        """The values on the host, waited for."""
        self._there.synchronize()
        return self._values


@final
class OwnRandom:
    """Torch's random numbers as one student sees them, whoever else draws from them in between.

    Args:
        device: where the student trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._state = self._read()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the block torch draws this student's numbers; after it, those of before."""
        outside = self._read()
        self._write(self._state)
        try:
            yield
        finally:
            self._state = self._read()
            self._write(outside)

    def _read(self) -> tuple[Tensor, Tensor | None]:
        own = None if self._module is None else self._module.get_rng_state(self._device)
        return torch.get_rng_state(), own

    def _write(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if self._module is not None:
            self._module.set_rng_state(state[1], self._device)


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Within the block random numbers of the CPU and of ``device`` are drawn that are drawn again after it."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    return torch.random.fork_rng(devices, device_type=kind)


def memory_errors(batch_size: int, pieces: int = 1) -> AbstractContextManager[None]:
    """Within the block running out of memory in a step of so many images is told with what to do about it."""
    return device_errors(
        f"{batch_size} images a step",
        f"--batch-size {max(1, batch_size // 2)}, or the same step in more pieces: --accumulate {2 * pieces}",
    )
