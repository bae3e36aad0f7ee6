"""Counting, by place in kd's code, where a program waits for its device. Part of benchmarks/gpu.py.

On a GPU torch itself tells (torch.cuda.set_sync_debug_mode); it does not see waits for events, which are those that
are meant. Everywhere the calling thread is looked at: what it cannot go on without a value, or a shape, from the
device for. That is the same on a CPU, where nothing waits, so a change can be judged without a GPU; there values that
lie on the host of a GPU run, too, are counted as well.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdcli

READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "_unique2",
    "unique_dim",
)
"""Operations whose result, or its shape, the host needs before it goes on."""
COPIES = ("tolist", "cpu")
"""Methods of tensors that give all of their values to the host."""
CONSTANT = "lift_fresh"
"""A tensor made of Python's numbers: made on a GPU, it waits for its copy."""
OPTIMISER = "the optimiser"
_TREE = Path(kdcli.__file__).parent
_OPTIMISERS = Path(torch.optim.__file__).parent


@dataclass
class Waits:
    """How often what waited: torch's own count on a GPU, host reads and constants everywhere.

    Attributes:
        places: by ``kind file:line``.
    """

    places: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Waits that torch told of; where it tells of none, host reads."""
        told = [count for place, count in self.places.items() if place.startswith("sync ")]
        read = [
            count
            for place, count in self.places.items()
            if place.startswith("read ") and OPTIMISER not in place
        ]
        return sum(told or read)

    def __sub__(self, other: "Waits") -> "Waits":
        places = self.places.keys() | other.places.keys()
        more = {place: self.places.get(place, 0) - other.places.get(place, 0) for place in sorted(places)}
        return Waits({place: count for place, count in more.items() if count})

    def each(self, of: int) -> "Waits":
        """The mean of so many."""
        return Waits({place: round(count / of, 3) for place, count in self.places.items()})

    @classmethod
    @contextmanager
    def counted(cls, cuda: bool) -> Iterator["Waits"]:
        """Count what waits within the block; the value is complete at its end."""
        waits, found = cls(), Counter[str]()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with _sync_debug_mode(cuda), HostReads(found), HostCopies(found):
                yield waits
        syncs = Counter(
            f"sync {_short(Path(each.filename))}:{each.lineno}"
            for each in told
            if "synchronizing CUDA operation" in str(each.message)
        )
        waits.places.update({**found, **syncs})


@contextmanager
def _sync_debug_mode(cuda: bool) -> Iterator[None]:
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


class HostReads(TorchDispatchMode):
    """Sees every operation of this thread; counts those that bring a value to the host, by place."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list) else []
        by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
        if name in READS or by_mask:
            self._found[f"read {_caller()} {name}"] += 1
        elif name == CONSTANT:
            self._found[f"constant {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Sees what is asked of tensors in Python: lists and copies on the host are no operations of torch's."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES:
            self._found[f"read {_caller()} {name}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line of kd's that is being run; ``the optimiser``, whose counts of steps lie on the host."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_OPTIMISERS):
            return OPTIMISER
        if path.is_relative_to(_TREE):
            return f"{_short(path)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _short(path: Path) -> str:
    return (
        str(path.relative_to(_TREE.parent))
        if path.is_relative_to(_TREE.parent)
        else "/".join(path.parts[-2:])
    )
