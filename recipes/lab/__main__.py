"""``python -m lab p2 --out DIR``: run a paper's recipe, or look at it."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    from kdcli.console import console
    from kdcli.errors import DivergedError, KdError, UsageError, nearest
except ImportError:
    print(f"error: kd is not installed for {sys.executable}", file=sys.stderr)
    print(
        "hint: pip install kdcli, or name another Python: PYTHON=/path/to/python run.sh ...", file=sys.stderr
    )
    sys.exit(13)

import yaml

from lab import p1, p2, p3, p4
from lab.costs import costs, show_costs
from lab.places import places_of, read_places
from lab.running import TAKES, Runner, chosen
from lab.settings import RECIPES, read_settings
from lab.steps import Lab
from lab.tables import Measured, Printed, cells, read_printed, require_table, text_rows

PAPERS = {"p1": p1, "p2": p2, "p3": p3, "p4": p4}
"""A paper's module has ``steps(lab)``, ``measured(lab)`` and ``networks(settings)``."""
_KNOWN = "The paper's module names those that --model may replace."


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; gives the exit code, kd's own where a step ends with one."""
    arguments = _parser().parse_args(words)
    try:
        return _do(arguments)
    except KdError as error:
        console.error(error.message, str(error.hint))
        return error.exit_code


def _do(arguments: argparse.Namespace) -> int:
    paper, folder = PAPERS[arguments.paper], RECIPES / arguments.paper
    data, models = read_places(arguments.data_file) if arguments.data_file else ({}, {})
    data |= _pairs("--data", arguments.data)
    models |= _pairs("--model", arguments.model)
    given = {name: yaml.safe_load(text) for name, text in _pairs("--set", arguments.set).items()}
    settings = read_settings(folder / "recipe.yaml", tiny=arguments.tiny, given=given)
    if unknown := models.keys() - (known := paper.networks(settings)):
        raise UsageError(f"the recipe has no network '{min(unknown)}'.{nearest(min(unknown), known)}", _KNOWN)
    places = replace(
        places_of(settings, data), models=models, root=arguments.data_root, download=arguments.download
    )
    lab = Lab(settings, places, arguments.out.absolute())
    drawn = replace(lab, places=lab.places.stand_ins())
    tables = read_printed(folder / "printed.yaml")
    names = (
        list(tables) if arguments.table in (None, "all") else [require_table(tables, arguments.table).name]
    )
    if arguments.table:
        return _show([tables[name] for name in names], paper.measured(drawn), arguments.json)
    steps = chosen(paper.steps(drawn), arguments.only)
    if arguments.cost:
        show_costs(costs(drawn, steps), drawn, arguments.json)
        return 0
    if arguments.stand_ins:
        lab = drawn
    for line in lab.places.look(name for step in steps for name in step.data):
        print(f"note: {line}", file=sys.stderr)
    steps = chosen(paper.steps(lab), arguments.only)
    runner = Runner(lab, {"workers": settings["workers"], **_passed(arguments)})
    if arguments.dry_run:
        return runner.check(steps)
    code = runner.run(steps)
    if code in (0, DivergedError.exit_code):
        measured = paper.measured(lab)
        _show([table for name, table in tables.items() if measured.get(name)], measured, arguments.json)
    return code


def _show(tables: Sequence[Printed], measured: Measured, as_json: bool) -> int:
    if as_json:
        console.document({"cells": [cell for table in tables for cell in cells(table, measured)]})
        return 0
    for table in tables:
        print(f"{table.name}: {table.title} ({table.place}): measured (printed, difference)")
        console.table(*text_rows(table, measured))
        print()
    return 0


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    found = dict(text.partition("=")[::2] for text in texts)
    if bad := [text for text in texts if "=" not in text]:
        raise UsageError(f"{option} {bad[0]} has no '='", f"Say {option} NAME=VALUE.")
    return found


def _passed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is kd's own."""
    given = {name: getattr(arguments, name) for name in dict.fromkeys(sum(TAKES.values(), ()))}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description="Run a paper's recipe: every finished step is left alone.",
        allow_abbrev=False,
    )
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--tiny", action="store_true", help="the recipe's tiny: values, on drawn images")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=SOURCE", help="where a data set is"
    )
    parser.add_argument(
        "--data-file", type=Path, metavar="FILE", help="data.yaml: several of these, and models"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=SPEC", help="a network that is there"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another value for a setting"
    )
    parser.add_argument(
        "--only", action="append", metavar="STEP", help="these steps (a pattern) and what they need"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the commands, let kd check them, run nothing"
    )
    what.add_argument(
        "--table", metavar="NAME", help="print measured beside printed values: P2-1, ..., or all"
    )
    what.add_argument("--cost", action="store_true", help="print what it takes: GPU hours, bytes of caches")
    parser.add_argument("--stand-ins", action="store_true", help="drawn images in place of all data sets")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    kd = parser.add_argument_group("passed on to kd")
    kd.add_argument("--data-root", type=Path, help="folder of torch/ and hfds/ data sets")
    kd.add_argument("--download", action="store_true", help="allow data sets to be downloaded")
    kd.add_argument("--overwrite", action="store_true", help="train anew what other settings trained before")
    kd.add_argument("--engine", choices=("local", "submitit", "ray"), help="who runs caches and sweeps")
    for name in ("num-workers", "cpus-per-worker", "gpus-per-worker", "workers"):
        kd.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("address", "device", "amp"):
        kd.add_argument(f"--{name}")
    kd.add_argument("--slurm", action="append", metavar="KEY=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
