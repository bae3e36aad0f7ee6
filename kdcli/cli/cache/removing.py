"""``kd cache``: gc, rm."""

import sys
from shlex import quote
from typing import TYPE_CHECKING

from kdcli.console import console, shown, size
from kdcli.errors import UsageError

if TYPE_CHECKING:
    from kdcli.cache.admin.config import GcConfig, RmConfig
    from kdcli.cache.admin.remove import Removal
    from kdcli.options.common import Common

# --- gc --------------------------------------------------------------------------------------------


def gc(config: "GcConfig", common: "Common") -> None:
    """Remove what dead writers left behind.

    Unpublished files and claims of processes that are no more; nothing that is committed.

    \b
    Examples:
      kd cache gc train.kd --dry-run
      kd cache gc caches/*.kd
    """
    from kdcli.verbs.caches import cache_gc

    found = cache_gc(config)
    if common.as_json:
        console.document(found.document())
        return
    header = [
        "path",
        "would remove" if config.dry_run else "removed",
        "would free" if config.dry_run else "freed",
    ]
    console.table(header, [[one["path"], one["files"], size(one["bytes"])] for one in found.entries])
    paths = " ".join(quote(str(one["path"])) for one in found.entries)
    freed = size(sum(one["bytes"] for one in found.entries))
    if config.dry_run:
        console.finished(f"{freed} would be free", f"kd cache gc {paths}")
    else:
        console.finished(f"{freed} freed", f"kd cache info {quote(str(found.entries[0]['path']))}")


# --- rm --------------------------------------------------------------------------------------------


def rm(config: "RmConfig", common: "Common") -> None:
    """Remove a cache, or a teacher in it.

    Asks first; without a terminal it needs --yes. Records go before data, so that a kill in between leaves
    nothing that reads as complete: give the same command again. Without logits and top-k their statistics stay
    until they are removed by name (--teacher NAME/stats).

    \b
    Examples:
      kd cache rm old.kd
      kd cache rm train.kd --teacher resnet50 --yes
      kd cache rm train.kd --teacher resnet50/maps.layer3 --yes
    """
    from kdcli.cache.admin.remove import remove
    from kdcli.verbs.caches import removal

    cache, plan = config.cache, removal(config)
    if not config.yes:
        _ask(plan)
    done = remove(plan, config.force)
    if done.kept:
        console.warn(f"{cache} stays: kd did not make {', '.join(done.kept)}")
    if common.as_json:
        console.document(done.document())
        return
    what = ", ".join(done.parts) or "all"
    console.table(["path", "removed", "files", "freed"], [[cache, what, done.files, size(done.bytes)]])
    left = f"kd cache info {quote(str(cache))}" if done.parts else "kd cache ls"
    console.finished(f"{size(done.bytes)} freed", left)


def _ask(plan: "Removal") -> None:
    """Go on only after a typed yes.

    Raises:
        UsageError: there is no terminal to ask on, or the answer is another.
    """
    what = f"{', '.join(plan.parts)} of {plan.root}" if plan.parts else f"all of {plan.root}"
    facts = f"{plan.files} files, {size(plan.bytes)}"
    if not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(f"nobody is there to confirm removing {what} ({facts})", "Add --yes to remove it.")
    print(f"Remove {shown(what)} ({shown(facts)})? Type yes: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UsageError("nothing was removed: the answer was not yes", "Type yes, or give --yes.")
