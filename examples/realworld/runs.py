"""What the scripts of this folder share: kd commands, results by seed, intervals and verdicts."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

BySeed = Sequence[float]


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
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(done.stdout)


def test_top1(run: Path) -> float:
    """Top-1 test accuracy of a finished run, in percent."""
    return 100 * float(json.loads((run / "result.json").read_text())["test"]["top1"])


def validation_top1(run: Path) -> float:
    """Top-1 accuracy on the validation split after the last epoch, in percent."""
    return 100 * float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_top1"])


def interval(values: BySeed) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; one seed has none (infinite)."""
    if len(values) < 2:
        return mean(values), float("inf")
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def plus_minus(values: BySeed) -> str:
    """Mean and 95 % interval as text."""
    middle, half = interval(values)
    return f"{middle:.1f} ± {half:.1f}"


def verdict(first: BySeed, relation: str, second: BySeed) -> str:
    """Whether ``first > second`` (or ``≈``) holds, by the interval of the difference paired by seed.

    ``≈`` never "holds": so few seeds can contradict it, not show it.
    """
    middle, half = interval([a - b for a, b in zip(first, second, strict=True)])
    contradicted = middle < 0 or relation == "≈"
    word = "undecided" if abs(middle) <= half else "does not hold" if contradicted else "holds"
    return f"{middle:+.1f} ± {half:.1f}: {word}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(results: Mapping[str, Mapping[str, BySeed]], orderings: Sequence[tuple[str, str, str]]) -> str:
    """Accuracies of all methods, then a verdict on every expected ordering.

    Args:
        results: column (a target), method, top-1 by seed.
        orderings: (method, ``>`` or ``≈``, method).
    """
    columns = list(results)
    methods = list(results[columns[0]])
    first = markdown(
        ["method", *columns],
        [[method, *(plus_minus(results[column][method]) for column in columns)] for method in methods],
    )
    second = markdown(
        ["expected", *columns],
        [
            [f"{a} {relation} {b}", *(verdict(results[c][a], relation, results[c][b]) for c in columns)]
            for a, relation, b in orderings
        ],
    )
    return f"{first}\n{second}"
