"""``kd train-student --sweep``: several students at once; and what a lone one shares with them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.training.config import StudentConfig
    from kdcli.types import Ranking


def train_sweep(flags: Mapping[str, Any], common: Mapping[str, Any], file: Path) -> None:
    """Train the students of a sweep file and print the leaderboard.

    Args:
        flags: options of the command line.
        common: options that all commands have.
        file: of ``--sweep``.

    Raises:
        DivergedError: after the table, where a student was given up.
        KdError: what is refused, and what went wrong.
    """
    from kdcli.training.sweep_file import resolve_sweep

    console.quiet, console.verbose = bool(common.get("quiet")), bool(common.get("verbose"))
    out, configs = resolve_sweep(flags, common.get("sets") or (), common.get("config"), file)
    if common.get("print_config"):
        import yaml

        students = {name: config.model_dump(mode="json") for name, config in configs.items()}
        print(yaml.safe_dump(students, sort_keys=False, allow_unicode=True), end="")
        raise typer.Exit
    rankings = _read_rankings(configs)
    from kdcli.training.sweep import train_sweep as step

    result = step(out, configs, rankings)
    failure = result.failure()
    if common.get("json"):
        if failure is None:
            console.document(result.document())
    else:
        rows = [
            [
                name,
                student.method,
                student.details["student"],
                fraction((student.test or {}).get("top1")),
                fraction((student.test or {}).get("top5")),
                f"{student.seconds:.1f}",
                student.out,
            ]
            for name, student in result.students.items()
        ]
        rows += [
            [
                name,
                configs[name].method,
                configs[name].student,
                "diverged",
                "-",
                "-",
                str(configs[name].out.absolute()),
            ]
            for name in result.diverged
        ]
        console.table(["name", "method", "student", "top1", "top5", "seconds", "out"], rows)
    if failure is not None:
        raise failure


def fraction(value: float | None) -> str:
    """A share as a table shows it."""
    return "-" if value is None else f"{value:.4f}"


def _read_rankings(configs: "Mapping[str, StudentConfig]") -> "dict[str, Ranking | None]":
    """The ranking of each student, read once however many name it: standard input can be read only once."""
    known: dict[str | None, Ranking | None] = {None: None}
    for config in configs.values():
        if config.ranking not in known:
            known[config.ranking] = read_ranking(config)
    return {name: known[config.ranking] for name, config in configs.items()}


def read_ranking(settings: "StudentConfig") -> "Ranking | None":
    """The ranking in a file or, for ``-``, on standard input."""
    source = settings.ranking
    if source is None:
        return None
    from kdcli.errors import NotFoundError
    from kdcli.files import storage_errors
    from kdcli.ranking import parse_ranking

    if source == "-":
        return parse_ranking(sys.stdin.read())
    path = Path(source)
    if not path.is_file():
        caches = " ".join(f"--cache {quote(str(cache))}" for cache in settings.cache) or "--cache CACHE"
        raise NotFoundError(
            f"--ranking {path} is {'a folder' if path.is_dir() else 'not there'}",
            f"kd rank-sources {caches} --json > {'ranking.json' if path.is_dir() else quote(str(path))}",
        )
    with storage_errors(path):
        return parse_ranking(path.read_text(encoding="utf-8"))
