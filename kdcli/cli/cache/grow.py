"""``kd cache extend``."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, size

if TYPE_CHECKING:
    from kdcli.cache.admin.config import ExtendConfig
    from kdcli.options.common import Common


def extend(config: "ExtendConfig", common: "Common") -> None:
    """Make room in a cache for more images or views.

    Nothing that is there is computed or written again; kd cache-teachers then fills in what is new. Students
    that are running, or stopped half-way, are not disturbed. Another teacher, or another kind of output,
    needs no extend: kd cache-teachers adds it.

    \b
    Examples:
      kd cache extend train.kd --views eval+train:16
      kd cache extend train.kd new-photos/
    """
    from kdcli.verbs.caches import cache_extend

    result = cache_extend(config)
    if not result.is_new:
        console.note(f"{config.cache} holds all of this: nothing to add")
    show(result, common)
    if result.is_new and result.fill is not None and not common.as_json:
        console.finished(f"{config.cache} has room for {size(result.bytes)} more", result.fill)
