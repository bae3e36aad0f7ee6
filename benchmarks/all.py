"""Run the benchmarks, and write what they found into benchmarks/RESULTS.md and README.md.

    python benchmarks/all.py [--only NAME,NAME] [--quick] [--turns N] [--long]
    python benchmarks/all.py --steps                       # the step figures of the design, medians of five turns
    python benchmarks/all.py --steps --against COMMIT      # the same in two trees that take turns: before and after
    python benchmarks/all.py --render                      # only write the tables again

Each benchmark runs alone, one after the other. What they found is kept in benchmarks/results.json with its machine,
load, commit and number of turns; the tables between markers in RESULTS.md, and single figures between markers anywhere
in the pages listed below, are written from it. A partial run changes those of what it ran. ``--quick`` and
``--against`` write nothing: their figures are printed. A figure that misses its goal is marked, in the tables and
here; the exit code is 1 only when a benchmark fails to run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measuring import Figure, of_turns, reached, say

HERE = Path(__file__).parent
TREE = HERE.parent
STORE = HERE / "results.json"
PAGES = (HERE / "RESULTS.md", TREE / "README.md", TREE / "docs/scale.md")
"""Pages with tables or figures between markers."""
Document = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One file of this folder.

    Attributes:
        minutes: that it takes on two processors.
        turns: that ``--steps`` asks for; 0: none of its figures are the design's step figures.
        long: only with ``--long`` or by name.
        arguments: what it is given.
    """

    minutes: float
    turns: int = 0
    long: bool = False
    arguments: tuple[str, ...] = ()


BENCHMARKS = {
    "cache": Benchmark(3, 9),
    "throughput": Benchmark(6, 5),
    "living": Benchmark(6, 5),
    "sweeping": Benchmark(5, 5),
    "stores": Benchmark(2),
    "scale": Benchmark(4),
    "pixels": Benchmark(5),
    "clips": Benchmark(5),
    "ranking": Benchmark(4),
    "step_path": Benchmark(0.5),
    "geometry": Benchmark(6),
    "digits": Benchmark(4),
    "methods": Benchmark(35, long=True),
    "niceness": Benchmark(8, long=True),
    "memory": Benchmark(12, long=True),
    "coverage": Benchmark(60, long=True),
    "probing": Benchmark(90, long=True),
    "soak": Benchmark(30, long=True),
    "gpu": Benchmark(9, long=True),
}


def run(name: str, arguments: tuple[str, ...], tree: Path = TREE) -> Document:
    """What one benchmark prints as JSON, with kdcli taken from ``tree``.

    Raises:
        RuntimeError: it ended with an error, or printed none.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *arguments]
    start = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, cwd=HERE, env=environment(tree)
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"figures"')]
    if not lines:
        raise RuntimeError(f"{name} ended with {done.returncode} and printed no figures")
    document: Document = json.loads(lines[-1])
    document["machine"]["minutes"] = round((time.monotonic() - start) / 60, 1)
    document["machine"]["command"] = " ".join(("python", f"benchmarks/{name}.py", *arguments))
    return document


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree)}


# --- two trees ------------------------------------------------------------------------------------


def compare(commit: str, names: list[str], turns: int, quick: bool) -> int:
    """Print the figures of ``commit`` and of this tree, whose runs of one turn each follow one another."""
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        git("worktree", "add", "--detach", str(old), commit)
        try:
            found = in_turns({"before": old, "now": TREE}, names, turns, ("--quick",) if quick else ())
        finally:
            git("worktree", "remove", "--force", str(old))
    print(f"{'figure':34} {'goal':>7} {commit[:12]:>24} {'now':>24}")
    for name, now in found["now"].items():
        before = found["before"].get(name)
        cells = ["-" if each is None else f"{each['value']:.3f} ({each['low']:.3f}-{each['high']:.3f})"
                 for each in (before, now)]  # fmt: skip
        print(
            f"{name:34} {now['goal']:7g} {cells[0]:>24} {cells[1]:>24}{'' if reached(now) else '  NOT REACHED'}"
        )
    return 0


def in_turns(
    trees: dict[str, Path], names: list[str], turns: int, arguments: tuple[str, ...]
) -> dict[str, dict[str, Figure]]:
    """Figures by tree, medians over the turns; every other turn begins with the other tree."""
    values: dict[str, dict[str, list[float]]] = {label: {} for label in trees}
    shapes: dict[str, Figure] = {}
    for name in names:
        for turn in range(turns):
            order = list(trees.items())
            for label, tree in order if turn % 2 == 0 else reversed(order):
                figures = run(name, (*arguments, "--turns", "1"), tree)["figures"]
                for key, found in figures.items():
                    values[label].setdefault(key, []).append(found["value"])
                    shapes[key] = found
                say(
                    f"{name}, turn {turn + 1}, {label}: "
                    + ", ".join(f"{k} {f['value']:g}" for k, f in figures.items())
                )
    return {
        label: {
            key: of_turns(
                each, shapes[key]["goal"], shapes[key]["unit"], higher=shapes[key]["higher_is_better"]
            )
            for key, each in own.items()
        }
        for label, own in values.items()
    }


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(TREE), *words], check=True, stdout=subprocess.DEVNULL)


# --- pages ----------------------------------------------------------------------------------------


def table(document: Document) -> str:
    """Machine and conditions in a line, then a row a figure."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cores = f"{machine.get('name', machine['processor'])}, {machine['processors']} processors"
    lines = [
        f"`{machine['command']}`: {cores}, {machine['system']}, load {machine['load']} at the start, {versions}; "
        f"commit {machine['commit']}, {machine['minutes']} minutes.",
        "",
        "| figure | goal | median | lowest to highest | turns | |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in document["figures"].items():
        sign = ">=" if found["higher_is_better"] else "<="
        spread = f"{found['low']:g} to {found['high']:g}" if found.get("turns", 1) > 1 else ""
        what = f"`{name}`: {found['what']}" if found.get("what") else f"`{name}`"
        missed = "" if reached(found) else "**not reached**"
        lines.append(
            f"| {what} | {sign} {found['goal']:g} | {found['value']:g} {found['unit']} | {spread} | "
            f"{found.get('turns', 1)} | {missed} |"
        )
    return "\n".join(lines)


def render(results: dict[str, Document]) -> None:
    """Write tables (``<!-- table NAME -->`` to ``<!-- end -->``) and figures (``<!-- NAME -->`` to ``<!-- -->``)."""
    figures = {name: found for document in results.values() for name, found in document["figures"].items()}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rendered(text, results, figures), encoding="utf-8")


def rendered(text: str, results: dict[str, Document], figures: dict[str, Figure]) -> str:
    """A page with the tables and figures that are known; what is not known stays as it is."""

    def whole(found: re.Match[str]) -> str:
        document = results.get(found["name"])
        return found[0] if document is None else f"{found['begin']}\n{table(document)}\n{found['end']}"

    def single(found: re.Match[str]) -> str:
        known = figures.get(found["name"])
        return found[0] if known is None else f"{found['begin']}{known['value']:.3g}{found['end']}"

    text = re.sub(
        r"(?P<begin><!-- table (?P<name>\w+) -->)\n.*?\n?(?P<end><!-- end -->)", whole, text, flags=re.DOTALL
    )
    return re.sub(r"(?P<begin><!-- (?P<name>\w+) -->)[^<\n]*(?P<end><!-- -->)", single, text)


# --- all ------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of the benchmarks to run."""
    if options.only:
        names = options.only.split(",")
        if unknown := [name for name in names if name not in BENCHMARKS]:
            parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
        return names
    if options.steps:
        return [name for name, each in BENCHMARKS.items() if each.turns]
    return [name for name, each in BENCHMARKS.items() if options.long or not each.long]


def main() -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="benchmarks, with commas: " + ", ".join(BENCHMARKS))
    parser.add_argument("--steps", action="store_true", help="the design's step figures, about 20 minutes")
    parser.add_argument("--long", action="store_true", help="also those that take very long, hours")
    parser.add_argument("--quick", action="store_true", help="smaller; writes nothing")
    parser.add_argument("--turns", type=int, help="of those that take turns")
    parser.add_argument("--against", metavar="COMMIT", help="beside this tree measure that one, in turns")
    parser.add_argument("--render", action="store_true", help="run nothing")
    options = parser.parse_args()
    names = chosen(options, parser)
    if options.against:
        steps = [name for name in names if BENCHMARKS[name].turns]
        return compare(options.against, steps, options.turns or 5, options.quick)
    results: dict[str, Document] = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    failed = []
    for name in [] if options.render else names:
        arguments = ("--quick",) if options.quick else ()
        turns = options.turns or (BENCHMARKS[name].turns if options.steps else 0)
        say(f"{name}: about {1 if options.quick else BENCHMARKS[name].minutes:g} minutes")
        try:
            document = run(name, (*arguments, *(("--turns", str(turns)) if turns else ())))
        except RuntimeError as error:
            say(f"error: {error}")
            failed.append(name)
            continue
        print(table(document) + "\n", flush=True)
        results[name] = document
        if not options.quick:
            STORE.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if not options.quick:
        render(results)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
