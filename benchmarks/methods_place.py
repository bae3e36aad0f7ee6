"""What methods.py trains on: two tasks of drawn letters, two teachers, one cache a task; all made by kd commands."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import say

import kdcli
from kdcli.demo.weights import export_pretrained_weights
from kdcli.files import atomic_write_text
from kdcli.models.export import export_model
from kdcli.models.spec import open_model

LETTERS, IMAGENET = "letters", "imagenet"
"""The teachers: one trained here on Latin letters, and EfficientNet-Lite0 with its ImageNet weights."""
GRID = 0
"""The training set that chooses the rates; those that are reported are 1, 2, ..."""
SIDE = 32
TAP = "layer2"
"""Where maps are matched: 4 x 4 cells in teacher and student."""
DIVERGED = 40


@dataclass(frozen=True)
class Task:
    """Images, and what is known of them.

    Attributes:
        name: of its folder.
        source: its data string, up to ``@``.
        classes: what its data string says of classes; empty for all.
        shots: images of each class that a student learns from.
        labels: whether a student may see their labels.
        baseline: the method that the others are compared with.
        generalist: the teacher that P1's methods call so.
    """

    name: str
    source: str
    classes: str
    shots: int
    labels: bool
    baseline: str
    generalist: str


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seeds: int = 4
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    epochs: int = 12
    batch_size: int = 16
    views: int = 4
    labelled_shots: int = 15
    unlabelled_shots: int = 6
    teacher_epochs: int = 15
    teacher_part: str = "pool"
    student: str = "test_resnet"
    teacher: str = "resnet10t"

    @property
    def tasks(self) -> tuple[Task, Task]:
        """One with labels, of the teacher's own classes; one without, of a script that no teacher has seen."""
        return (
            Task(
                "labelled",
                "glyphs/latin",
                "classes=t-split",
                self.labelled_shots,
                True,
                "labels-only",
                LETTERS,
            ),
            Task("unlabelled", "glyphs/armenian", "", self.unlabelled_shots, False, "kl", IMAGENET),
        )


QUICK = Plan(
    seeds=1, rates=(0.01,), epochs=1, views=1, labelled_shots=2, unlabelled_shots=2, teacher_epochs=1,
    teacher_part="used",
)  # fmt: skip
FULL = Plan(
    seeds=10, rates=(0.001, 0.003, 0.01, 0.03), epochs=40, views=20, labelled_shots=20, unlabelled_shots=20,
    teacher_epochs=20,
)  # fmt: skip


def kd(*words: object, output: Path | None = None, allowed: tuple[int, ...] = ()) -> None:
    """Run one command on one thread and print it; ``output`` takes its standard output.

    Raises:
        SystemExit: it failed, with another code than those allowed.
    """
    texts = [str(word) for word in words]
    say(f"kd {shlex.join(texts)}" + (f" > {output}" if output else ""))
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *texts, "--quiet"],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode not in (0, *allowed):
        raise SystemExit(done.returncode)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(output, done.stdout)


def draw(keys: Sequence[str], labels: np.ndarray, shots: int, sets: int) -> dict[str, list[str]]:
    """Training sets of ``shots`` images a class, of different images while these last: ``train0``, ``train1``, ...

    ``used`` are all of them, ``trial`` two images a class of ``train0``.
    """
    random = np.random.default_rng(0)
    trains: list[list[str]] = [[] for _ in range(sets)]
    for label in np.unique(labels):
        pool = random.permutation(np.flatnonzero(labels == label))
        for number, train in enumerate(trains):
            places = number * shots + np.arange(min(shots, len(pool)))
            train += [keys[row] for row in np.take(pool, places, mode="wrap")]
    return {
        **{f"train{number}": train for number, train in enumerate(trains)},
        "used": sorted({key for train in trains for key in train}),
        "trial": [key for place, key in enumerate(trains[GRID]) if place % shots < 2],
    }


@dataclass(frozen=True)
class Place:
    """A folder in which everything is made once: what is there already is left alone."""

    folder: Path
    plan: Plan

    # --- images -----------------------------------------------------------------------------------

    def divide(self, task: Task) -> None:
        """Draw the training sets from the pool, and write which images each leaves out."""
        every, pool = kdcli.open_data(self._string(task)), kdcli.open_data(self.data(task, "pool"))
        parts = draw(tuple(pool.keys), np.asarray(pool.labels), task.shots, self.plan.seeds + 1)
        for name, keys in parts.items():
            left = sorted(set(every.keys) - set(keys))
            self._without(task, name).parent.mkdir(parents=True, exist_ok=True)
            self._without(task, name).write_text("\n".join(left) + "\n", encoding="utf-8")

    def _without(self, task: Task, part: str) -> Path:
        return self.folder / task.name / "parts" / f"without-{part}.txt"

    def data(self, task: Task, part: str, *, labels: bool = True) -> str:
        """The data string of ``pool``, ``validation``, ``test`` or a part that was drawn, see :func:`draw`."""
        shares = {"pool": 1, "validation": 2, "test": 3}
        chosen = (
            f"split=60/20/20:{shares[part]}" if part in shares else f"without={self._without(task, part)}"
        )
        return self._string(task, chosen, "" if labels else "labels=none")

    def _string(self, task: Task, *modifiers: str) -> str:
        text = ",".join(filter(None, (task.classes, *modifiers)))
        return f"{task.source}@{text}" if text else task.source

    # --- teachers ---------------------------------------------------------------------------------

    @property
    def specs(self) -> dict[str, str]:
        """Model strings of the teachers."""
        return {
            LETTERS: f"local-dir:{self.folder / 'teachers' / LETTERS / 'export'}",
            IMAGENET: f"local-dir:{self.folder / 'teachers' / IMAGENET}",
        }

    def train_letters(self) -> None:
        """Train that teacher on the pool, which has more than five times a student's images."""
        task, out = self.plan.tasks[0], self.folder / "teachers" / LETTERS
        if not (out / "result.json").exists():
            kd("train-student", self.data(task, self.plan.teacher_part), "--method", "labels-only", "--student",
               self.plan.teacher, "--image-size", SIDE, "--init", "random", "--recipe", "glyph",
               "--epochs", self.plan.teacher_epochs, "--batch-size", 64, "--lr", 0.003, "--workers", 0,
               "--device", "cpu", "--out", out)  # fmt: skip

    # --- what they say ----------------------------------------------------------------------------

    def cache(self, task: Task) -> Path:
        """The one cache of a task."""
        return self.folder / task.name / "cache.kd"

    def fill(self, task: Task, teacher: str) -> None:
        """Ask a teacher about every image that any student learns from, in every view."""
        done = self.folder / task.name / f"asked-{teacher}"
        if done.exists():
            return
        keep = "logits,features" + (f",maps:{TAP}" if teacher == LETTERS else "")
        kd("cache-teachers", self.data(task, "used", labels=task.labels), "--cache", self.cache(task), "--teacher",
           f"{teacher}={self.specs[teacher]}", "--keep", keep, "--views", f"eval+train:{self.plan.views}",
           "--recipe", "glyph", "--workers", 0, "--device", "cpu")  # fmt: skip
        done.touch()

    def prepare(self, jobs: int) -> None:
        """Images, teachers and caches: ImageNet's teacher is asked while the other one learns."""
        for task in self.plan.tasks:
            self.divide(task)
        export_pretrained_weights(self.folder / "teachers" / IMAGENET, 2 * SIDE)
        with ThreadPoolExecutor(jobs) as pool:
            learning = pool.submit(self.train_letters)
            list(pool.map(lambda task: self.fill(task, IMAGENET), self.plan.tasks))
            learning.result()
            list(pool.map(lambda task: self.fill(task, LETTERS), self.plan.tasks))
            list(pool.map(self.rank, (task for task in self.plan.tasks if task.labels)))

    def ranking(self, task: Task, part: str) -> Path:
        """P2's ranking of the teachers by the labels of a training set."""
        return self.folder / task.name / "rankings" / f"{part}.json"

    def rank(self, task: Task) -> None:
        """Make the rankings of all training sets that are trained on."""
        first = GRID if len(self.plan.rates) > 1 else GRID + 1
        for part in ("trial", *(f"train{number}" for number in range(first, self.plan.seeds + 1))):
            if not self.ranking(task, part).exists():
                kd("rank-sources", "--cache", self.cache(task), "--data", self.data(task, part), "--json",
                   output=self.ranking(task, part))  # fmt: skip

    def bytes_of(self, task: Task, arrays: Mapping[str, tuple[str, ...]]) -> int:
        """What the arrays of some teachers take in the cache, an image and view."""
        info = kdcli.cache_info(self.cache(task)).document()["teachers"]
        every = {
            (teacher, name): np.dtype(array["dtype"]).itemsize * int(np.prod(array["shape"][2:]))
            for teacher in info
            for kind in info[teacher]["kinds"].values()
            for name, array in kind["arrays"].items()
        }
        return sum(every[teacher, name] for teacher, names in arrays.items() for name in names)

    # --- students ---------------------------------------------------------------------------------

    def common(self) -> dict[str, Any]:
        """Options of every student, whatever its method: one start, one optimiser, one budget, one set of views."""
        return {
            "student": self.plan.student, "image_size": SIDE, "init": "random", "optimizer": "adamw",
            "weight_decay": 0.05, "schedule": "cosine", "warmup": 0.05, "backbone_lr_scale": 1.0, "bn": "train",
            "epochs": self.plan.epochs, "batch_size": self.plan.batch_size, "teacher_view": "same",
            "workers": 0, "device": "cpu",
        }  # fmt: skip

    def sweep(self, task: Task, number: int, name: str, students: Mapping[str, Mapping[str, Any]]) -> Path:
        """Train students on one stream of a training set; gives their folder. Those that diverge have no result."""
        out = self.folder / task.name / "runs" / name
        file = self.folder / task.name / "sweeps" / f"{name}.json"  # JSON is YAML
        common = {"cache": [str(self.cache(task))], "seed": number, "data_seed": number, **self.common()}
        text = json.dumps({"students": students, "common": common}, indent=1)
        if (out / "sweep.json").exists() and file.read_text(encoding="utf-8") == text:
            return out
        (out / "sweep.json").unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        tested = (
            ("--test", self.data(task, "validation" if number == GRID else "test")) if task.labels else ()
        )
        kd("train-student", self.data(task, f"train{number}", labels=task.labels), "--sweep", file, "--out", out,
           *tested, allowed=(DIVERGED,))  # fmt: skip
        return out

    def probe(self, task: Task, number: int, name: str, models: Mapping[str, str]) -> None:
        """Judge features by kNN: votes of the labelled training images, on validation or test images."""
        path = self._probe(task, name)
        if not set(models) <= set(self.probed(task, name)):
            flags = [word for key, spec in models.items() for word in ("--model", f"{key}={spec}")]
            kd("eval-probe", self.data(task, f"train{number}"), *flags, "--protocol", "knn", "--shots", "all",
               "--test", self.data(task, "validation" if number == GRID else "test"), "--workers", 0,
               "--device", "cpu", "--json", output=path)  # fmt: skip

    def probed(self, task: Task, name: str) -> dict[str, float]:
        """Accuracy of each representation in percent; none where there was no probe yet."""
        path = self._probe(task, name)
        document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": []}
        results = document.get("results", [document])  # of a lone representation it is the document
        return {each["representation"]: 100 * float(each["accuracy"]["mean"]) for each in results}

    def top1(self, task: Task) -> float:
        """That of the teacher of letters, on test images."""
        path = self._probe(task, LETTERS)
        if not path.exists():
            kd("eval-probe", "--head", "label", "--model", f"{LETTERS}={self.specs[LETTERS]}", "--test",
               self.data(task, "test"), "--workers", 0, "--device", "cpu", "--json", output=path)  # fmt: skip
        return self.probed(task, LETTERS)[LETTERS]

    def _probe(self, task: Task, name: str) -> Path:
        return self.folder / task.name / "probes" / f"{name}.json"

    def references(self, task: Task, number: int) -> dict[str, float]:
        """What teachers and untrained students reach in the same test, in percent."""
        if task.labels:
            return {LETTERS: self.top1(task)}
        start = self.folder / task.name / "starts" / str(number)
        if not start.exists():
            torch.manual_seed(number)
            student = open_model(self.plan.student, weights="random", num_classes=2, image_size=SIDE)
            export_model(student, start, None)
        name = f"references{number}"
        self.probe(task, number, name, {**self.specs, "untrained": f"local-dir:{start}"})
        return self.probed(task, name)


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Add up the minutes of a run that may be stopped and gone on with."""
    start, before = time.monotonic(), minutes_of(folder)
    try:
        yield
    finally:
        atomic_write_text(folder / "minutes.json", json.dumps(before + (time.monotonic() - start) / 60))


def minutes_of(folder: Path) -> float:
    """What was spent on a folder so far."""
    path = folder / "minutes.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0
