"""``kd audit``: near-duplicates across data sets."""

import csv
import sys
from shlex import quote
from typing import TYPE_CHECKING

from kdcli.console import console, counted, inert
from kdcli.errors import IdentityError

if TYPE_CHECKING:
    from kdcli.auditing.config import AuditConfig
    from kdcli.auditing.result import AuditResult
    from kdcli.options.common import Common


def audit(config: "AuditConfig", common: "Common") -> int | None:
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
    from kdcli.auditing.audit import audit as step

    result = step(config, None if common.as_json else _print)
    if common.as_json:
        console.document(result.document())
    _summarise(result)
    if result.found and not common.as_json:
        console.finished(f"{counted(result.found, 'pairs')} found", _next(config))
    return IdentityError.exit_code if config.fail and result.found else None


def _print(result: "AuditResult") -> None:
    (table,) = result.tables()
    writer = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(
        (distance, pixels, inert(str(a)), inert(str(b))) for distance, pixels, a, b in table.rows
    )
    sys.stdout.flush()


def _next(config: "AuditConfig") -> str:
    """The command that leaves the duplicates out."""
    from kdcli.data.spec import with_modifier
    from kdcli.options.resolving import command_line

    if config.write_exclude is None:
        return f"{command_line(config)} --write-exclude seen.txt"
    rest = quote(with_modifier(config.data, f"without={config.write_exclude}"))
    return f"kd cache-teachers {rest} --cache CACHE --teacher SPEC"


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
