"""``train_student`` and ``train_students``: the step behind ``kd train-student``, for one student and for several."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from accelerate import Accelerator
from safetensors.torch import save

from kdcli.config import TrainConfig
from kdcli.console import console
from kdcli.errors import DeviceError, DivergedError, KdError, OutputExistsError, StoppedEarly, UsageError
from kdcli.models.export import export_model
from kdcli.models.student import LABEL_HEAD
from kdcli.runtime import StopFlag, atomic_write_bytes, stop_signals, versions, worker_count, write_json
from kdcli.training.evaluate import Examinee, accuracies, head_to_test
from kdcli.training.feed import Feed, FeedBatch, make_loader, render_of
from kdcli.training.fitting import Lane, OwnRandom, Stream, fit, known_divergence
from kdcli.training.loop import Engine, make_accelerator
from kdcli.training.outdir import (
    begin,
    finished_result,
    forget_checkpoints,
    read_pins,
    require_folder,
    require_same_run,
)
from kdcli.training.plan import Plan, Sources, make_plan
from kdcli.training.recorded import Recording
from kdcli.training.resident import DeviceFed, bring_near
from kdcli.training.sharing import order_of, require_one_stream
from kdcli.training.student import Built, build_student
from kdcli.types import Ranking

Outcome = TypeVar("Outcome")
LONE = ""
"""Name of a student that is trained by itself."""


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
    outcome = train_students({LONE: config}, {LONE: ranking}, on_batch)[LONE]
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome


def train_students(
    configs: Mapping[str, TrainConfig],
    rankings: Mapping[str, Ranking | None] | None = None,
    on_batch: Callable[[FeedBatch], None] | None = None,
) -> dict[str, TrainResult | DivergedError]:
    """Train several students over one stream of batches; each becomes what it would have become alone.

    Every folder is afterwards as :func:`train_student` leaves it, and either function goes on with what the
    other began. What is refused is refused for all students at once, before any is trained.

    Args:
        configs: what to train, by name; ``out`` is each student's own folder. They agree in their stream, see
            :func:`kdcli.training.sharing.require_one_stream`.
        rankings: the value of what ``config.ranking`` names, by name of the student.
        on_batch: called with every student's share of a batch before its step.

    Returns:
        The result of each, or why it was given up. One that was given up before is not tried again. In several,
        ``overwrite`` starts anew only those whose folder holds another run.

    Raises:
        StoppedEarly: a signal arrived; the same call goes on.
        OutputExistsError: a folder holds another run.
        UsageError: they cannot share a stream.
        KdError: see :func:`kdcli.training.plan.make_plan` for what is refused before training.
    """
    _require_one_process()
    sources, rankings = Sources(), rankings or {}
    plans = _for_each(configs, lambda name: _decide(name, configs[name], rankings.get(name), sources))
    outcomes: dict[str, TrainResult | DivergedError] = {}
    for name, plan in plans.items():
        if (outcome := _known_outcome(name, plan)) is not None:
            outcomes[name] = outcome
    left = {name: plan for name, plan in plans.items() if name not in outcomes}
    if left:
        runs = _prepare(require_one_stream(left))
        for run in runs:
            begin(run.plan)
        outcomes |= _train(runs, on_batch)
    return {name: outcomes[name] for name in configs}


def _require_one_process() -> None:
    """Several ranks would write the same files of OUT over each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UsageError(
            f"train-student runs in one process, but WORLD_SIZE is {world}",
            "Start it without torchrun; train several students side by side, as examples/students.sbatch does.",
        )


def _for_each(names: Iterable[str], function: Callable[[str], Outcome]) -> dict[str, Outcome]:
    """Results by name; or the first of all errors, its message telling all of them and whose they are."""
    results: dict[str, Outcome] = {}
    errors: dict[str, tuple[KdError, list[str]]] = {}
    for name in names:
        try:
            results[name] = function(name)
        except KdError as error:
            errors.setdefault(error.message, (error, []))[1].append(name)
    if not errors:
        return results
    first = next(iter(errors.values()))[0]
    first.message = "; ".join(
        message if LONE in wrong else f"student {', '.join(repr(name) for name in wrong)}: {message}"
        for message, (_, wrong) in errors.items()
    )
    first.args = (first.message,)
    raise first


def _decide(name: str, config: TrainConfig, ranking: Ranking | None, sources: Sources) -> Plan:
    """The plan of a student, whose folder is free for it or holds this very run."""
    require_folder(config.out)
    anew = config.overwrite and name == LONE
    plan = make_plan(config, ranking, None if anew else read_pins(config.out), sources)
    head_to_test(plan)  # refuses unsuitable test data before training rather than after it
    if anew:
        return plan
    try:
        require_same_run(plan)
    except OutputExistsError as error:
        if not config.overwrite:
            if name != LONE:
                error.hint = (
                    "Give the changed student another name, or add --overwrite: it starts anew only those whose "
                    "folder holds another run."
                )
            raise
        return make_plan(config, ranking, None, sources)
    return replace(plan, config=plan.config.model_copy(update={"overwrite": False}))


def _known_outcome(name: str, plan: Plan) -> TrainResult | DivergedError | None:
    out = plan.config.out
    if plan.config.overwrite:
        return None
    if (stored := finished_result(out)) is not None:
        console.note(f"{out} is finished; nothing to do")
        return TrainResult.from_document(stored)
    error = None if name == LONE else known_divergence(out)
    if error is not None:
        console.warn(f"student '{name}' was given up before: {error.message}")
    return error


@final
@dataclass(frozen=True, slots=True)
class _Run:
    """A student that is about to be trained, and its random numbers."""

    name: str
    plan: Plan
    built: Built
    random: OwnRandom


def _prepare(plans: Mapping[str, Plan]) -> list[_Run]:
    def build(name: str) -> _Run:
        random = OwnRandom(torch.device(plans[name].device))
        with random():
            return _Run(name, plans[name], build_student(plans[name]), random)

    for name, plan in plans.items():
        _say(plan, f"{name}: " if name else "")
    return list(_for_each(plans, build).values())


def _say(plan: Plan, prefix: str) -> None:
    config, numbers = plan.config, plan.settings
    backbone_lr = numbers.lr * numbers.backbone_lr_scale
    console.note(
        f"{prefix}student {config.student}, started from {plan.init}; {len(plan.data)} images of {config.data}"
    )
    console.note(
        f"{prefix}{plan.method.name}: {numbers.optimizer}, lr {numbers.lr:g} (backbone {backbone_lr:g}), "
        f"weight decay {numbers.weight_decay:g}, {numbers.schedule}, {numbers.epochs} epochs "
        f"of batches of {numbers.batch_size}, BatchNorm {numbers.bn}"
    )
    if plan.teachers is not None:
        shares = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.teachers.weights.items())
        label = f", label weight {numbers.label_weight:g}" if plan.method.needs.labels else ""
        console.note(f"{prefix}soft cross-entropy at T = {numbers.temperature:g}{label}; weights: {shares}")


# --- training ---------------------------------------------------------------------------------


def _train(
    runs: Sequence[_Run], on_batch: Callable[[FeedBatch], None] | None
) -> dict[str, TrainResult | DivergedError]:
    plan = runs[0].plan  # what a stream is made from is the same in all
    config, epochs = plan.config, plan.settings.epochs
    accelerators = [make_accelerator(run.plan.device, run.plan.config.amp) for run in runs]
    accelerator = accelerators[0]
    workers = worker_count(config.workers)
    order = order_of(plan, accelerator.process_index, accelerator.num_processes)
    recording, held = plan.recording, None
    if recording is not None:
        recording = Recording(recording.cache, recording.rows, _reads(runs))
        recording, held = bring_near(config, recording, plan.rule, epochs, accelerator.device)
    first, *others = (run.built.model.preprocess for run in runs)
    feed = Feed(plan.data, first, plan.rule, recording, [render_of(other) for other in others])
    loader = make_loader(feed, order, workers, accelerator.device)
    batches = loader if held is None else DeviceFed(loader, order, plan.rule, held)
    lanes = [
        _lane(run, order.batches * epochs, own, on_batch, len(runs))
        for run, own in zip(runs, accelerators, strict=True)
    ]
    with stop_signals() as stop:
        fit(lanes, Stream(batches, order, plan.rule, epochs, accelerator.device), stop)
        results: dict[str, TrainResult | DivergedError] = {
            lane.name: lane.diverged for lane in lanes if lane.diverged is not None
        }
        done = [(run, lane) for run, lane in zip(runs, lanes, strict=True) if lane.diverged is None]
        started = time.perf_counter()
        tests = _test(done, accelerator.device, workers, stop)
    for run, _ in done:
        _write_student(run.plan, run.built, run.plan.config.out)
    seconds = (time.perf_counter() - started) / max(1, len(done))
    for run, lane in done:
        results[run.name] = _finish(run, lane, tests.get(run.name), seconds)
    return results


def _reads(runs: Sequence[_Run]) -> dict[str, tuple[str, ...]]:
    """Everything that some student reads: teacher -> array names."""
    together: dict[str, dict[str, None]] = {}
    for run in runs:
        for teacher, names in run.built.objective.reads().items():
            together.setdefault(teacher, {}).update(dict.fromkeys(names))
    return {teacher: tuple(names) for teacher, names in together.items()}


def _lane(
    run: _Run,
    steps: int,
    accelerator: Accelerator,
    on_batch: Callable[[FeedBatch], None] | None,
    students: int,
) -> Lane:
    built, plan = run.built, run.plan
    try:
        with run.random():
            engine = Engine(built, plan.settings, steps, accelerator, on_batch)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"out of memory before the first step: {str(error).splitlines()[0]}",
            f"Use fewer students in a sweep than these {students}."
            if students > 1
            else "Use a smaller student.",
        ) from error
    render = render_of(built.model.preprocess)
    return Lane(run.name, engine, plan.config.out, render, built.objective.reads(), run.random)


def _test(
    done: Sequence[tuple[_Run, Lane]], device: torch.device, workers: int, stop: StopFlag
) -> dict[str, dict[str, float]]:
    """Accuracies of the students that have a head to test, in one pass over the test data."""
    examinees: dict[str, Examinee] = {}
    for run, _ in done:
        choice = head_to_test(run.plan)
        if choice is not None and choice[0] in run.built.student.heads:  # a teacher of weight 0 has no head
            head, labels = choice
            examinees[run.name] = Examinee(run.built.student, head, labels, run.built.model.preprocess)
    data = done[0][0].plan.test if done else None
    if data is None or not examinees:
        return {}
    size = done[0][0].plan.settings.batch_size
    try:
        found = accuracies(list(examinees.values()), data, device, size, workers, stop)
    except StoppedEarly:
        for _, lane in done:
            lane.save()
        raise
    return dict(zip(examinees, found, strict=True))


def _finish(run: _Run, lane: Lane, test: dict[str, float] | None, seconds: float) -> TrainResult:
    """Write the result of a trained student; from then on its run is finished."""
    plan, config, history = run.plan, run.plan.config, lane.progress.history
    result = TrainResult(
        method=plan.method.name,
        out=str(config.out),
        epochs=plan.settings.epochs,
        test=test,
        history=tuple(history),
        cache_id=plan.cache_id,
        seconds=sum(epoch["seconds"] for epoch in history) + seconds,
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
    write_json(config.out / "result.json", result.document())
    forget_checkpoints(config.out)
    return result


def _write_student(plan: Plan, built: Built, out: Path) -> None:
    own = plan.teachers.generalist.name if plan.teachers and plan.teachers.generalist else LABEL_HEAD
    tensors = {
        f"{own if name == LABEL_HEAD else name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, head in built.student.heads.items()
        for key, tensor in head.state_dict().items()
    }
    atomic_write_bytes(out / "heads.safetensors", save(tensors))
    export_model(built.model, out / "export", plan.class_names)
