"""``python -m lab.realworld --out DIR``: the papers' claims, and kd's own, on real images, or on rendered clips."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcli.console import console
from kdcli.errors import KdError, UsageError
from kdcli.files import atomic_write_text
from lab.places import Places
from lab.realworld.claims import Values, judge, read_claims
from lab.realworld.pages import Words, claims_page, draw, results_page
from lab.realworld.study import COLLECTIONS, IMAGES, Collection, room_of
from lab.running import Runner, chosen
from lab.settings import RECIPES, given_settings, read_settings
from lab.steps import Lab, Step

DOCS = RECIPES.parent / "docs"


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; gives the exit code, kd's own where a step ends with one."""
    arguments = _parser().parse_args(words)
    try:
        return _do(arguments)
    except KdError as error:
        console.error(error.message, str(error.hint))
        return error.exit_code


def _do(arguments: argparse.Namespace) -> int:
    studies = COLLECTIONS[arguments.studies]
    if arguments.claims:
        atomic_write_text(DOCS / f"{studies.page}-claims.md", the_claims_page(studies))
        return 0
    if arguments.out is None:
        raise UsageError("--out is missing", "Name the folder of all that is made: --out DIR.")
    settings = read_settings(
        studies.folder / "recipe.yaml",
        tiny=arguments.tiny,
        full=arguments.full,
        given=given_settings(arguments.set),
    )
    lab = Lab(settings, Places({}), arguments.out.absolute())
    room = room_of(lab, tiny=arguments.tiny)
    missing = studies.prepare(room, arguments.packages or lab.out)
    for kind, what in missing.items():
        print(f"note: no {kind}, and nothing that needs them: {what}", file=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    steps = without(studies.steps(room), missing)
    steps = chosen(steps, arguments.only)
    runner = Runner(lab, {"device": arguments.device, "workers": settings["workers"]}, arguments.jobs)
    if arguments.dry_run:
        return runner.check(steps)
    start = time.monotonic()
    if not arguments.page and (code := runner.run(steps)):
        return code
    with lab.reading():
        values = studies.values(room)
    verdicts = judge(read_claims(studies.folder / "claims.yaml"), values)
    told = _told(arguments, missing, time.monotonic() - start)
    if stale := runner.stale(steps):
        told.append(f"Of other settings, and not run again since: {', '.join(stale)}.")
    if left := sum(not runner.finished(step) for step in steps):
        told.append(f"Not all has run: {len(steps) - left} of {len(steps)} steps are finished.")
    head = (studies.folder / "results.md").read_text()
    page = results_page(Words(head, studies.titles, studies.page), verdicts, values, told)
    into = arguments.docs or lab.out
    draw(verdicts, into / studies.page)
    atomic_write_text(into / f"{studies.page}.md", page)
    atomic_write_text(lab.out / "values.json", json.dumps(_document(values), indent=1))
    print(page)
    return 0


def the_claims_page(studies: Collection) -> str:
    """What a page such as docs/results-claims.md has to be."""
    settings = {
        "core": read_settings(studies.folder / "recipe.yaml"),
        "full": read_settings(studies.folder / "recipe.yaml", full=True),
    }
    words = Words((studies.folder / "claims.md").read_text(), studies.titles)
    return claims_page(words, read_claims(studies.folder / "claims.yaml"), settings)


def without(steps: Sequence[Step], missing: dict[str, str]) -> list[Step]:
    """Steps whose images, and those of all that they need, are there."""
    gone: set[str] = set()
    for step in steps:
        if set(step.data) & missing.keys() or gone & set(step.needs):
            gone.add(step.name)
    return [step for step in steps if step.name not in gone]


def _document(values: dict[str, Values]) -> dict[str, Any]:
    return {
        paper: {f"{row} / {column}": by_seed for (row, column), by_seed in own.items()}
        for paper, own in values.items()
    }


def _told(arguments: argparse.Namespace, missing: dict[str, str], seconds: float) -> list[str]:
    form = "tiny" if arguments.tiny else "full" if arguments.full else "core"
    lines = [
        f"Form: {form}; {seconds / 60:.0f} minutes of this call, {arguments.jobs} steps at a time "
        "(steps that were finished before are not in it).",
        f"Machine: {os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
    ]
    return lines + [f"Left out: what needs {kind} ({what})." for kind, what in missing.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description="Measure what is claimed: every finished step is left alone.",
        allow_abbrev=False,
    )
    parser.add_argument(  # run.sh gives it
        "--studies", choices=COLLECTIONS, default=IMAGES.name, help=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, help="folder of all that is made")
    parser.add_argument(
        "--full", action="store_true", help="more seeds, images and epochs: for a night, or a GPU"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="drawn images (clips) and a network of a few layers, in minutes"
    )
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="folder of node_modules (default: --out)"
    )
    parser.add_argument("--docs", type=Path, metavar="DIR", help="where the page goes (default: --out)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="steps at a time (default 2)")
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
    what.add_argument("--page", action="store_true", help="only write the page of what has run")
    what.add_argument("--claims", action="store_true", help="only write the page of claims in docs/")
    parser.add_argument("--device", help="of kd")
    return parser


if __name__ == "__main__":
    sys.exit(main())
