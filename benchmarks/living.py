"""An epoch of a student on the cache, against labels alone and against teachers that run live.

Photographs (crops of scikit-image's, as JPEGs of 160 x 120) in four classes; a resnet10t at 64 pixels learns from
three teachers (resnet18, resnet34, mobilenetv3_large_100; random weights: the cost is that of trained ones). All
runs share loader, images, views and batches. What is timed is whole epochs after a run's first, in which workers
start; a run's time is their median. Each value is the median over the turns of a ratio within one turn.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import Figures, benchmark, of_turns
from sweeping import save_photos
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not declare it
from timm.task.distillation import LogitDistillationTask

from kdcli.console import console
from kdcli.errors import KdError
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import Output
from kdcli.training.batches import feed_of, make_loader
from kdcli.training.config import StudentConfig
from kdcli.training.resolve import make_plan
from kdcli.training.samplers import order_of
from kdcli.training.train import train_student

TEACHERS = {"a": "resnet18", "b": "resnet34", "c": "mobilenetv3_large_100"}
STUDENT, SIZE, CLASSES, BATCH = "resnet10t", 64, 4, 32
LABEL_WEIGHT, LR, DECAY = 0.8, 1e-3, 0.05


def make_place(root: Path, images: int) -> None:
    """Photographs, three teachers, and what they say about one training view of each photograph."""
    save_photos(root / "photos", images, (160, 120))
    for name, architecture in TEACHERS.items():
        torch.manual_seed(0)
        model = open_model(architecture, weights="random", num_classes=CLASSES, image_size=SIZE)
        export_model(model, root / name, None)
    specs = tuple(f"{name}=local-dir:{root / name}" for name in TEACHERS)
    cache_teachers(
        CacheConfig(
            data=str(root / "photos"), cache=root / "c.kd", teacher=specs, views="eval+train:1", workers=1
        )
    )


@dataclass(frozen=True)
class Runs:
    """What is timed; each function takes an output folder and gives the seconds of an epoch."""

    root: Path
    epochs: int

    def config(self, out: Path, method: str, **own: Any) -> StudentConfig:
        fields: dict[str, Any] = {
            "data": str(self.root / "photos"), "student": STUDENT, "image_size": SIZE, "epochs": self.epochs,
            "batch_size": BATCH, "workers": 1, "device": "cpu", "lr": LR, "weight_decay": DECAY, "recipe": "imagenet",
        }  # fmt: skip
        return StudentConfig(out=out, method=method, **{**fields, **own})

    def cached(self, out: Path, names: Sequence[str]) -> StudentConfig:
        own = {
            "cache": (self.root / "c.kd",),
            "teacher": tuple(names),
            "teacher_view": "same",
            "label_weight": LABEL_WEIGHT,
        }
        return self.config(out, "distill-equal", **own)

    def labels_epoch(self, out: Path) -> float:
        return self.middle(train_student(self.config(out, "labels-only")).history)

    def cached_epoch(self, out: Path, names: Sequence[str]) -> float:
        return self.middle(train_student(self.cached(out, names)).history)

    def live_epoch(self, out: Path) -> tuple[float, float]:
        """The same student with the teachers' forward in our loop; and the seconds of that forward."""
        runners = {
            name: TeacherRunner(
                open_model(f"local-dir:{self.root / name}"), "cpu", "off", (Output("logits"),)
            )
            for name in TEACHERS
        }
        spent: list[float] = []

        def forward(batch: Batch) -> None:
            start = time.perf_counter()
            live = {name: runner(batch.pixels)["logits"].clone() for name, runner in runners.items()}
            spent.append(time.perf_counter() - start)
            for name, logits in live.items():  # the student learns from these, not from what was read
                torch.testing.assert_close(
                    batch.teacher[name]["logits"].float(), logits, rtol=2e-3, atol=2e-3
                )
                batch.teacher[name]["logits"] = logits

        history = train_student(self.cached(out, tuple(TEACHERS)), on_batch=forward).history
        return self.middle(history), self.per_epoch(spent)

    def timm_epoch(self, out: Path) -> tuple[float, float]:
        """Timm's task with teacher ``a`` on batches of our loader; and the seconds of the teacher's forward."""
        plan = make_plan(self.config(out, "labels-only"), None)
        order, preprocess = order_of(plan), open_model(f"local-dir:{self.root / 'a'}").preprocess
        loader = make_loader(feed_of(plan, [Render.of(preprocess)], None), order, 1, torch.device("cpu"))
        student = timm.create_model(STUDENT, num_classes=CLASSES).to(memory_format=torch.channels_last)
        teacher = timm.create_model(f"local-dir:{self.root / 'a'}", pretrained=True)
        task = LogitDistillationTask(
            student, teacher.to(memory_format=torch.channels_last), torch.nn.CrossEntropyLoss(),
            task_loss_weight=LABEL_WEIGHT, temperature=1.0, verbose=False,
        )  # fmt: skip
        optimizer = create_optimizer_v2(student, opt="adamw", lr=LR, weight_decay=DECAY)
        task.train()
        seconds: list[float] = []
        started: list[float] = []
        spent: list[float] = []
        task.teacher.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        task.teacher.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started[-1]))
        for epoch in range(self.epochs):
            order.seek(epoch)
            start = time.perf_counter()
            for batch in loader:
                if isinstance(batch, KdError):
                    raise batch
                optimizer.zero_grad()
                task(normalise(batch.pixels, preprocess), batch.labels)["loss"].backward()
                optimizer.step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]), self.per_epoch(spent)

    def per_epoch(self, spent: Sequence[float]) -> float:
        """Seconds that the steps of an epoch take together, of all but the first."""
        steps = len(spent) // self.epochs
        return statistics.median(
            sum(spent[epoch * steps : (epoch + 1) * steps]) for epoch in range(1, self.epochs)
        )

    @staticmethod
    def middle(history: Sequence[dict[str, Any]]) -> float:
        return statistics.median(epoch["seconds"] for epoch in history[1:])


def turn(runs: Runs, out: Path, backwards: bool) -> dict[str, float]:
    """The three ratios, each of runs that follow one another; every other turn in the opposite order."""
    todo: dict[str, Callable[[Path], Any]] = {
        "live": runs.live_epoch,
        "three": lambda place: runs.cached_epoch(place, tuple(TEACHERS)),
        "labels": runs.labels_epoch,
        "one": lambda place: runs.cached_epoch(place, ("a",)),
        "timm": runs.timm_epoch,
    }
    found = {name: todo[name](out / name) for name in (reversed(todo) if backwards else todo)}
    (live, teachers), (theirs, teacher) = found["live"], found["timm"]
    labels, three, one = found["labels"], found["three"], found["one"]
    print(
        f"an epoch: labels {labels:.2f} s, cache {three:.2f} s, live {live:.2f} s (teachers {teachers:.2f}); "
        f"one teacher: cache {one:.2f} s, timm {theirs:.2f} s (teacher {teacher:.2f})",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return {
        "cached_epoch_vs_labels_only": three / labels,
        "cached_speedup_vs_live_teachers": live / three / ((labels + teachers) / labels),
        "cached_speedup_vs_timm_task": theirs / one / ((labels + teacher) / labels),
    }


SAYS = {
    "cached_epoch_vs_labels_only": (
        1.03,
        "x seconds",
        "an epoch with three cached teachers against labels only",
    ),
    "cached_speedup_vs_live_teachers": (
        0.95,
        "of the ideal",
        "speed-up over three teachers that run in our loop",
    ),
    "cached_speedup_vs_timm_task": (
        0.95,
        "of the ideal",
        "speed-up over one teacher in timm's LogitDistillationTask",
    ),
}
"""Goal, unit and meaning of each figure. The ideal is (student + teachers) / student seconds."""


def figures(options: argparse.Namespace) -> Figures:
    """The design's two rows of an epoch on the cache, live teachers in our loop and in timm's task."""
    console.quiet = True
    torch.set_num_threads(1)
    images, epochs, turns = (96, 3, 2) if options.quick else (160, 6, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_place(root, images)
        runs = Runs(root, epochs)
        found = [turn(runs, root / f"turn{n}", n % 2 == 1) for n in range(options.turns or turns)]
    return {
        name: of_turns([each[name] for each in found], goal, unit, what, higher=goal < 1)
        for name, (goal, unit, what) in SAYS.items()
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))
