"""Between host and device: pixels go up and outputs come down beside the forwards, on streams of their own.

The same lines run on a CPU, whose streams and events do nothing, and where nothing is copied.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, final

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Moved(Protocol):
    """What holds tensors that go from one place to another."""

    def mapped(self, change: "Callable[[Tensor], Tensor]") -> Self:
        """With every tensor changed."""


Some = TypeVar("Some", bound=Moved)


@final
class Lanes:
    """The three streams of a device: up, the forwards', down.

    Memory belongs to the stream on which it was made: whoever uses what another one makes keeps it until the event
    of :meth:`down` has come, when all three are done with it.

    Args:
        device: cpu, cuda or cuda:N.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._module = module = torch.get_device_module(self.device)
        # A CUDA event that is not told to block spins on a processor while it is waited for.
        self._event = module.Event if self.device.type == "cpu" else partial(module.Event, blocking=True)
        self._up, self._down = module.Stream(self.device), module.Stream(self.device)

    def up(self, values: "Tensor", whole: "Tensor | None" = None) -> "Tensor":
        """Bring values from pinned memory to the device, behind what is on the way already.

        Args:
            values: on the host.
            whole: a part of what :meth:`room` made, to put them there.
        """
        with self._module.stream(self._up):
            if whole is None:
                return values.to(self.device, non_blocking=True)
            return whole.copy_(values, non_blocking=True)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Tensor":
        """Memory of the device that :meth:`up` can fill piece by piece."""
        with self._module.stream(self._up):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def arrive(self) -> None:
        """Let the forwards that are launched from now on see what is on the way up."""
        self._module.current_stream(self.device).wait_stream(self._up)

    def down(self, made: Iterable[Some]) -> tuple[list[Some], Any]:
        """Copies on the host, in pinned memory, of what is being made; and the event after which they are there."""
        self._down.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._down):
            copies = [each.mapped(lambda tensor: tensor.to("cpu", non_blocking=True)) for each in made]
        event = self._event()
        event.record(self._down)
        return copies, event
