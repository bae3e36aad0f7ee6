"""What every benchmark shares: its options, its figures, the machine, and how all of it is printed."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
"""``value``, ``goal``, ``higher_is_better``, ``unit``, ``what``; of several turns ``low``, ``high`` and ``turns``."""
Figures = dict[str, Figure]


def figure(value: float, goal: float, unit: str, what: str = "", *, higher: bool = True) -> Figure:
    """A figure that was measured once."""
    return {
        "value": float(f"{value:.4g}"),
        "goal": goal,
        "higher_is_better": higher,
        "unit": unit,
        "what": what,
    }


def of_turns(
    values: Sequence[float], goal: float, unit: str, what: str = "", *, higher: bool = True
) -> Figure:
    """The median of what the turns of one run gave, lowest and highest beside it."""
    found = figure(statistics.median(values), goal, unit, what, higher=higher)
    spread = {name: float(f"{pick(values):.4g}") for name, pick in (("low", min), ("high", max))}
    return {**found, **spread, "turns": len(values)}


def reached(found: Figure) -> bool:
    """Whether a figure reaches its goal."""
    return bool(
        found["value"] >= found["goal"] if found["higher_is_better"] else found["value"] <= found["goal"]
    )


def say(text: str) -> None:
    """Narrate on stderr."""
    print(text, file=sys.stderr, flush=True)


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Where and under which conditions figures came to be."""
    return {
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "versions": {
            "Python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }


def processor() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that kdcli is imported from, marked where its tree was changed since."""
    import kdcli

    tree = Path(kdcli.__file__).parents[1]
    git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def parser_of(text: str) -> argparse.ArgumentParser:
    """The options of every benchmark; ``text`` is its docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, under 50 seconds")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--turns", type=int, help="how often each is measured; default: the benchmark's own number"
    )
    return parser


def benchmark(
    text: str,
    measure: Callable[[argparse.Namespace], Figures],
    packages: Sequence[str] = (),
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """The main function of a benchmark: measure, and print."""
    options = (parser or parser_of(text)).parse_args()
    place = machine(packages)  # before: the load is not to be its own
    tell({"figures": measure(options), "machine": place}, options.json)


def tell(document: dict[str, Any], as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps(document), flush=True)
        return
    print(", ".join(f"{key} {value}" for key, value in document["machine"].items()))
    for name, found in document["figures"].items():
        mark = "" if reached(found) else "  NOT REACHED"
        spread = f" ({found['low']:g} to {found['high']:g})" if "low" in found else ""
        sign = ">=" if found["higher_is_better"] else "<="
        print(f"{name:34} {found['value']:9.4g}{spread} {found['unit']}, goal {sign} {found['goal']:g}{mark}")
