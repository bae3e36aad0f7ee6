"""``kd cache extend``."""

from typing import TYPE_CHECKING

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
    from kdcli.data.sources import open_data
    from kdcli.extract.extend import extend_cache

    images = None
    if config.data is not None:
        images = open_data(
            config.data, data_root=config.data_root, download=config.download, exif=config.exif
        )
    result = extend_cache(config.cache, images, config.views, config.dry_run)
    if not result.is_new:
        console.note(f"{config.cache} holds all of this: nothing to add")
    if common.as_json:
        console.document(result.document())
        return
    console.table(
        ["", "before", "after"],
        [
            ["images", *result.images],
            ["views", *result.views],
            ["teachers' bytes", "", f"+{size(result.bytes)}"],
        ],
    )
    if result.is_new and result.fill is not None:
        console.finished(f"{config.cache} has room for {size(result.bytes)} more", result.fill)
