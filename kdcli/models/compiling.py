"""torch.compile where it works, and a word where it does not."""

from collections.abc import Callable
from typing import TypeVar

import torch

from kdcli.errors import DeviceError

Result = TypeVar("Result")

_SHAPES = 64
"""Shapes of input that one forward may be compiled for: full batches, ends of blocks, folded views."""


def require_compiler(device: torch.device | str) -> None:
    """Refuse what torch.compile cannot do here, before a network is compiled.

    Raises:
        DeviceError: with what torch says.
    """
    try:
        torch.compile(lambda tensor: tensor * 2 + 1)(torch.ones(8, device=device))
    # Whatever goes wrong in there (no C++ compiler, no Triton, a Python that is too new) says the same.
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DeviceError(
            f"torch.compile does not work here on {torch.device(device).type}: {first}",
            "Leave --compile out, or install what it names (on CPU: a C++ compiler such as g++). What was begun "
            "with it goes on with it.",
        ) from error


def compiled_forward(forward: Callable[..., Result], device: str) -> Callable[..., Result]:
    """A forward that is compiled for each shape of its input by itself.

    A forward compiled for any shape gives other bits than one for a single shape, and which of them torch takes
    depends on what it has seen before: a resumed run would not give the bits of an uninterrupted one.

    Raises:
        DeviceError: torch.compile does not work on the device.
    """
    import torch._dynamo

    require_compiler(device)
    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(forward, dynamic=False)
