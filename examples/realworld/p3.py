#!/usr/bin/env python3
"""What do pretrained models still learn from each other? P3's study, small, on Fashion-MNIST.

    python examples/realworld/p3.py FOLDER            4 networks, 12 pairs, 6 methods; under an hour on two cores
    python examples/realworld/p3.py FOLDER --table    the tables of what is there, nothing is trained
    python examples/realworld/p3.py FOLDER --tiny     few images, networks and epochs: to see that it runs

Needs kd and Fashion-MNIST below --data-root (default: data):

    apt install dataset-fashion-mnist
    mkdir -p data/FashionMNIST/raw; cd data/FashionMNIST/raw
    for f in /usr/share/datasets/fashion-mnist/*.gz; do gunzip -c $f > $(basename $f .gz); done

Every training is a kd command, printed as it starts; the same call goes on where it was stopped. Rates are chosen on
images of the training set that no network was trained on; the 10,000 test images judge at the end.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from runs import interval, kd, markdown, test_top1
from torchvision.datasets import FashionMNIST

SMALL = ("--image-size", 32, "--device", "cpu", "--workers", 0, "--quiet")
BASE = ("--method", "labels-only", "--init", "random", "--optimizer", "adamw", "--weight-decay", 0.05,
        "--schedule", "cosine", "--lr", 3e-3, "--batch-size", 64, "--recipe", "glyph")  # fmt: skip

METHODS: dict[str, dict[str, object]] = {
    "kl": {},
    "xe-kl": {},
    "mcl": {"mcl_share": 0.4},  # as far as P3's 5,078 updates at 0.9999 went
    "dp": {},
    "dp-unsup": {},
    "cd": {},
}
GRID = "grid"
"""Trials of rates, which kd compare is not to count among the transfers."""

CLAIM = ("kl", "dp")
"""Repeated with every seed, in every pair."""


@dataclass(frozen=True)
class Plan:
    """Sizes; epochs of transfers are passes over the same training images as before."""

    networks: tuple[str, ...] = ("test_vit", "test_convnext", "test_efficientnet", "test_resnet")
    images: int = 8000
    aside: int = 2000
    test: int = 10_000
    base_epochs: int = 20
    epochs: int = 2
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    seeds: int = 3
    student: str = "test_efficientnet"
    """That learns from several teachers."""

    @property
    def grid_pairs(self) -> tuple[tuple[str, str], ...]:
        """(teacher, student) pairs that the rates are chosen on, there and back."""
        first, *_, last = self.networks
        return (first, last), (last, first)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All ordered pairs (teacher, student)."""
        return [(t, s) for s in self.networks for t in self.networks if t != s]


TINY = Plan(networks=("test_vit", "test_resnet", "test_efficientnet"), images=200, aside=100, test=200, base_epochs=2,
            epochs=1, rates=(1e-3, 1e-2), seeds=2)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A plan in a folder."""

    plan: Plan
    folder: Path

    def data(self, split: str) -> str:
        """Data string of a split."""
        return f"{self.folder / 'images'}@split={split}"

    def base(self, network: str) -> Path:
        """Where a network's first training is."""
        return self.folder / "base" / network

    def exported(self, network: str) -> str:
        """A trained network as a model string."""
        return f"local-dir:{self.base(network) / 'export'}"

    @property
    def runs(self) -> Path:
        """Where transfers are."""
        return self.folder / "runs"


def write_images(study: Study, root: Path) -> None:
    """Fashion-MNIST as PNG files: disjoint train and val out of its training part, and its test part."""
    plan, done = study.plan, study.folder / "images" / "done"
    if done.exists():
        return
    generator = np.random.default_rng(0)
    known, unseen = FashionMNIST(root, train=True), FashionMNIST(root, train=False)
    order = generator.permutation(len(known))
    rows = {
        "train": (known, order[: plan.images]),
        "val": (known, order[plan.images : plan.images + plan.aside]),
        "test": (unseen, generator.permutation(len(unseen))[: plan.test]),
    }
    for split, (source, chosen) in rows.items():
        for row in map(int, chosen):
            image, label = source[row]
            name = source.classes[label].replace("/", "-").replace(" ", "-")
            path = study.folder / "images" / split / name / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    done.touch()


def train_base(study: Study, network: str, epochs: int, out: Path) -> None:
    """One network from random weights by labels."""
    kd("train-student", study.data("train"), "--student", network, *BASE, *SMALL, "--epochs", epochs, "--out", out,
       "--test", study.data("test"))  # fmt: skip


def cache(study: Study, split: str, views: str) -> None:
    """All trained networks over a split, in one pass."""
    teachers = [
        word
        for network in study.plan.networks
        for word in ("--teacher", f"{network}={study.exported(network)}")
    ]
    kd("cache-teachers", study.data(split), "--cache", study.folder / f"{split}.kd", *teachers, "--views", views,
       "--recipe", "glyph", "--keep", "logits,features", "--device", "cpu", "--workers", 0, "--quiet")  # fmt: skip


def sweep(
    study: Study, name: str, students: Mapping[str, Mapping[str, object]], seed: int, test: str
) -> Path:
    """Students over one stream of images and cached outputs: ``runs/NAME/STUDENT``; the grid is beside ``runs``."""
    out = study.folder / name if name == GRID else study.runs / name
    if not students:
        return out
    file = study.folder / "sweeps" / f"{name}.json"  # JSON is YAML
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"students": students}))
    kd("train-student", study.data("train"), "--cache", study.folder / "train.kd", "--sweep", file, "--out", out,
       *SMALL, "--epochs", study.plan.epochs, "--batch-size", 32, "--data-seed", seed, "--test", study.data(test),
       output=study.folder / "sweeps" / f"{name}.txt")  # fmt: skip
    return out


def transfer(
    study: Study, method: str, teachers: Sequence[str], student: str, rate: float
) -> dict[str, object]:
    """One student of a sweep."""
    taught: dict[str, object] = {"teacher": list(teachers)} if teachers else {}
    return {
        "method": method,
        "student": study.exported(student),
        "lr": rate,
        **taught,
        **METHODS.get(method, {}),
    }


def choose_rates(study: Study) -> dict[str, float]:
    """The best rate of each method on the images set aside, mean of two pairs; for continued training, too."""
    plan, students = study.plan, {}
    for teacher, student in plan.grid_pairs:
        for rate in plan.rates:
            for method in METHODS:
                students[f"{method}-{teacher}-{student}-{rate}"] = transfer(
                    study, method, [teacher], student, rate
                )
            students[f"xe-{student}-{rate}"] = continued(study, student, rate)
    out = sweep(study, GRID, students, 0, "val")
    found = {}
    for method in (*METHODS, "xe"):
        names = [f"xe-{s}" if method == "xe" else f"{method}-{t}-{s}" for t, s in plan.grid_pairs]
        found[method] = max(
            plan.rates,
            key=lambda rate, names=names: (mean(test_top1(out / f"{name}-{rate}") for name in names), -rate),
        )
    (study.folder / "rates.json").write_text(json.dumps(found, indent=1))
    return found


def continued(study: Study, student: str, rate: float) -> dict[str, object]:
    """Control: the transfers' optimiser, on labels alone."""
    return {"method": "labels-only", "student": study.exported(student), "lr": rate, "optimizer": "momentum",
            "weight_decay": 1e-3, "schedule": "constant", "bn": "frozen", "backbone_lr_scale": 1.0}  # fmt: skip


def train_pairs(
    study: Study, rates: Mapping[str, float], students: Sequence[str], seed: int, lane: int
) -> None:
    """All methods (seed 0) or those of the claim, in all pairs of some students; and the controls."""
    wanted: dict[str, dict[str, object]] = {}
    for student in students:
        for teacher in (name for name in study.plan.networks if name != student):
            for method in METHODS if seed == 0 else CLAIM:
                wanted[f"{method}-{teacher}-{student}"] = transfer(
                    study, method, [teacher], student, rates[method]
                )
        wanted[f"xe-{student}"] = continued(study, student, rates["xe"])
        if seed == 0:
            wanted[f"self-{student}"] = transfer(study, "xe-kl", [student], student, rates["xe-kl"])
    sweep(study, f"seed{seed}-{lane}", wanted, seed, "test")


def train_several(study: Study, rates: Mapping[str, float]) -> None:
    """One student and all other teachers by dp: parallel, one after the other, averaged."""
    plan, student = study.plan, study.plan.student
    teachers = [name for name in plan.networks if name != student]
    sweep(
        study, "parallel", {"dp-parallel": transfer(study, "dp", teachers, student, rates["dp"])}, 0, "test"
    )
    for order in ("ascending", "descending"):
        options = [word for name in teachers for word in ("--teacher", name)]
        kd("train-student", study.data("train"), "--cache", study.folder / "train.kd", "--cache",
           study.folder / "test.kd", "--student", study.exported(student), "--method", "dp", *options, "--sequential",
           order, "--lr", rates["dp"], *SMALL, "--epochs", plan.epochs, "--batch-size", 32, "--test",
           study.data("test"), "--out", study.runs / order)  # fmt: skip
    kd("soup", *(pair_folder(study, "dp", teacher, student, 0) for teacher in teachers), "--out", study.folder / "soup",
       "--device", "cpu", "--workers", 0, "--test", study.data("test"))  # fmt: skip


def lanes(study: Study) -> tuple[list[str], list[str]]:
    """Students of the two processes that run at once."""
    networks = list(study.plan.networks)
    return networks[::2], networks[1::2]


def pair_folder(study: Study, method: str, teacher: str | None, student: str, seed: int) -> Path:
    """The run of a transfer, or of a control (no teacher)."""
    lane = 0 if student in lanes(study)[0] else 1
    name = f"{method}-{teacher}-{student}" if teacher else f"{method}-{student}"
    return study.runs / f"seed{seed}-{lane}" / name


def both(*jobs: Callable[[], object]) -> None:
    """Jobs, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def train(study: Study) -> None:
    """Networks, caches, rates, transfers, several teachers."""
    plan = study.plan
    both(
        *(
            lambda n=network, e=epochs, o=out: train_base(study, n, e, o)
            for network in plan.networks
            for epochs, out in (
                (plan.base_epochs, study.base(network)),
                (plan.base_epochs // 2, study.folder / "base" / f"half-{network}"),
            )
        )
    )
    both(lambda: cache(study, "train", f"eval+train:{plan.epochs}"), lambda: cache(study, "test", "eval"))
    rates = choose_rates(study)
    both(
        *(
            lambda s=seed, k=lane: train_pairs(study, rates, lanes(study)[k], s, k)
            for seed in range(plan.seeds)
            for lane in (0, 1)
        )
    )
    train_several(study, rates)


# --- tables -----------------------------------------------------------------------------------


def gains(study: Study, method: str, teacher: str | None, student: str) -> list[float]:
    """Points won over the student before, by seed."""
    before = test_top1(study.base(student))
    folders = (pair_folder(study, method, teacher, student, seed) for seed in range(study.plan.seeds))
    return [test_top1(folder) - before for folder in folders if (folder / "result.json").exists()]


def kinds(study: Study) -> dict[str, list[tuple[str, str]]]:
    """Pairs by whether the teacher is weaker, equal (within a point) or stronger on the test set."""
    top1 = {name: test_top1(study.base(name)) for name in study.plan.networks}
    found: dict[str, list[tuple[str, str]]] = {"weaker": [], "equal": [], "stronger": []}
    for teacher, student in study.plan.pairs:
        more = top1[teacher] - top1[student]
        found["equal" if abs(more) <= 1 else "stronger" if more > 0 else "weaker"].append((teacher, student))
    return {"all": study.plan.pairs, **found}


def word(middle: float, half: float) -> str:
    """Of a difference that is expected to be above 0."""
    return "undecided" if abs(middle) <= half else "holds" if middle > 0 else "does not hold"


def transfer_table(study: Study) -> str:
    """Seed 0: mean gain over pairs with its interval over pairs, and the median success rate."""
    rows = []
    for method in METHODS:
        cells = [method]
        for pairs in kinds(study).values():
            values = [gains(study, method, t, s)[0] for t, s in pairs]
            cells.append(
                f"{plus_minus2(values)} ({sum(v > 0 for v in values)}/{len(values)})" if values else "–"
            )
        rates = [
            mean(gains(study, method, t, s)[0] > 0 for t, s in study.plan.pairs if s == student)
            for student in study.plan.networks
        ]
        rows.append([*cells, f"{100 * float(np.median(rates)):.0f} %"])
    for control, name in (("xe", "continued labels"), ("self", "xe-kl from itself")):
        values = [gains(study, control, None, student)[0] for student in study.plan.networks]
        rows.append(
            [name, f"{plus_minus2(values)} ({sum(v > 0 for v in values)}/{len(values)})", "", "", "", ""]
        )
    heads = [f"{kind} ({len(pairs)} pairs)" for kind, pairs in kinds(study).items()]
    return markdown(["method", *heads, "median success"], rows)


def plus_minus2(values: Sequence[float]) -> str:
    """Mean and 95 % interval of points, two digits."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    middle, half = interval(values)
    return f"{middle:+.2f} ± {half:.2f}"


def claim_table(study: Study) -> str:
    """DP against KL: paired by pair and seed; one number a pair or one a seed makes the interval."""
    rows = []
    for kind, pairs in kinds(study).items():
        if not pairs:
            continue
        per_pair = [
            [d - k for d, k in zip(gains(study, "dp", t, s), gains(study, "kl", t, s), strict=True)]
            for t, s in pairs
        ]
        by_pair = [mean(one) for one in per_pair]
        by_seed = [mean(one) for one in zip(*per_pair, strict=True)]
        cells = []
        for values in (by_pair, by_seed):
            middle, half = interval(values)
            cells.append(f"{middle:+.2f} ± {half:.2f}: {word(middle, half)}")
        rows.append([f"dp > kl, {kind} ({len(pairs)} pairs)", *cells])
    return markdown(["expected", "interval over pairs", "interval over seeds"], rows)


def orderings_table(study: Study) -> str:
    """P3's orderings at seed 0, over all pairs."""
    rows = []
    for one, other in (
        ("xe-kl", "kl"),
        ("mcl", "xe-kl"),
        ("dp", "mcl"),
        ("dp", "dp-unsup"),
        ("dp", "cd"),
        ("mcl", "cd"),
    ):
        middle, half = interval(
            [gains(study, one, t, s)[0] - gains(study, other, t, s)[0] for t, s in study.plan.pairs]
        )
        rows.append([f"{one} > {other}", f"{middle:+.2f} ± {half:.2f}: {word(middle, half)}"])
    for method in METHODS:
        middle, half = interval(
            [gains(study, method, t, s)[0] - gains(study, "xe", None, s)[0] for t, s in study.plan.pairs]
        )
        rows.append([f"{method} > continued labels", f"{middle:+.2f} ± {half:.2f}: {word(middle, half)}"])
    return markdown(["expected", "over all pairs, seed 0"], rows)


def several_table(study: Study) -> str:
    """One student, all teachers: top-1 and what it won."""
    student = study.plan.student
    before = test_top1(study.base(student))
    singles = {t: gains(study, "dp", t, student)[0] for t in study.plan.networks if t != student}
    best = max(singles, key=lambda name: singles[name])
    rows = [[f"best single ({best})", f"{before + singles[best]:.2f}", f"{singles[best]:+.2f}"]]
    for name, folder in (
        ("sequential, ascending", study.runs / "ascending"),
        ("sequential, descending", study.runs / "descending"),
        ("parallel", study.runs / "parallel" / "dp-parallel"),
    ):
        rows.append([name, f"{test_top1(folder):.2f}", f"{test_top1(folder) - before:+.2f}"])
    soup = 100 * float(json.loads((study.folder / "soup" / "soup.json").read_text())["test"]["top1"])
    rows.append(["soup of the singles", f"{soup:.2f}", f"{soup - before:+.2f}"])
    return markdown([f"{student} ({before:.2f})", "top-1", "gain"], rows)


def base_table(study: Study) -> str:
    """The networks, after half of the training and all of it."""
    rows = [
        [
            name,
            f"{test_top1(study.folder / 'base' / f'half-{name}'):.2f}",
            f"{test_top1(study.base(name)):.2f}",
        ]
        for name in study.plan.networks
    ]
    epochs = study.plan.base_epochs
    return markdown(["network", f"{epochs // 2} epochs", f"{epochs} epochs"], rows)


def tables(study: Study) -> str:
    """Everything, in Markdown."""
    rates = json.loads((study.folder / "rates.json").read_text())
    rate_table = markdown(list(rates), [[str(rate) for rate in rates.values()]])
    made = (base_table, transfer_table, claim_table, orderings_table, several_table)
    return "\n".join([rate_table, *(make(study) for make in made)])


def main() -> None:
    """Everything, then the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds FashionMNIST/raw")
    parser.add_argument("--tiny", action="store_true", help="a few minutes' work: to see that it runs")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study, start = Study(TINY if arguments.tiny else Plan(), arguments.folder.resolve()), time.monotonic()
    if not arguments.table:
        write_images(study, arguments.data_root)
        train(study)
        kd("compare", study.runs, *(f"{name}={study.exported(name)}" for name in study.plan.networks), "--cache",
           study.folder / "test.kd", "--out", study.folder / "compared", "--figures", study.folder / "figures",
           "--device", "cpu", "--workers", 0, "--json", output=study.folder / "compare.json")  # fmt: skip
    text = tables(study)
    (study.folder / "p3.md").write_text(text)
    print(text)
    print(
        f"{study.plan}\n{platform.platform()}, {os.cpu_count()} cores, {time.monotonic() - start:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
