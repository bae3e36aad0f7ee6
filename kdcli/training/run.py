"""``train_student``: the step behind ``kd train-student``."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import save

from kdcli.config import TrainConfig
from kdcli.console import console
from kdcli.errors import UsageError
from kdcli.models.export import export_model
from kdcli.models.student import LABEL_HEAD
from kdcli.runtime import StopFlag, atomic_write_bytes, stop_signals, versions, worker_count, write_json
from kdcli.training.evaluate import accuracy, head_to_test
from kdcli.training.feed import EpochOrder, Feed, FeedBatch, make_loader
from kdcli.training.loop import Engine, fit, make_accelerator
from kdcli.training.outdir import (
    begin,
    finished_result,
    forget_checkpoints,
    read_pins,
    require_folder,
    require_same_run,
)
from kdcli.training.plan import Plan, make_plan
from kdcli.training.recorded import Recording
from kdcli.training.resident import DeviceFed, bring_near
from kdcli.training.student import Built, build_student
from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave.

    Attributes:
        method: name of the method.
        out: the output folder, absolute.
        epochs: passes over the data.
        test: ``{"top1", "top5"}`` as fractions; None when nothing was tested.
        history: one document per epoch, as in metrics.jsonl.
        cache_id: of the cache it read; None without one.
        seconds: training and testing, over all resumes.
        details: what else result.json records: weights, start, seeds, versions.
    """

    method: str
    out: str
    epochs: int
    test: dict[str, float] | None
    history: tuple[dict[str, Any], ...]
    cache_id: str | None
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The result as the JSON document that the command prints and result.json holds."""
        return {
            "method": self.method,
            "out": self.out,
            "epochs": self.epochs,
            "test": self.test,
            "history": list(self.history),
            "cache_id": self.cache_id,
            "seconds": self.seconds,
            **self.details,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "TrainResult":
        """Undo :meth:`document`."""
        own = {name: document[name] for name in cls.__dataclass_fields__ if name != "details"}
        own["history"] = tuple(own["history"])
        return cls(**own, details={name: value for name, value in document.items() if name not in own})


def train_student(
    config: TrainConfig,
    *,
    ranking: Ranking | None = None,
    on_batch: Callable[[FeedBatch], None] | None = None,
) -> TrainResult:
    """Train one student, or go on with it, or give the result of the finished run.

    Args:
        config: what to train; None in it means the method's default.
        ranking: the value of what ``config.ranking`` names; reading it is the caller's.
        on_batch: called with every batch before its step, for instance to measure what live teachers cost.

    Returns:
        The result, which is also in OUT/result.json.

    Raises:
        StoppedEarly: a signal arrived; the same call goes on.
        DivergedError: the loss is not finite any more.
        OutputExistsError: OUT holds another run.
        KdError: see :func:`kdcli.training.plan.make_plan` for what is refused before training.
    """
    _require_one_process()
    require_folder(config.out)
    plan = make_plan(config, ranking, None if config.overwrite else read_pins(config.out))
    head_to_test(plan)  # refuses unsuitable test data before training rather than after it
    out = plan.config.out
    if not config.overwrite:
        require_same_run(plan)
    stored = None if config.overwrite else finished_result(out)
    if stored is not None:
        console.note(f"{out} is finished; nothing to do")
        return TrainResult.from_document(stored)
    _say(plan)
    built = build_student(plan)
    begin(plan)
    result = _train(plan, built, on_batch)
    write_json(out / "result.json", result.document())
    forget_checkpoints(out)
    return result


def _require_one_process() -> None:
    """Several ranks would write the same files of OUT over each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UsageError(
            f"train-student runs in one process, but WORLD_SIZE is {world}",
            "Start it without torchrun; train several students side by side, as examples/students.sbatch does.",
        )


def _say(plan: Plan) -> None:
    config, numbers = plan.config, plan.settings
    backbone_lr = numbers.lr * numbers.backbone_lr_scale
    console.note(
        f"student {config.student}, started from {plan.init}; {len(plan.data)} images of {config.data}"
    )
    console.note(
        f"{plan.method.name}: {numbers.optimizer}, lr {numbers.lr:g} (backbone {backbone_lr:g}), "
        f"weight decay {numbers.weight_decay:g}, {numbers.schedule}, {numbers.epochs} epochs "
        f"of batches of {numbers.batch_size}, BatchNorm {numbers.bn}"
    )
    if plan.teachers is not None:
        shares = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.teachers.weights.items())
        label = f", label weight {numbers.label_weight:g}" if plan.method.needs.labels else ""
        console.note(f"soft cross-entropy at T = {numbers.temperature:g}{label}; weights: {shares}")
        if "crd_weight" in plan.method.options:
            console.note(_contrast(plan))


def _contrast(plan: Plan) -> str:
    numbers, teachers = plan.settings, len(plan.teachers.weights) if plan.teachers else 0
    size = 2 * teachers * len(plan.data) * numbers.crd_dim * 4  # fp32, one bank for each side
    return (
        f"CRD: weight {numbers.crd_weight:g}, {numbers.crd_negatives} negatives, temperature "
        f"{numbers.crd_temperature:g}, {numbers.crd_dim} dimensions; memory of {size / 1e6:.1f} MB"
    )


def _train(plan: Plan, built: Built, on_batch: Callable[[FeedBatch], None] | None) -> TrainResult:
    numbers, config = plan.settings, plan.config
    accelerator = make_accelerator(plan.device, config.amp)
    workers = worker_count(config.workers)
    labels = plan.data.labels if plan.method.needs.labels else np.zeros(len(plan.data), np.int64)
    order = EpochOrder(
        labels,
        numbers.batch_size,
        config.data_seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    recording, held = plan.recording, None
    if recording is not None:
        recording = Recording(recording.cache, recording.rows, built.objective.reads())
        recording, held = bring_near(config, recording, plan.rule, numbers.epochs, accelerator.device)
    feed = Feed(plan.data, built.model.preprocess, plan.rule, recording)
    engine = Engine(built, numbers, order.batches * numbers.epochs, accelerator, on_batch)
    loader = make_loader(feed, order, workers, accelerator.device)
    batches = loader if held is None else DeviceFed(loader, order, plan.rule, held)
    with stop_signals() as stop:
        progress = fit(engine, batches, order, plan.rule, numbers.epochs, config.out, stop)
        started = time.perf_counter()
        test = _test(plan, built, accelerator.device, workers, stop)
    _write_student(plan, built, config.out)
    return TrainResult(
        method=plan.method.name,
        out=str(config.out),
        epochs=numbers.epochs,
        test=test,
        history=tuple(progress.history),
        cache_id=plan.cache_id,
        seconds=sum(epoch["seconds"] for epoch in progress.history) + time.perf_counter() - started,
        details={
            "student": config.student,
            "init": plan.init,
            "images": len(plan.data),
            "weights": {} if plan.teachers is None else dict(plan.teachers.weights),
            "teachers": {} if plan.teachers is None else {n: r.id for n, r in plan.teachers.records.items()},
            "seed": config.seed,
            "data_seed": config.data_seed,
            "device": plan.device,
            "versions": versions(),
        },
    )


def _test(
    plan: Plan, built: Built, device: torch.device, workers: int, stop: StopFlag
) -> dict[str, float] | None:
    choice = head_to_test(plan)
    if plan.test is None or choice is None:
        return None
    head, labels = choice
    if head not in built.student.heads:  # a teacher of weight 0 has no head
        return None
    size = plan.settings.batch_size
    return accuracy(
        built.student, head, plan.test, labels, built.model.preprocess, device, size, workers, stop
    )


def _write_student(plan: Plan, built: Built, out: Path) -> None:
    own = plan.teachers.generalist.name if plan.teachers and plan.teachers.generalist else LABEL_HEAD
    tensors = {
        f"{own if name == LABEL_HEAD else name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, head in built.student.heads.items()
        for key, tensor in head.state_dict().items()
    }
    atomic_write_bytes(out / "heads.safetensors", save(tensors))
    export_model(built.model, out / "export", plan.class_names)
