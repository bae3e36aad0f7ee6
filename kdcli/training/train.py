"""``train_student`` and ``train_students``: the step behind ``kd train-student``, for one student and for several."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from kdcli.console import console
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.sources import ImageData
from kdcli.devices import device_errors
from kdcli.errors import DeviceError, DivergedError, KdError, UsageError
from kdcli.files import make_folder, occupied
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.models.student import LABEL_HEAD
from kdcli.precision import require_repeatable
from kdcli.runtime import StopFlag, StopNow, stop_signals, worker_count
from kdcli.training.batches import feed_of, make_loader
from kdcli.training.checkpoint import settle
from kdcli.training.config import StudentConfig
from kdcli.training.decide import LONE, decide, for_each, known_outcome
from kdcli.training.distributed import Ranks, Together, join_ranks, stopped_before_training
from kdcli.training.engine import Engine, make_accelerator
from kdcli.training.evaluate import (
    Conditions,
    Examinee,
    ExamRoom,
    Labels,
    accuracies,
    heads_to_test,
    labels_for,
    require_sound,
)
from kdcli.training.fidelity import fidelities, fidelity_of, judged_of
from kdcli.training.fit import Lane, fit
from kdcli.training.one_stream import require_one_stream
from kdcli.training.plan import Plan
from kdcli.training.replay import Recording
from kdcli.training.resident import DeviceFed, bring_near
from kdcli.training.result import TrainResult, result_of
from kdcli.training.rundir import begin, finish
from kdcli.training.samplers import order_of
from kdcli.training.sources import Sources
from kdcli.training.stream import Stream
from kdcli.training.student import Built, build_student
from kdcli.training.summary import tell, tell_built
from kdcli.training.tracking import track_test, tracked
from kdcli.training.transfers import OwnRandom
from kdcli.training.validation import ON_TEST, VAL, Judge, Watch
from kdcli.types import Ranking

_RANK_STRIDE = 1_000_003
"""Between the seeds of the processes of a run: larger than the seeds that people count through."""


def train_student(
    config: StudentConfig,
    *,
    ranking: Ranking | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    sources: Sources | None = None,
) -> TrainResult:
    """Train one student, or go on with it, or give the result of the finished run.

    Args:
        config: what to train; None in it means the method's default.
        ranking: the value of what ``config.ranking`` names; reading it is the caller's.
        on_batch: called with every batch before its step, for instance to measure what live teachers cost.
        sources: opens data and caches; default: as they are named.

    Returns:
        The result, which is also in OUT/result.json.

    Raises:
        StoppedEarly: a signal arrived; the same call goes on.
        DivergedError: the loss is not finite any more.
        OutputExistsError: OUT holds another run.
        KdError: see :func:`kdcli.training.resolve.make_plan` for what is refused before training.
    """
    outcome = train_students({LONE: config}, {LONE: ranking}, on_batch, sources)[LONE]
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome


def train_students(
    configs: Mapping[str, StudentConfig],
    rankings: Mapping[str, Ranking | None] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    sources: Sources | None = None,
) -> dict[str, TrainResult | DivergedError]:
    """Train several students over one stream of batches; each becomes what it would have become alone.

    Every folder is afterwards as :func:`train_student` leaves it, and either function goes on with what the
    other began. What is refused is refused for all students at once, before any is trained.

    Args:
        configs: what to train, by name; ``out`` is each student's own folder. They agree in their stream, see
            :func:`kdcli.training.one_stream.require_one_stream`.
        rankings: the value of what ``config.ranking`` names, by name of the student.
        on_batch: called with every student's share of a batch before its step.
        sources: opens data and caches; default: as they are named.

    Returns:
        The result of each, or why it was given up. One that was given up before is not tried again. In several,
        ``overwrite`` starts anew only those whose folder holds another run.

    Raises:
        StoppedEarly: a signal arrived; the same call goes on.
        OutputExistsError: a folder holds another run.
        UsageError: they cannot share a stream.
        KdError: see :func:`kdcli.training.resolve.make_plan` for what is refused before training.
    """
    first = next(iter(configs.values()))
    if first.deterministic:
        require_repeatable(first.device)
    with _stoppable() as stop, join_ranks(first.device) as ranks, ranks.company(), device_errors("training"):
        before, console.silent = console.silent, not ranks.first
        # Alone, a signal before the first step ends the run at once. Together, it does where all agree on it.
        stop.at_once = ranks.world == 1
        try:
            return _run(configs, rankings or {}, on_batch, ranks, stop, sources or Sources())
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
    configs: Mapping[str, StudentConfig],
    rankings: Mapping[str, Ranking | None],
    on_batch: Callable[[Batch], None] | None,
    ranks: Ranks,
    stop: StopFlag,
    sources: Sources,
) -> dict[str, TrainResult | DivergedError]:
    with ranks.one_fate():
        if len(configs) > 1:
            _require_one_process(ranks)
        plans = for_each(
            configs, lambda name: decide(name, configs[name], rankings.get(name), sources, ranks.world)
        )
        found = {name: known_outcome(name, plan) for name, plan in plans.items()}
        outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
        left = {name: plan for name, plan in plans.items() if name not in outcomes}
        left = require_one_stream(left) if left else {}
    if left:
        with ranks.one_fate():
            runs = _prepare(left)
            for run in runs if ranks.first else ():
                settle(run.plan, run.built.objective)
            if stop:
                raise stopped_before_training()
        for run in runs:
            for constant in run.built.objective.constants():
                ranks.copy_first_(constant)
        plan = runs[0].plan
        with plan.precision.applied(plan.device), ExitStack() as stack:
            with ranks.one_fate():  # all have read what is in OUT before the first one writes there
                if ranks.first:
                    for run in runs:
                        make_folder(run.plan.config.out)
                        stack.enter_context(occupied(run.plan.config.out))
                        begin(run.plan)
            outcomes |= _train(runs, on_batch, ranks, stop)
    return {name: outcomes[name] for name in configs}


def _require_one_process(ranks: Ranks) -> None:
    if ranks.world > 1:
        raise UsageError(
            f"a sweep runs in one process, but WORLD_SIZE is {ranks.world}",
            "Start it without torchrun; train several students side by side, as examples/students.sbatch does.",
        )


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
            built = build_student(plans[name])
        tell_built(plans[name], built, f"{name}: " if name else "")
        return _Run(name, plans[name], built, random)

    for name, plan in plans.items():
        tell(plan, f"{name}: " if name else "")
    return list(for_each(plans, build).values())


# --- training ---------------------------------------------------------------------------------


def _train(
    runs: Sequence[_Run], on_batch: Callable[[Batch], None] | None, ranks: Ranks, stop: StopFlag
) -> dict[str, TrainResult | DivergedError]:
    plan = runs[0].plan  # what a stream is made from is the same in all
    config, epochs = plan.config, plan.settings.epochs
    accelerators = [_accelerator(run.plan) for run in runs]
    device = accelerators[0].device
    workers = worker_count(config.workers)
    order = order_of(plan, ranks.rank, ranks.world)
    recording, held = plan.recording, None
    if recording is not None:
        with ranks.one_fate():
            recording = Recording(recording.cache, recording.rows, _union(runs), _kept(runs))
            recording, held = bring_near(config, recording, plan.rule, plan.turns, device)
    loader = make_loader(_feed(runs, recording), order, workers, device)
    fed = loader if held is None else DeviceFed(loader, order, plan.rule, held)
    how = Conditions(
        device, plan.settings.batch_size, workers, stop, ranks, None if recording is None else recording.kept
    )
    with ExitStack() as stack:
        lanes = []
        for run, accelerator in zip(runs, accelerators, strict=True):
            watch = _watch(run, how)
            lanes.append(_lane(run, order.batches * epochs, accelerator, on_batch, len(runs), watch))
            stack.enter_context(tracked(accelerator, run.plan.identity(), run.plan.config.out))
        stop.at_once = False  # from here on there is something to save
        together = Together(fed, lanes[0].engine.ranks, stop, len(plan.sets) or 2 * plan.split)
        fit(lanes, Stream(together, order, plan.rule, epochs, device), together.stop)
        return _finish(runs, lanes, how)


def _accelerator(plan: Plan) -> Accelerator:
    config = plan.config
    return make_accelerator(plan.device, plan.precision.amp, config.tracker, config.out / "trackers")


def _feed(runs: Sequence[_Run], recording: Recording | None) -> Dataset[Batch | KdError]:
    plan = runs[0].plan
    renders = [Render.of(run.built.model.preprocess).single for run in runs]
    # Maps are all that a cut student sees; images that are mixed are drawn, for the labels of their partners.
    decoded = plan.rule.views.mixes or any(run.plan.lower is None for run in runs)
    for data in (plan.data, *(each.data for each in plan.sets[1:])) if decoded else ():
        if slow := data.source.random_cost():
            console.warn(slow)
    return feed_of(plan, renders, recording, decoded)


def _kept(runs: Sequence[_Run]) -> KeptPixels | None:
    """What the cache keeps of view 0 as the students see it, where any of them is shown it."""
    plan, renders = runs[0].plan, [Render.of(run.built.model.preprocess) for run in runs]
    trains = plan.rule.recorded and plan.rule.cached == 0
    if trains:
        renders = [render.single for render in renders]
    if plan.recording is None or not (trains or plan.test or plan.validation):
        return None
    return KeptPixels.find(plan.recording.cache, renders)


def _reads(run: _Run) -> dict[str, tuple[str, ...]]:
    reads = run.built.objective.reads()
    return reads if run.plan.lower is None else run.plan.lower.with_maps(reads)


def _union(runs: Sequence[_Run]) -> dict[str, tuple[str, ...]]:
    """Everything that some student reads: teacher -> array names."""
    together: dict[str, dict[str, None]] = {}
    for run in runs:
        for teacher, names in _reads(run).items():
            together.setdefault(teacher, {}).update(dict.fromkeys(names))
    return {teacher: tuple(names) for teacher, names in together.items()}


def _lane(
    run: _Run,
    steps: int,
    accelerator: Accelerator,
    on_batch: Callable[[Batch], None] | None,
    students: int,
    watch: Watch | None,
) -> Lane:
    built, config = run.built, run.plan.config
    try:
        with run.random():
            engine = Engine(built, run.plan.settings, steps, accelerator, on_batch, config.compile)
            if not engine.ranks.first:
                # Dropout of one process must not repeat another's; the first one's is that of a run alone.
                torch.manual_seed(config.seed + engine.ranks.rank * _RANK_STRIDE)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"out of memory before the first step: {str(error).splitlines()[0]}",
            f"Use fewer students in a sweep than these {students}."
            if students > 1
            else "Use a smaller student.",
        ) from error
    return Lane(run.name, engine, config.out, _reads(run), run.random, watch)


def _watch(run: _Run, how: Conditions) -> Watch | None:
    plan, built = run.plan, run.built
    if not plan.selects:
        return None

    def judge_of(head: str, data: ImageData, labels: Labels) -> Judge:
        one = Examinee(built.student, head, labels, built.model.preprocess)
        room = ExamRoom(data, [Render.of(one.preprocess)], how)  # of every epoch
        return lambda: accuracies([one], data, how, room)[0]

    judges, chooser = {}, {"best": VAL, ON_TEST: "test"}.get(plan.config.select)
    if plan.validation is not None and plan.predicts:
        judges[VAL] = fidelity_of(plan, built, plan.validation, how)
    elif plan.validation is not None:
        judges[VAL] = judge_of(LABEL_HEAD, plan.validation, labels_for(plan.validation, plan.classes))
    if plan.config.select == ON_TEST:
        _, head, data, labels = heads_to_test(plan)[0]
        judges["test"] = judge_of(head, data, labels)
    # What predicts teachers goes with the student that it was trained with.
    kept = nn.ModuleList([built.student, built.objective]) if plan.predicts else None
    return Watch(built.student, judges, chooser, kept)


# --- the end ----------------------------------------------------------------------------------


def _finish(
    runs: Sequence[_Run],
    lanes: Sequence[Lane],
    how: Conditions,
) -> dict[str, TrainResult | DivergedError]:
    """Test and write what was trained; from then on those runs are finished."""
    started, ranks = time.perf_counter(), how.ranks
    chosen = {}
    for run, lane in zip(runs, lanes, strict=True):
        if lane.diverged is None:
            lane.engine.finish()
            if lane.watch is not None:
                chosen[run.name] = lane.watch.settle(lane.progress.history)
            try:
                require_sound(run.built.student, run.built.model.preprocess.size)
            except DivergedError as error:
                lane.give_up(error)
    results: dict[str, TrainResult | DivergedError] = {
        lane.name: lane.diverged for lane in lanes if lane.diverged is not None
    }
    done = [(run, lane) for run, lane in zip(runs, lanes, strict=True) if lane.diverged is None]
    tests = _tests(done, how)
    seconds = (time.perf_counter() - started) / max(1, len(done))
    for run, lane in done:
        scores = tests.get(run.name, {})
        track_test(lane.engine.accelerator, next(iter(scores.values()), None), lane.progress.steps)
        result, *_ = ranks.gather(  # each measured its own seconds
            result_of(run.plan, lane.progress.history, scores, seconds, chosen.get(run.name))
        )
        with ranks.one_fate():
            if ranks.first:
                finish(run.plan, run.built, result.document())
        results[run.name] = result
    return results


def _tests(done: Sequence[tuple[_Run, Lane]], how: Conditions) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies of the students that have a head to test: by student, then by test. One pass over each test's data."""
    exams: dict[str, tuple[ImageData, dict[str, Examinee]]] = {}
    for run, _ in done:
        for test, head, data, labels in heads_to_test(run.plan):
            if head in run.built.student.heads:  # a teacher of weight 0 has no head
                one = Examinee(run.built.student, head, labels, run.built.model.preprocess)
                exams.setdefault(test, (data, {}))[1][run.name] = one
    found: dict[str, dict[str, dict[str, float]]] = {}
    predicting = [run for run, _ in done if run.plan.predicts]
    if predicting and (held := predicting[0].plan.test) is not None:
        judged = [judged_of(run.plan, run.built, held) for run in predicting]
        found = {
            run.name: {"test": each}
            for run, each in zip(predicting, fidelities(judged, held, how), strict=True)
        }
    for test, (data, examinees) in exams.items():
        scores = accuracies(list(examinees.values()), data, how)
        for name, score in zip(examinees, scores, strict=True):
            found.setdefault(name, {})[test] = score
    return found
