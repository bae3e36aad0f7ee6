"""Batches on their way to the steps: each is on the device before the step that eats it begins."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from kdcli.methods.batch import Batch
from kdcli.training.distributed import Coming, Together
from kdcli.training.replay import ViewRule
from kdcli.training.samplers import Order
from kdcli.training.transfers import memory_errors


@final
@dataclass(frozen=True, slots=True)
class _Uploaded:
    """A batch on its way, and the event that it is there."""

    coming: Coming
    there: Any


@final
class Stream:
    """Batches that students share.

    The next batch is copied to the device while a step computes, and the workers begin an epoch when the last batch
    of the one before is on its way: they are at it while that is trained on, judged and saved.

    Args:
        together: the batches, in the order of ``order``.
        order: which batches an epoch has.
        rule: which view an epoch shows, to record it.
        epochs: of the whole training.
        device: where the students train.
    """

    def __init__(
        self, together: Together, order: Order, rule: ViewRule, epochs: int, device: torch.device
    ) -> None:
        self.order, self.rule, self.epochs, self.device = order, rule, epochs, device
        self._together, self._module = together, torch.get_device_module(device)
        self._copies = self._module.Stream(device)
        self._begun: tuple[int, int, Iterator[Coming]] | None = None

    def batches(self, epoch: int, step: int) -> Iterator[tuple[Batch, float]]:
        """The rest of an epoch, and how long each batch was waited for, in seconds.

        Raises:
            KdError: a batch could not be made.
        """
        started = time.perf_counter()
        items = self._begin(epoch, step)
        self._begun = None
        ahead = self._uploaded(items)
        while ahead is not None:
            now, ahead = ahead, self._uploaded(items)
            if ahead is None and epoch + 1 < self.epochs:
                self._begun = epoch + 1, 0, self._begin(epoch + 1, 0)
            batch = self._together.settle(now.coming)
            self._module.current_stream(self.device).wait_event(now.there)
            yield batch, time.perf_counter() - started
            started = time.perf_counter()

    def _begin(self, epoch: int, step: int) -> Iterator[Coming]:
        if self._begun is not None and self._begun[:2] == (epoch, step):
            return self._begun[2]
        self.order.seek(epoch, step)
        return iter(self._together)

    def _uploaded(self, items: Iterator[Coming]) -> _Uploaded | None:
        coming = next(items, None)
        if coming is None:
            return None
        there = self._module.Event()
        if isinstance(coming.own, Batch):
            # The copy comes after all that was launched: so the memory that it takes is read by no step any more.
            self._copies.wait_stream(self._module.current_stream(self.device))
            with self._module.stream(self._copies), memory_errors(len(coming.own.labels)):
                coming = replace(coming, own=coming.own.to(self.device))
                there.record(self._copies)
        return _Uploaded(coming, there)
