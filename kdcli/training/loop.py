"""The engine: one loop for every objective. Devices and precision are accelerate's, optimisers timm's."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

from kdcli.console import console
from kdcli.errors import DeviceError, DivergedError, KdError, StoppedEarly
from kdcli.models.student import Student
from kdcli.models.teacher import normalise
from kdcli.objectives.base import Batch, Objective, Settings
from kdcli.runtime import StopFlag
from kdcli.training.feed import FeedBatch, Order, ViewRule
from kdcli.training.state import (
    Progress,
    Stateful,
    append_metrics,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_metrics,
)
from kdcli.training.student import Built
from kdcli.types import AmpName

CHECKPOINT_SECONDS = 10.0
"""An epoch's end is saved unless the last checkpoint is younger: epochs of a second cost more to save than to run."""
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
        with _memory_errors(len(batch.labels)):
            batch = batch.to(self.accelerator.device)
            output = self._student(normalise(batch.pixels, self._preprocess), self._heads)
            known = Batch(batch.labels, batch.index, batch.mixed, batch.part, batch.strong)
            parts = self._objective(output, batch.teacher, known)
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


def fit(
    engine: Engine,
    loader: Iterable[FeedBatch | KdError],
    order: Order,
    rule: ViewRule,
    epochs: int,
    folder: Path,
    stop: StopFlag,
) -> Progress:
    """Train to the end, from the last checkpoint in ``folder`` if there is one.

    Args:
        engine: student and objective.
        loader: batches, in the order of ``order``.
        order: which batches an epoch has.
        rule: which view an epoch shows, to record it.
        epochs: of the whole training.
        folder: OUT.
        stop: raised by a signal.

    Raises:
        StoppedEarly: a signal arrived; everything is saved.
        DivergedError, DeviceError: see :meth:`Engine.step`.
        KdError: a batch could not be made.
    """
    checkpoints, metrics, stateful = folder / "state", folder / "metrics.jsonl", engine.stateful()
    progress = Progress()
    if (place := latest_checkpoint(checkpoints)) is not None:
        progress = load_checkpoint(place, stateful)
        console.note(f"going on from step {progress.steps} (epoch {progress.epoch + 1} of {epochs})")
    main = engine.accelerator.is_main_process
    if main:
        write_metrics(metrics, progress.history)
    total = order.batches * (epochs - progress.epoch) - progress.step
    saved = time.monotonic()
    with console.progress(total, "steps", "training") as bar:
        while progress.epoch < epochs:
            order.seek(progress.epoch, progress.step)
            for values in _steps(engine, iter(loader), progress):
                bar.advance(1, loss=f"{values['loss']:.4f}", epoch=f"{progress.epoch + 1}/{epochs}")
                if stop and progress.step < order.batches:
                    _stop(checkpoints, stateful, progress, main, stop)
            document = progress.close_epoch({"lr": engine.lr, "view": rule.student(progress.epoch)})
            if main:
                append_metrics(metrics, document)
            if main and not stop and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                save_checkpoint(checkpoints, stateful, progress)
                saved = time.monotonic()
            console.detail(
                f"epoch {progress.epoch}/{epochs}: loss {document['loss']:.4f}, lr {document['lr']:g}"
            )
            if stop:
                _stop(checkpoints, stateful, progress, main, stop)
    return progress


def _steps(
    engine: Engine, batches: Iterator[FeedBatch | KdError], progress: Progress
) -> Iterator[dict[str, float]]:
    """The remaining steps of an epoch. Their time includes the wait for the batch."""
    started = time.perf_counter()
    for batch in batches:
        if isinstance(batch, KdError):
            raise batch
        values = engine.step(batch, progress.steps)
        now = time.perf_counter()
        progress.add(values, len(batch.labels), now - started)
        yield values
        started = time.perf_counter()


def _stop(checkpoints: Path, stateful: Stateful, progress: Progress, main: bool, stop: StopFlag) -> None:
    if main:
        save_checkpoint(checkpoints, stateful, progress)
    console.detail(f"saved {stop.seconds():.1f} s after the signal")
    raise StoppedEarly(
        f"stopped by a signal after step {progress.steps} (epoch {progress.epoch + 1}); everything is saved",
        "Run the same command again to go on.",
    )


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DeviceError(
            f"out of memory with {batch_size} images a step: {str(error).splitlines()[0]}",
            f"--batch-size {max(1, batch_size // 2)}",
        ) from error
