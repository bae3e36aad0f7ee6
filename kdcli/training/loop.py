"""The engine: one step for every objective. Devices and precision are accelerate's, optimisers timm's."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not declare it
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import Optimizer

from kdcli.errors import DeviceError, DivergedError
from kdcli.models.student import Student
from kdcli.models.teacher import normalise
from kdcli.objectives.base import Batch, Objective, Settings
from kdcli.training.feed import FeedBatch
from kdcli.training.state import Stateful
from kdcli.training.student import Built
from kdcli.types import AmpName

_PRECISION = {"off": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: str, amp: AmpName) -> Accelerator:
    """Let accelerate look at the machine, for one run.

    Its state is global and refuses a second run at another precision; outside a process group it is
    forgotten first, so that one process can train several students.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device == "cpu", mixed_precision=_PRECISION[amp], step_scheduler_with_optimizer=False
    )


def make_optimizer(student: Student, objective: Objective, settings: Settings) -> Optimizer:
    """One of timm's optimisers: the backbone and the heads learn at their own rates."""
    groups = student.parameter_groups(
        settings.lr * settings.backbone_lr_scale, settings.lr, settings.weight_decay
    )
    own = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if own:
        groups.append({"params": own, "lr": settings.lr, "weight_decay": settings.weight_decay})
    if settings.decay_all:
        groups = [{**group, "weight_decay": settings.weight_decay} for group in groups]
    optimizer: Optimizer = create_optimizer_v2(
        groups,
        opt=settings.optimizer,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    return optimizer


def make_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> Scheduler:
    """One of timm's schedules, to be asked with :func:`schedule_time` before every step.

    Args:
        optimizer: whose groups hold the peak rates.
        settings: schedule, milestones and warm-up as shares of the training.
        steps: of the whole training.
    """
    warmup = round(settings.warmup * steps)
    if settings.schedule == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps + 1 - warmup),
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    shares = settings.milestones if settings.schedule == "step" else ()
    # timm applies milestone m at time m - 1, and step k runs at time k + 1.
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[round(share * steps) + 2 for share in shares],
        decay_rate=0.1,
        warmup_t=warmup,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def schedule_time(step: int) -> int:
    """Time of step ``step`` (from 0) in the schedule. At time 0 a warm-up's rate is 0; no step runs then."""
    return step + 1


@final
class Engine:
    """A student, what it learns from, and one step of it.

    Args:
        built: student and objective.
        settings: the resolved numbers.
        steps: of the whole training.
        accelerator: where it runs.
        on_batch: called with every batch before its step.
    """

    def __init__(
        self,
        built: Built,
        settings: Settings,
        steps: int,
        accelerator: Accelerator,
        on_batch: Callable[[FeedBatch], None] | None = None,
    ) -> None:
        self._on_batch = on_batch
        self.accelerator = accelerator
        self.student, self.objective = built.student, built.objective
        self._preprocess = built.model.preprocess
        self.student.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.student, self.objective, settings)
        self._schedule = make_schedule(optimizer, settings, steps)
        self._objective = self.objective.to(accelerator.device)
        self._student: Any
        self._student, self._optimizer = accelerator.prepare(self.student, optimizer)
        self._heads = self.objective.active()
        self._plain_optimizer = optimizer
        self.student.train()

    @property
    def lr(self) -> float:
        """Learning rate of the heads in the last step."""
        return float(max(group["lr"] for group in self._plain_optimizer.param_groups))

    def stateful(self) -> Stateful:
        """What a checkpoint captures."""
        modules = {"student": self.student, "objective": self.objective}
        return Stateful(modules, self._plain_optimizer, self.accelerator.scaler)

    def step(self, batch: FeedBatch, number: int) -> dict[str, float]:
        """One update.

        Args:
            batch: as the feed made it.
            number: steps done before.

        Returns:
            The loss and its parts.

        Raises:
            DivergedError: one of them is not finite; nothing was updated.
            DeviceError: out of memory.
        """
        self._schedule.step_update(schedule_time(number))
        if self._on_batch is not None:
            self._on_batch(batch)
        with memory_errors(len(batch.labels)):
            batch = batch.to(self.accelerator.device)
            output = self._student(normalise(batch.pixels, self._preprocess), self._heads)
            parts = self._objective(output, batch.teacher, Batch(batch.labels, batch.index, batch.mixed))
            values = self._values(parts)
            self._require_finite(values, number)
            self._optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(parts["loss"])
            self._optimizer.step()
        return values

    def _values(self, parts: dict[str, Tensor]) -> dict[str, float]:
        together = torch.stack([part.detach().float() for part in parts.values()])  # one wait for the device
        if self.accelerator.num_processes > 1:
            together = self.accelerator.reduce(together, "mean")
        return dict(zip(parts, together.tolist(), strict=True))

    def _require_finite(self, values: dict[str, float], number: int) -> None:
        # A part is named rather than their sum, which comes first.
        wrong = [name for name, value in reversed(values.items()) if not math.isfinite(value)]
        if wrong:
            name, lr = wrong[0], self.lr
            raise DivergedError(
                f"the loss part '{name}' is {values[name]} at step {number + 1} (learning rate {lr:g})",
                f"The last checkpoint is kept. Start anew with a smaller rate: --lr {lr / 10:g} --overwrite",
            )


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Turn running out of memory in a step of so many images into a :class:`DeviceError`."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DeviceError(
            f"out of memory with {batch_size} images a step: {str(error).splitlines()[0]}",
            f"--batch-size {max(1, batch_size // 2)}",
        ) from error
