"""The engine: one step for every objective.

Devices, precision, processes and accumulation are accelerate's; optimisers and moving averages timm's.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from jaxtyping import Float
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not declare it
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcli.errors import DivergedError
from kdcli.methods.base import Average, Objective, Settings
from kdcli.methods.batch import Batch, Counts, TeacherOutputs
from kdcli.models.compiling import require_compiler
from kdcli.models.student import Student, StudentOutput
from kdcli.models.teacher import has_volumes, normalise, trains_channels_last
from kdcli.training.checkpoint import Stateful
from kdcli.training.distributed import Ranks
from kdcli.training.schedule import make_schedule
from kdcli.training.student import Built
from kdcli.training.transfers import Fetched, OwnRandom, forked_random, memory_errors
from kdcli.training.whole_step import WholeStep
from kdcli.types import AmpName

_PRECISION = {"off": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(
    device: str, amp: AmpName, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Let accelerate look at the machine, for one run.

    Args:
        device: where to train.
        amp: mixed precision.
        trackers: names of experiment trackers to log to.
        folder: where trackers that write files put them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # One process trains several students, maybe at several precisions, and accelerate's state is global:
        # it refuses a second Accelerator of another precision and has no public way to forget the first
        # (free_memory() and end_training() keep it; accelerate's own tests reset it as here). In a process
        # group there is one run a process, so nothing is to be forgotten.
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=_PRECISION[amp],
        step_scheduler_with_optimizer=False,
        log_with=list(trackers) or None,
        project_dir=folder,
        # Of buffers only BatchNorm's statistics change, which a training forward does not read, and the first
        # process's are what is kept (Engine.finish): sending them in every step would change nothing.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        ],
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


@final
class OneByOne(nn.Module):
    """A student that the batches of a step go through one after the other: BatchNorm averages over each alone.

    Args:
        student: without taps.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, images: Float[Tensor, "b 3 h w"], heads: Sequence[str], sizes: Sequence[int]
    ) -> StudentOutput:
        """The outputs of all, joined again; ``sizes`` are the batches' numbers of images, in their order."""
        outputs: list[StudentOutput] = [
            self.student(batch, heads) for batch in torch.split(images, list(sizes))
        ]
        logits = {head: torch.cat([output.logits[head] for output in outputs]) for head in heads}
        return StudentOutput(torch.cat([output.features for output in outputs]), logits)


@final
class Engine:
    """A student, what it learns from, and one step of it.

    Args:
        built: student and objective.
        settings: the resolved numbers.
        steps: of the whole training.
        accelerator: where it runs.
        on_batch: called with every batch before its step.
        compiled: whether the student's forward goes through torch.compile.

    Raises:
        DeviceError: torch.compile does not work here.
    """

    def __init__(
        self,
        built: Built,
        settings: Settings,
        steps: int,
        accelerator: Accelerator,
        on_batch: Callable[[Batch], None] | None = None,
        compiled: bool = False,
    ) -> None:
        self._on_batch, self._settings = on_batch, settings
        self.accelerator = accelerator
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        self.images = 0
        """Images of the last step, over all processes."""
        self.student, self.objective = built.student, built.objective
        self.preprocess, self._lower = built.model.preprocess, built.lower
        self._channels_last = trains_channels_last(self.student, accelerator.device)
        if self._channels_last:
            self.student.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.student, self.objective, settings)
        self._schedule = make_schedule(optimizer, settings, steps)
        self._objective = self.objective.to(accelerator.device)
        self._live = self.objective.live()
        for network in self._live.values():
            if not has_volumes(network):
                network.to(memory_format=torch.channels_last)
        self._heads, self._taps = self.objective.active(), self.objective.taps()
        if self.ranks.world > 1:
            for parameter in self._without_gradient():  # torch would wait for them in every step
                parameter.requires_grad_(False)
        # With frozen statistics an image's output does not depend on the others: one forward is as good, and faster.
        self._apart = self.objective.apart() and settings.bn == "train"
        self._together = self.objective.relational() and settings.accumulate > 1
        network = OneByOne(self.student) if self._apart else self.student
        self._student: Any
        with warnings.catch_warnings():  # accelerate knows the option by its old name only
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            self._student, self._optimizer = accelerator.prepare(network, optimizer)
        if compiled:
            require_compiler(accelerator.device)
            self._student = torch.compile(self._student)
        self._plain_optimizer = optimizer
        self._average = built.average or (Average(settings.ema, rising=True) if settings.ema else None)
        self._ema = self._average and ModelEmaV3(
            self.student, self._average.decay, use_warmup=self._average.rising
        )
        self.student.train()

    @property
    def lr(self) -> float:
        """Learning rate of the heads in the last step."""
        return float(max(group["lr"] for group in self._plain_optimizer.param_groups))

    def resume_after(self, steps: int) -> None:
        """Take the learning rate of the last of ``steps`` steps: an epoch that only has to be judged logs it."""
        if steps:
            self._schedule.step_update(steps)

    def _without_gradient(self) -> list[nn.Parameter]:
        """Parameters of the student that no loss reaches: heads that are not active, parts of some networks."""
        parameters = [each for each in self.student.parameters() if each.requires_grad]
        self.student.eval()
        with forked_random(torch.device("cpu")):  # where the student still is
            taps = () if self.objective.pooled() else self._taps
            output = self.student(torch.zeros(1, 3, *self.preprocess.size), self._heads, taps=taps)
            read = output.maps if taps else {**output.logits, "features": output.features}
            total = sum((each.sum() for each in read.values()), torch.zeros(()))
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return [each for each, gradient in zip(parameters, found, strict=True) if gradient is None]

    def stateful(self) -> Stateful:
        """What a checkpoint captures."""
        modules: dict[str, nn.Module] = {"student": self.student, "objective": self.objective}
        if self._ema:
            modules["ema"] = self._ema
        return Stateful(modules, self._plain_optimizer, self.accelerator.scaler, self.ranks)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block the student is what would be kept of it now, see :meth:`finish`."""
        if not self._ema and self.ranks.world == 1:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
        self.finish()
        try:
            yield
        finally:
            self.student.load_state_dict(own)

    def finish(self) -> None:
        """Make the student what is kept of it: the moving average where there is one, equal in all processes."""
        if self._ema:
            self.student.load_state_dict(self._ema.module.state_dict())
        for buffer in self.student.buffers():  # BatchNorm statistics are each process's own
            self.ranks.copy_first_(buffer)

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """One update.

        Args:
            batch: as the feed made it, on the device.
            number: steps done before.

        Returns:
            The loss and its parts.

        Raises:
            DivergedError: one of them is not finite; nothing was updated.
            DeviceError: out of memory.
        """
        self._schedule.step_update(number + 1)
        if self._on_batch is not None:
            self._on_batch(batch)
        pieces, counts = self._settings.accumulate, self._counts(batch)
        with memory_errors(self.images, pieces):
            self._plain_optimizer.zero_grad(set_to_none=True)
            # Set anew in each step: the accelerator may be shared, and a step may have ended in an error.
            self.accelerator.gradient_accumulation_steps, self.accelerator.step = pieces, 0
            told = self._gradients(batch, counts)
            if self._settings.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self._parameters(), self._settings.clip_norm)
            found = self._values(told, number)
            self._optimizer.step()
        if self._average and self._ema and (number + 1) % self._average.every == 0:
            self._ema.update(self.student, step=number + 1 if self._average.rising else None)
        return {name: sum(values[name] for values in found) / len(found) for name in found[0]}

    def _gradients(self, batch: Batch, counts: Counts | None) -> "tuple[tuple[str, ...], Fetched]":
        """Launch forward and backward of every piece; names of the loss's parts, and the parts of all losses."""
        told = (self._of_whole if self._together else self._of_pieces)(batch, counts)
        grads = [each.grad for each in self.objective.parameters() if each.grad is not None]
        self.ranks.mean_(grads)  # the student's are averaged by its wrapper
        return told

    def _of_pieces(self, batch: Batch, counts: Counts | None) -> "tuple[tuple[str, ...], Fetched]":
        """A loss a piece: their mean is that of the step."""
        pieces, losses = self._settings.accumulate, list[Tensor]()
        for index in range(pieces):
            piece = replace(batch.piece(index, pieces), counts=counts)
            with self.accelerator.accumulate(self._student):
                output, teachers = self._forward(piece)
                parts = self._objective(output, teachers, piece)
                losses.append(torch.stack([part.detach().float() for part in parts.values()]))
                if index == pieces - 1:
                    told = Fetched(torch.stack(losses))  # before backward: it is there when that is launched
                self.accelerator.backward(parts["loss"])
        return tuple(parts), told

    def _of_whole(self, batch: Batch, counts: Counts | None) -> "tuple[tuple[str, ...], Fetched]":
        """One loss of all pieces' rows, see :mod:`~kdcli.training.whole_step`."""
        replayed, buffers = (
            OwnRandom(self.accelerator.device),
            [each.clone() for each in self.student.buffers()],
        )
        whole = WholeStep(batch, self._settings.accumulate)
        # With a graph, which is dropped: other kernels, or another compiled graph, might draw other random numbers.
        with self.accelerator.no_sync(self._student):
            for piece in whole.pieces:
                output, teachers = self._forward(piece)
                whole.add(output, {name: teachers[name] for name in self._live})
        with torch.no_grad():  # the second forward is the one that BatchNorm learns from
            for buffer, before in zip(self.student.buffers(), buffers, strict=True):
                buffer.copy_(before)
        parts = self._objective(
            whole.output(), {**batch.teacher, **whole.live()}, replace(batch, counts=counts)
        )
        told = Fetched(torch.stack([part.detach().float() for part in parts.values()])[None])
        self.accelerator.gradient_accumulation_steps = 1  # what the accelerator would divide this loss by
        self.accelerator.backward(parts["loss"])
        self.accelerator.gradient_accumulation_steps = len(whole.pieces)
        with replayed():
            for index, piece in enumerate(whole.pieces):
                with self.accelerator.accumulate(self._student):
                    whole.backward(index, self._forward(piece)[0])
        return tuple(parts), told

    def _values(self, told: "tuple[tuple[str, ...], Fetched]", number: int) -> list[dict[str, float]]:
        """The loss and its parts of every piece, the mean of all processes. The one wait of a step.

        Raises:
            DivergedError: one is not finite.
        """
        names, fetched = told
        read = fetched.read()
        means = self.ranks.total(*read.flatten().tolist())
        rows = [means[start : start + len(names)] for start in range(0, read.numel(), len(names))]
        found = [dict(zip(names, (each / self.ranks.world for each in row), strict=True)) for row in rows]
        for values in found:
            self._require_finite(values, number)
        return found

    def _forward(self, batch: Batch) -> tuple[StudentOutput, TeacherOutputs]:
        """The student's outputs, and those of teachers: cached ones, and of networks that the objective runs."""
        output: StudentOutput
        taps = {"taps": self._taps} if self._taps else {}
        if self._lower is not None:
            output = self._student(None, self._heads, self._lower.maps(batch.teacher), **taps)
            return output, batch.teacher
        images = normalise(batch.pixels, self.preprocess, self._channels_last)
        if self._apart and batch.part is not None:
            # Rows are in the order of the parts.
            sizes = [size for size in batch.known.counts[3:] if size]
            output = self._student(images, self._heads, sizes)
        else:
            output = self._student(images, self._heads, **taps)
        live = {name: network(images, batch.labels) for name, network in self._live.items()}
        return output, {**batch.teacher, **live}

    def _counts(self, batch: Batch) -> Counts | None:
        """Over how many images the means of this step go; None where a batch is all there is."""
        pieces = self.ranks.world * (1 if self._together else self._settings.accumulate)
        self.images = len(batch.labels)
        if pieces == 1:
            return None
        totals = batch.whole or self.ranks.total(*batch.known.counts)
        self.images = int(totals[0])
        images, labels, others, *parts = (total / pieces for total in totals)
        return Counts(images, labels, others, tuple(parts))

    def _parameters(self) -> list[nn.Parameter]:
        return [each for group in self._plain_optimizer.param_groups for each in group["params"]]

    def _require_finite(self, values: dict[str, float], number: int) -> None:
        # A part is named rather than their sum, which comes first.
        wrong = [name for name, value in reversed(values.items()) if not math.isfinite(value)]
        if wrong:
            name, lr = wrong[0], self.lr
            raise DivergedError(
                f"the loss part '{name}' is {values[name]} at step {number + 1} (learning rate {lr:g})",
                f"The last checkpoint is kept. Start anew with a smaller rate: --lr {lr / 10:g} --overwrite",
            )
