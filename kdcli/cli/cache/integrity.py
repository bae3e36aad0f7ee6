"""``kd cache``: verify, repair."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.console import console, size
from kdcli.errors import IdentityError, KdError

if TYPE_CHECKING:
    from kdcli.cache.damage import Audit
    from kdcli.extract.canary import Comparison
    from kdcli.extract.repair import RepairResult

Cache = Annotated[Path, typer.Argument(metavar="CACHE", help="Cache folder.")]
Data = Annotated[
    str | None, typer.Option("--data", metavar="SPEC", help="Where the images are now; default: as recorded.")
]


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""
    group.command("verify")(verify)
    group.command("repair")(repair)


def verify(
    cache: Cache,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="NAME[=SPEC]",
            help="Check only this teacher (found now at SPEC); repeatable.",
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Also run each teacher on 64 cached images and compare.")
    ] = False,
    data: Data = None,
    data_root: opt.DataRoot = None,
    device: opt.Device = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> int | None:
    """Check every byte of a cache against its records.

    Finds flipped bits, cut, lost and foreign files, and names array, block, view and rows; what is not
    written yet is said, and is no damage. Nothing is written. Exits with 22 when something is damaged, with
    --live also with 21 when a teacher does not say what is cached.

    \b
    Examples:
      kd cache verify food.kd
      kd cache verify food.kd --teacher resnet50 --live
    """
    from kdcli.cache.admin.audit import audit

    console.quiet = quiet
    names, specs = _split(teacher or ())
    found = audit(cache, names)
    compared: list[Comparison] = []
    try:
        found.require_ok()
        if live:
            from kdcli.extract.canary import require_close, run_canary
            from kdcli.extract.rerun import Sources

            compared = run_canary(cache, Sources(data, specs, data_root, device or "auto"), names)
            if not compared:
                console.note("nothing is written yet that could be compared")
            require_close(cache, compared)
    except KdError as error:
        if found.ok and not (isinstance(error, IdentityError) and compared):
            raise
        _say_audit(found, compared, json, error)
        console.error(error.message, error.hint)
        return error.exit_code
    _say_audit(found, compared, json, None)
    return None


def repair(
    cache: Cache,
    data: Data = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", metavar="NAME=SPEC", help="Where a teacher is now; repeatable."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Keep outputs that come out otherwise than recorded.")
    ] = False,
    data_root: opt.DataRoot = None,
    device: opt.Device = None,
    workers: opt.Workers = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> int | None:
    """Compute again what is damaged, and nothing else.

    Damaged blocks come out byte for byte as they were: images and teachers are opened from where the cache
    recorded them, checked to be the same, and run with the recorded settings. What comes out otherwise (other
    versions, another device) is left as it is and exits with 21, unless --accept. Metadata, keys and labels are
    written again, files that do not belong are removed. A damaged manifest or teacher record has to be restored.

    \b
    Examples:
      kd cache repair food.kd
      kd cache repair food.kd --data /new/place/food --teacher resnet50=local-dir:/new/resnet50
    """
    from kdcli.extract.repair import repair_cache
    from kdcli.extract.rerun import Sources
    from kdcli.extract.teachers import name_teachers

    console.quiet = quiet
    sources = Sources(data, name_teachers(teacher or ()), data_root, device or "auto", workers)
    done = repair_cache(cache, sources, accept)
    refusal = done.refusal
    if json:
        console.document(done.document())
    else:
        _say_repair(done)
    if refusal is None:
        return None
    console.error(refusal.message, refusal.hint)
    return refusal.exit_code


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names, and the specs of those that have one."""
    moved = [text for text in arguments if "=" in text]
    specs: dict[str, str] = {}
    if moved:
        from kdcli.extract.teachers import name_teachers

        specs = name_teachers(moved)
    return [*(text for text in arguments if "=" not in text), *specs], specs


def _say_audit(found: "Audit", compared: "Sequence[Comparison]", json: bool, error: KdError | None) -> None:
    if json:
        document: dict[str, Any] = found.document()
        if compared:
            document["live"] = [comparison.document() for comparison in compared]
        if error is not None:
            document["ok"] = False
            document |= error.document()
        console.document(document)
        return
    for gap in found.gaps:
        console.note(str(gap))
    if found.litter:
        console.note(f"{len(found.litter)} files of interrupted writers, no harm: kd cache gc {found.root}")
    if found.damages:
        console.table(["damaged", "file"], [[str(damage), damage.file] for damage in found.damages])
        return
    state = "complete" if not found.gaps else "incomplete"
    print(f"{found.root}: sound and {state}: {found.files} files, {size(found.bytes)} of arrays")
    if compared:
        print()
        rows = [
            [
                c.teacher,
                c.kind,
                c.view,
                c.rows,
                f"{c.difference:.3g}",
                f"{c.relative:.2g}",
                f"{c.tolerance:g}",
            ]
            for c in compared
        ]
        header = ["teacher", "kind", "view", "rows", "largest difference", "of the row", "allowed"]
        console.table(header, rows)


def _say_repair(done: "RepairResult") -> None:
    if not done.found:
        print(f"{done.root}: nothing is damaged")
        return
    left = {damage.file for damage in done.left}
    rows = [["left" if damage.file in left else "repaired", str(damage)] for damage in done.found]
    console.table(["", "damage"], rows)
