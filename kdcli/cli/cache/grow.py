"""``kd cache``: plan, extend."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli.teachers import plan
from kdcli.console import console, size


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""
    group.command("plan")(plan)
    group.command("extend")(extend)


def extend(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Cache folder.")],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]", help="Data set whose images are added: the new ones, or all of them."
        ),
    ] = None,
    views: Annotated[
        str | None, typer.Option("--views", help="eval+train:K: all views that the cache is to hold.")
    ] = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be added; write nothing.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Make room in a cache for more images or views.

    Nothing that is there is computed or written again; kd cache-teachers then fills in what is new. Students
    that are running, or stopped half-way, are not disturbed. Another teacher, or another kind of output,
    needs no extend: kd cache-teachers adds it.

    \b
    Examples:
      kd cache extend train.kd --views eval+train:16
      kd cache extend train.kd new-photos/
    """
    from kdcli.extract.extend import extend_cache

    images = None
    if data is not None:
        from kdcli.data.sources import open_data

        images = open_data(data, data_root=data_root, download=bool(download))
    result = extend_cache(cache, images, views, dry_run)
    if not result.is_new:
        console.note(f"{cache} holds all of this: nothing to add")
    elif result.fill is not None:
        console.note(f"fill it in: {result.fill}")
    if json:
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
