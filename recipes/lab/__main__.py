"""``python -m lab p2 --out DIR``: run a paper's recipe, or look at it."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

try:
    from kdcli.console import console
    from kdcli.errors import DivergedError, KdError, UsageError, nearest
except ImportError:
    print(f"error: kd is not installed for {sys.executable}", file=sys.stderr)
    print(
        "hint: pip install kdcli, or name another Python: PYTHON=/path/to/python run.sh ...", file=sys.stderr
    )
    sys.exit(13)

from kdcli.reading import short_reason
from lab import p1, p2, p3, p4
from lab.costs import costs, show_costs
from lab.made import Made, made_of, read_made, write_made
from lab.places import places_of, read_places
from lab.running import TAKES, Runner, chosen
from lab.settings import RECIPES, given_settings, pairs, read_settings
from lab.steps import Lab
from lab.tables import Printed, cells, read_printed, require_table, text_rows

PAPERS = {"p1": p1, "p2": p2, "p3": p3, "p4": p4, "p4-video": p4}
"""A paper's module has ``steps(lab)``, ``measured(lab)`` and ``networks(settings)``."""


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; gives the exit code, kd's own where a step ends with one."""
    words = sys.argv[1:] if words is None else words
    try:
        return _do(_parser().parse_args(words))
    except KdError as error:
        console.error(error.message, str(error.hint))
        if "--json" in words:
            console.document(error.document())
        return error.exit_code
    except KeyboardInterrupt:  # kd says so
        return 130


def _do(arguments: argparse.Namespace) -> int:
    paper = PAPERS[arguments.paper]
    tables = read_printed(RECIPES / arguments.paper / "printed.yaml")
    if arguments.table:
        names = list(tables) if arguments.table == "all" else [require_table(tables, arguments.table).name]
        return _tell(arguments, [tables[name] for name in names])
    lab = _lab(arguments)
    drawn = replace(lab, places=lab.places.stand_ins())
    try:
        every = paper.steps(drawn)
    except (LookupError, TypeError, ValueError) as refusal:  # the recipe's own settings go together
        if isinstance(refusal, KdError) or not arguments.set:
            raise
        raise UsageError(
            f"no recipe can be made of these settings: {short_reason(refusal)}",
            f"recipes/{arguments.paper}/recipe.yaml has values that go together.",
        ) from refusal
    steps = chosen(every, arguments.only)
    if arguments.cost:
        show_costs(costs(drawn, steps), drawn, arguments.json)
        return 0
    if arguments.stand_ins:
        lab = drawn
    for line in lab.places.look(name for step in steps for name in step.data):
        print(f"note: {line}", file=sys.stderr)
    steps = chosen(paper.steps(lab), arguments.only)
    runner = Runner(lab, {"workers": lab.settings["workers"], **_passed(arguments)})
    if arguments.dry_run:
        return runner.check(steps, arguments.json)
    images = "--tiny" if arguments.tiny else "--stand-ins" if arguments.stand_ins else ""
    write_made(lab.out, made_of(lab, arguments.paper, images))
    code = runner.run(steps)
    if code in (0, DivergedError.exit_code):
        _tell(arguments, list(tables.values()))
    return code


def _lab(arguments: argparse.Namespace, made: Made | None = None) -> Lab:
    """Settings and places as the user says, and where the user does not, as the folder was made."""
    file = RECIPES / arguments.paper / "recipe.yaml"
    data, models = read_places(arguments.data_file) if arguments.data_file else ({}, {})
    data |= pairs("--data", arguments.data)
    models |= pairs("--model", arguments.model)
    given = given_settings(arguments.set)
    if of_data := [name for name in given if name.startswith("data.")]:
        raise UsageError(
            f"--set {of_data[0]} would leave out what else the recipe says of the data set",
            f"--data {of_data[0].removeprefix('data.')}=SOURCE, or its fields in --data-file.",
        )
    settings = read_settings(file, tiny=arguments.tiny, given=given)
    if made is not None:
        settings = read_settings(file, given=made.known(settings) | given)
        data, models = {**made.data, **data}, {**made.models, **models}
    if unknown := models.keys() - (known := PAPERS[arguments.paper].networks(settings)):
        raise UsageError(
            f"the recipe has no network '{min(unknown)}'.{nearest(min(unknown), known)}",
            f"--model takes {', '.join(known[:5])}{', ...' if known[5:] else ''}.",
        )
    places = places_of(settings, data)
    places = replace(places, models=models, root=arguments.data_root, download=arguments.download)
    return Lab(settings, places, arguments.out.absolute())


def _tell(arguments: argparse.Namespace, tables: Sequence[Printed]) -> int:
    """Print tables of what has run in the folder, and what its reader has to know of how it was made."""
    paper, made = PAPERS[arguments.paper], read_made(arguments.out)
    if made is not None and made.paper != arguments.paper:
        raise UsageError(
            f"{arguments.out} holds a run of {made.paper}", f"recipes/{made.paper}/run.sh has its tables."
        )
    lab = _lab(arguments, made)
    lab = replace(lab, places=lab.places.stand_ins(missing=True))
    with lab.reading():
        measured = paper.measured(lab)
    notes = [] if made is None else made.notes(lab.settings)
    if made is not None and (stale := Runner(lab, {}).stale(paper.steps(lab))):
        notes.append(f"of other settings or data, and not run again since: {', '.join(stale)}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not arguments.table:
        tables = [table for table in tables if measured.get(table.name)]
    if arguments.json:
        found = [cell for table in tables for cell in cells(table, measured)]
        console.document({"cells": found, "notes": notes})
        return 0
    for table in tables:
        print(f"{table.name}: {table.title} ({table.place}): measured (printed, difference)")
        console.table(*text_rows(table, measured))
        print()
    return 0


def _passed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is kd's own."""
    given = {name: getattr(arguments, name) for name in dict.fromkeys(sum(TAKES.values(), ()))}
    return {name: value for name, value in given.items() if value not in (None, False)}


class _Parser(argparse.ArgumentParser):
    """Refuses as kd does."""

    def error(self, message: str) -> NoReturn:
        """In two lines."""
        raise UsageError(message, "run.sh --help explains every option.")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it names no folder")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run.sh",
        description="Run a paper's recipe: every finished step is left alone.",
        allow_abbrev=False,
    )
    parser.add_argument("paper", choices=PAPERS, help=argparse.SUPPRESS)  # run.sh gives it
    parser.add_argument("--out", type=_folder, required=True, help="folder of all that is made")
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


def _entry() -> int:
    """As kd: a reader that went away is no mistake (``| head``)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141
    return code


if __name__ == "__main__":
    sys.exit(_entry())
