"""``kd audit``: near-duplicates across data sets."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import configure, split_flags
from kdcli.console import console
from kdcli.errors import IdentityError

if TYPE_CHECKING:
    from kdcli.auditing import AuditResult


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("audit")(audit)


def audit(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA_A", help="Data set; a bare path is a folder."),
    ] = None,
    other: Annotated[
        str | None,
        typer.Argument(metavar="DATA_B", help="Data set to look for them in; default: DATA_A itself."),
    ] = None,
    distance: Annotated[
        int | None,
        typer.Option(
            "--distance", help="Bits that may differ (default 32 of 256, 4 of 64); 0: equal hashes only."
        ),
    ] = None,
    hash_bits: Annotated[
        int | None,
        typer.Option("--hash-bits", help="256 (default), or 64, imagehash's own default."),
    ] = None,
    max_pairs: Annotated[
        int | None,
        typer.Option(
            "--max-pairs", help="List all pairs up to so many, else each image's nearest (default 1000000)."
        ),
    ] = None,
    write_exclude: Annotated[
        Path | None,
        typer.Option(
            "--write-exclude",
            metavar="FILE",
            help="New file for the keys of DATA_A's duplicates; DATA_A@without=FILE leaves them out.",
        ),
    ] = None,
    fail: Annotated[bool | None, typer.Option("--fail", help="Exit with 21 if there is a pair.")] = None,
    workers: opt.Workers = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int | None:
    """Find near-duplicate images across data sets.

    Compares perceptual hashes (imagehash's phash, as P1 did between its data sets). Prints the pairs as TSV: distance
    in bits, whether the pixels are equal, and the keys of both; the counts go to stderr. Exits with 0 whatever is
    found, unless --fail.

    \b
    Examples:
      kd audit photos@split=train photos@split=test --write-exclude seen.txt
      kd audit photos@split=train,without=seen.txt photos@split=test --fail
      kd audit proxy/ food/ --json
      kd audit photos/
    """
    flags, common = split_flags(dict(locals()))
    from kdcli.auditing.config import AuditConfig

    settings = configure(AuditConfig, flags, common)
    from kdcli.auditing import audit as run

    result = run(settings)
    if json:
        console.document(result.document())
    else:
        _print(result)
    _summarise(result)
    return IdentityError.exit_code if settings.fail and result.found else None


def _print(result: "AuditResult") -> None:
    writer = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")  # quotes keys with tabs or newlines
    writer.writerow(["distance", "pixels", "a", "b"])
    writer.writerows(
        (distance, "equal" if identical else "differ", a, b) for distance, identical, a, b in result.rows()
    )
    sys.stdout.flush()


def _summarise(result: "AuditResult") -> None:
    """Counts, on stderr."""
    for side, others in ((result.a, result.b), (result.b, result.a))[: 1 if result.within else 2]:
        where = "elsewhere in it" if result.within else f"in {others.spec}"
        console.note(
            f"{side.near} of {len(side.keys)} images of {side.spec} have a near-duplicate {where}, "
            f"{side.identical} of them with equal pixels"
        )
    listed = len(result.pairs)
    rest = "" if listed == result.found else f"; only the nearest one of each image is listed ({listed})"
    console.note(f"{result.found} pairs within {result.distance} of {result.bits} bits{rest}")
    if result.same:
        console.note(f"{result.same} images are the same samples in both, which are no pairs")
