"""``train_student``: the step behind ``kd train-student``."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import save

from kdcli.config import TrainConfig
from kdcli.console import console
from kdcli.models.export import export_model
from kdcli.models.student import LABEL_HEAD
from kdcli.runtime import (
    StopFlag,
    StopNow,
    atomic_write_bytes,
    stop_signals,
    versions,
    worker_count,
    write_json,
)
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
from kdcli.training.ranks import Ranks, Together, join_ranks, stopped_before_training
from kdcli.training.recorded import Recording
from kdcli.training.resident import DeviceFed, bring_near
from kdcli.training.student import Built, build_student
from kdcli.training.tracking import require_trackers, track_test, tracked
from kdcli.training.validation import Watch
from kdcli.types import Ranking

_RANK_STRIDE = 1_000_003
"""Between the seeds of the processes of a run: larger than the seeds that people count through."""


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
    with _stoppable() as stop, join_ranks() as ranks, ranks.company():
        before, console.silent = console.silent, not ranks.first
        # Alone, a signal before the first step ends the run at once. Together, it does where all agree on it.
        stop.at_once = ranks.world == 1
        try:
            return _run(config, ranking, on_batch, ranks, stop)
        finally:
            console.silent = before


@contextmanager
def _stoppable() -> Iterator[StopFlag]:
    try:
        with stop_signals() as stop:
            yield stop
    except StopNow as now:
        raise stopped_before_training() from now


def _run(
    config: TrainConfig,
    ranking: Ranking | None,
    on_batch: Callable[[FeedBatch], None] | None,
    ranks: Ranks,
    stop: StopFlag,
) -> TrainResult:
    with ranks.one_fate():
        require_folder(config.out)
        require_trackers(config.tracker)
        pins = None if config.overwrite else read_pins(config.out)
        plan = make_plan(config, ranking, pins, ranks.world)
        head_to_test(plan)  # refuses unsuitable test data before training rather than after it
        out = plan.config.out
        if not config.overwrite:
            require_same_run(plan)
        stored = None if config.overwrite else finished_result(out)
    if stored is not None:
        console.note(f"{out} is finished; nothing to do")
        return TrainResult.from_document(stored)
    with ranks.one_fate():
        _say(plan)
        built = build_student(plan)
        if stop:
            raise stopped_before_training()
    with ranks.one_fate():  # all have read what is in OUT before the first one writes there
        if ranks.first:
            begin(plan)
    result, *_ = ranks.gather(_train(plan, built, on_batch, ranks, stop))  # each measured its own seconds
    with ranks.one_fate():
        if ranks.first:
            _write_student(plan, built, out)
            write_json(out / "result.json", result.document())
            forget_checkpoints(out)
    return result


def _say(plan: Plan) -> None:
    config, numbers = plan.config, plan.settings
    backbone_lr = numbers.lr * numbers.backbone_lr_scale
    console.note(
        f"student {config.student}, started from {plan.init}; {len(plan.data)} images of {config.data}"
    )
    console.note(
        f"{plan.method.name}: {numbers.optimizer}, lr {numbers.lr:g} (backbone {backbone_lr:g}), "
        f"weight decay {numbers.weight_decay:g}, {numbers.schedule}, {numbers.epochs} epochs "
        f"of batches of {numbers.batch_size}, BatchNorm {numbers.bn}{_extras(plan)}"
    )
    if config.freeze is not None:
        console.note("the backbone is frozen; the heads train on its features of eval mode")
    if plan.lower is not None:
        console.note(
            f"the layers up to {plan.lower.tap} stay as they are; their maps are read as teacher "
            f"'{plan.lower.teacher.name}' stored them ({plan.lower.teacher.dtype})"
        )
    if plan.validation is not None:
        console.note(
            f"{len(plan.validation)} labelled images are set aside; the {config.select} epoch is exported"
        )
    if plan.processes > 1 and numbers.bn == "train":
        console.note(
            f"BatchNorm averages over each process's {numbers.batch_size // plan.processes} images; "
            "its running statistics are the first process's"
        )
    if plan.teachers is not None:
        shares = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.teachers.weights.items())
        label = f", label weight {numbers.label_weight:g}" if plan.method.needs.labels else ""
        console.note(f"soft cross-entropy at T = {numbers.temperature:g}{label}; weights: {shares}")


def _extras(plan: Plan) -> str:
    """What the user asked of the engine besides, to be told at the start."""
    numbers = plan.settings
    told = {
        f"warm-up over {numbers.warmup:.0%}": numbers.warmup > 0,
        f"falling at {', '.join(f'{share:.0%}' for share in numbers.milestones)}": numbers.schedule == "step",
        f"{numbers.accumulate} pieces a step": numbers.accumulate > 1,
        f"gradient norm at most {numbers.clip_norm}": numbers.clip_norm is not None,
        f"labels smoothed by {numbers.label_smoothing:g}": numbers.label_smoothing > 0,
        f"weights averaged with decay {numbers.ema}": numbers.ema is not None,
        f"{plan.processes} processes": plan.processes > 1,
    }
    return "".join(f", {text}" for text, said in told.items() if said)


def _train(
    plan: Plan,
    built: Built,
    on_batch: Callable[[FeedBatch], None] | None,
    ranks: Ranks,
    stop: StopFlag,
) -> TrainResult:
    numbers, config = plan.settings, plan.config
    accelerator = make_accelerator(plan.device, config.amp, config.tracker, config.out / "trackers")
    workers = worker_count(config.workers)
    labels = plan.data.labels if plan.method.needs.labels else np.zeros(len(plan.data), np.int64)
    order = EpochOrder(
        labels,
        numbers.batch_size,
        config.data_seed,
        ranks.rank,
        ranks.world,
    )
    recording, held = plan.recording, None
    if recording is not None:
        reads = built.objective.reads()
        if plan.lower is not None:
            reads = plan.lower.with_maps(reads)
        with ranks.one_fate():
            recording = Recording(recording.cache, recording.rows, reads)
            recording, held = bring_near(config, recording, plan.rule, numbers.epochs, accelerator.device)
    # Maps are all that a cut student sees; images that are mixed are drawn, for the labels of their partners.
    decoded = plan.lower is None or plan.rule.views.mixes
    feed = Feed(plan.data, built.model.preprocess, plan.rule, recording, decoded)
    steps = order.batches * numbers.epochs
    engine = Engine(built, numbers, steps, accelerator, on_batch, config.compile)
    if not ranks.first:
        # Dropout of one process must not repeat another's; the first one's is that of a run alone.
        torch.manual_seed(config.seed + ranks.rank * _RANK_STRIDE)
    loader = make_loader(feed, order, workers, accelerator.device)
    batches = Together(loader if held is None else DeviceFed(loader, order, plan.rule, held), ranks, stop)
    with tracked(accelerator, plan.identity(), config.out):
        stop.at_once = False  # from here on there is something to save
        watch = _watch(plan, built, accelerator.device, workers, stop)
        progress = fit(engine, batches, order, plan.rule, numbers.epochs, config.out, batches.stop, watch)
        engine.finish()
        validation = None if watch is None else watch.settle(progress.history)
        started = time.perf_counter()
        test = _test(plan, built, accelerator.device, workers, stop, ranks)
        track_test(accelerator, test, progress.steps)
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
            **({} if validation is None else {"validation": {"images": _count(plan), **validation}}),
            "weights": {} if plan.teachers is None else dict(plan.teachers.weights),
            "teachers": {} if plan.teachers is None else {n: r.id for n, r in plan.teachers.records.items()},
            "seed": config.seed,
            "data_seed": config.data_seed,
            "device": plan.device,
            "processes": plan.processes,
            "ema": numbers.ema,
            "versions": versions(),
        },
    )


def _count(plan: Plan) -> int:
    return 0 if plan.validation is None else len(plan.validation)


def _watch(plan: Plan, built: Built, device: torch.device, workers: int, stop: StopFlag) -> Watch | None:
    data = plan.validation
    if data is None:
        return None
    student, size = built.student, plan.settings.batch_size

    def judge() -> dict[str, float]:
        return accuracy(
            student, LABEL_HEAD, data, data.labels, built.model.preprocess, device, size, workers, stop
        )

    return Watch(student, judge, plan.config.select == "best")


def _test(
    plan: Plan, built: Built, device: torch.device, workers: int, stop: StopFlag, ranks: Ranks
) -> dict[str, float] | None:
    choice = head_to_test(plan)
    if plan.test is None or choice is None:
        return None
    head, labels = choice
    if head not in built.student.heads:  # a teacher of weight 0 has no head
        return None
    size = plan.settings.batch_size
    return accuracy(
        built.student, head, plan.test, labels, built.model.preprocess, device, size, workers, stop, ranks
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
