"""The processes of one run (torchrun, accelerate launch): what they tell each other besides gradients."""

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor, distributed

from kdcli.console import console
from kdcli.devices import Visible, choose, require_own_card, visible
from kdcli.errors import DeviceError, KdError, StoppedEarly, UsageError
from kdcli.methods.batch import Batch
from kdcli.runtime import StopFlag

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=2)
"""A process that died is noticed at once; this bounds the wait for one that is slow, e.g. on a cold file system."""
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@final
@dataclass(slots=True)
class _Rider:
    """What travels with another message, see :meth:`Ranks.along`."""

    values: Callable[[], Sequence[float]]
    totals: list[float] | None = None


@final
class Ranks:
    """One process among those of its run. Every method but the constructor is called by all of them.

    Args:
        rank: number of this process, from 0.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._riders: list[_Rider] = []

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum of each value over the processes. What was given to :meth:`along` is in the same message."""
        if self.world == 1:
            return list(values)
        riders, self._riders = self._riders, []
        parts = [values, *(rider.values() for rider in riders)]
        together = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
        distributed.all_reduce(together)
        totals, *others = (part.tolist() for part in torch.split(together, [len(part) for part in parts]))
        for rider, found in zip(riders, others, strict=True):
            rider.totals = found
        found_here: list[float] = totals
        return found_here

    def along(self, values: Callable[[], Sequence[float]]) -> "Callable[[], list[float]]":
        """Let values travel with the next message of :meth:`total`, of which there is one in each step.

        Args:
            values: asked for when that is sent.

        Returns:
            What gives their sums over the processes; it sends a message of its own if there was none since.
        """
        rider = _Rider(values)
        self._riders.append(rider)

        def arrived() -> list[float]:
            if rider.totals is None:
                self.total()
            assert rider.totals is not None
            return rider.totals

        return arrived

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order."""
        if self.world == 1:
            return [value]
        found: list[Value] = [value] * self.world
        distributed.all_gather_object(found, value)
        return found

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, all in one message."""
        if self.world > 1 and tensors:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(together)
            together /= self.world
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split(together, sizes), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def copy_first_(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's."""
        if self.world > 1:
            distributed.broadcast(tensor, 0)

    def agree(self, own: KdError | None) -> None:
        """Raise the same error everywhere if any process has one: nobody waits for one that is gone.

        Args:
            own: what went wrong here, if anything did.

        Raises:
            KdError: the error of the lowest rank that has one.
        """
        found = self.gather(None if own is None else (type(own).__name__, own.message, own.hint))
        first = next((index for index, error in enumerate(found) if error is not None), None)
        if first is None:
            return
        error = own
        if own is None or first != self.rank:
            name, message, hint = found[first] or ("", "", "")
            error = next(kind for kind in KdError.__subclasses__() if kind.__name__ == name)(message, hint)
        assert error is not None
        error.told = not self.first
        raise error

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """What a process raises in this block, all raise at its end. Nothing in it may need the others."""
        if self.world == 1:
            yield
            return
        own: KdError | None = None
        try:
            yield
        except KdError as error:
            own = error
        self.agree(own)

    @contextmanager
    def company(self) -> Iterator[None]:
        """Say it plainly when another process ended in the middle of a step.

        Raises:
            DeviceError: one did.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, distributed.DistError) or "gloo/transport" in str(error)
            if isinstance(error, KdError) or self.world == 1 or not lost:
                raise
            raise DeviceError(
                f"another of the {self.world} processes of this run ended: {str(error).splitlines()[0]}",
                "Its own message says why; the same command goes on from the last checkpoint.",
            ) from error


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun or accelerate launch started, for the time of the block.

    Args:
        device: what ``--device`` says. Unless it is cpu, each process takes a card of its own where there are cards.

    Raises:
        UsageError: WORLD_SIZE says that there are others, but nothing says how to reach them.
        DeviceError: fewer cards than processes on this machine.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise UsageError(f"WORLD_SIZE is '{text}', not a number of processes", "Unset it, or use torchrun.")
    world = int(text)
    if world <= 1:
        _tell_alone()
        yield Ranks()
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            "Start several processes by torchrun or accelerate launch, or unset WORLD_SIZE; to train several "
            "students side by side, see examples/students.sbatch.",
        )
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group(timeout=TIMEOUT, **how_to_talk(device, visible()))
        atexit.register(gc.collect)  # where an error's frames hold the group until the end
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if ours:
            # torch only forgets the group; a student that is a cycle still holds it. Its threads must be joined while
            # Python is whole: one that wants to free a tensor later ends the process by SIGABRT.
            distributed.destroy_process_group()
            gc.collect()


def how_to_talk(device: str, seen: Visible) -> dict[str, Any]:
    """Arguments of ``init_process_group``: gloo on processors; with cards both at once.

    What the processes tell each other is on the processor, and gradients are where they are. The card is this
    process's from here on.

    Raises:
        DeviceError: there are fewer cards than processes.
    """
    card = "cpu" if device == "cpu" else choose("auto", seen)
    if card == "cpu":
        return {"backend": "gloo"}
    require_own_card(seen)
    torch.cuda.set_device(card)  # before anything allocates: NCCL and accelerate take the current one
    return {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(card)}


def _tell_alone() -> None:
    """One run of several processes is never implied: srun starts independent students as well."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        console.note(
            f"srun started {tasks} tasks, and each trains by itself; examples/nodes.sbatch makes one run of all of them"
        )


@final
@dataclass(frozen=True, slots=True)
class Coming:
    """A batch of this process, or the error that kept it from being one, before its step.

    Attributes:
        own: that.
        arrived: gives what all processes say of theirs; see :class:`Together`.
    """

    own: Batch | KdError
    arrived: Callable[[], list[float]] = list


@final
class Together:
    """A loader whose errors and stop signals are those of all processes, at the same step.

    Of every batch the processes tell each other whether there was an error, whether a signal arrived, and how many
    images there are, how many with labels and of which part. That is in the message of the losses of the step before,
    so it costs none of its own but at the beginning of an epoch.

    Args:
        loader: of this process's part of each batch; all have the same number of batches.
        ranks: the processes.
        own: raised by a signal to this process.
        parts: how many :attr:`Batch.part` tells apart; 0 where it is None.
    """

    def __init__(
        self, loader: Iterable[Batch | KdError], ranks: Ranks, own: StopFlag, parts: int = 0
    ) -> None:
        self._loader, self._ranks, self._own, self._parts = loader, ranks, own, parts
        self.stop = own if ranks.world == 1 else StopFlag()
        """Raised by a signal to any process, once all know of it."""

    def __iter__(self) -> Iterator[Coming]:
        return map(self._coming, iter(self._loader))  # the loader's workers begin at once

    def _coming(self, own: Batch | KdError) -> Coming:
        if self._ranks.world == 1:
            return Coming(own)
        failed = isinstance(own, KdError)
        counts = np.zeros(3 + self._parts)
        if isinstance(own, Batch):
            known = own.known.counts
            counts[: len(known)] = known
        return Coming(own, self._ranks.along(lambda: (failed, bool(self._own), *counts.tolist())))

    def settle(self, coming: Coming) -> Batch:
        """The batch, once all processes know that each has its own.

        Raises:
            KdError: one has not.
        """
        own = coming.own
        if self._ranks.world > 1:
            errors, stops, *counts = coming.arrived()
            if stops:
                self.stop.set()
            if errors:
                self._ranks.agree(own if isinstance(own, KdError) else None)
            if isinstance(own, Batch):
                return replace(own, whole=tuple(map(int, counts)))
        if isinstance(own, KdError):
            raise own
        return own


def stopped_before_training() -> StoppedEarly:
    """What a signal before the first step gives: there is nothing to save."""
    return StoppedEarly(
        "stopped by a signal before the first step; what was saved earlier is kept",
        "Run the same command again to go on.",
    )
