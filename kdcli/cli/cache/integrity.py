"""``kd cache``: verify, repair."""

from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING, Any

from kdcli.console import console, counted, size
from kdcli.errors import IdentityError, KdError

if TYPE_CHECKING:
    from kdcli.cache.admin.config import RepairConfig, VerifyConfig
    from kdcli.cache.damage import Audit
    from kdcli.extract.canary import Comparison
    from kdcli.extract.repair import RepairResult
    from kdcli.options.common import Common


def verify(config: "VerifyConfig", common: "Common") -> int | None:
    """Check every byte of a cache against its records.

    Finds flipped bits, cut, lost and foreign files, and names array, block, view and rows; what is not
    written yet is said, and is no damage. Nothing is written. Exits with 22 when something is damaged, with
    --live also with 21 when a teacher gives other outputs than those cached.

    \b
    Examples:
      kd cache verify food.kd
      kd cache verify food.kd --teacher resnet50 --live
    """
    from kdcli.cache.admin.audit import audit
    from kdcli.cache.stores.mirror import mirrored

    names, specs = _split(config.teacher)
    root = mirrored(config.cache)
    found = audit(root, names)
    compared: list[Comparison] = []
    try:
        found.require_ok()
        if config.live:
            from kdcli.extract.canary import require_close, run_canary
            from kdcli.extract.rerun import Sources

            sources = Sources(config.data, specs, config.data_root, config.device)
            compared = run_canary(root, sources, names)
            if not compared:
                console.note("nothing is written yet that could be compared")
            require_close(root, compared)
    except KdError as error:
        if found.ok and not (isinstance(error, IdentityError) and compared):
            raise
        _say_audit(found, compared, common.as_json, error)
        console.error(error.message, error.hint)
        return error.exit_code
    _say_audit(found, compared, common.as_json, None)
    return None


def repair(config: "RepairConfig", common: "Common") -> int | None:
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
    from kdcli.verbs.caches import cache_repair

    done = cache_repair(config)
    refusal = done.refusal
    if common.as_json:
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
    console.say(f"{found.root}: sound and {state}: {found.files} files, {size(found.bytes)} of arrays")
    if compared:
        console.say()
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
    cache = quote(str(found.root))
    then = f"kd cache info {cache}" if found.gaps else f"kd rank-sources --cache {cache}"
    console.finished(f"{found.files} files were read", then)


def _say_repair(done: "RepairResult") -> None:
    if not done.found:
        console.say(f"{done.root}: nothing is damaged")
        return
    left = {damage.file for damage in done.left}
    rows = [["left" if damage.file in left else "repaired", str(damage)] for damage in done.found]
    console.table(["", "damage"], rows)
    if not left:
        console.finished(
            f"{counted(len(rows), 'damages')} repaired", f"kd cache verify {quote(str(done.root))}"
        )
