"""``kd cache``: pack, unpack, merge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.console import console
from kdcli.errors import UsageError

if TYPE_CHECKING:
    from kdcli.cache.admin.moving import Moved

NewCache = Annotated[Path, typer.Option("--to", metavar="CACHE", help="Folder of the new cache.")]


def register(group: typer.Typer) -> None:
    """Add the commands to ``group``."""
    group.command("pack")(pack)
    group.command("unpack")(unpack)
    group.command("merge")(merge)


def pack(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="Cache folder.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="What to write: .h5, .zarr or .zarr.zip.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", metavar="NAME", help="Take only this teacher along; repeatable."),
    ] = None,
    compress: Annotated[
        str, typer.Option("--compress", help="none (default), gzip, or with .zarr also zstd.")
    ] = "none",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the packed cache that is there.")
    ] = False,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Write a cache into one file that other tools read.

    HDF5 (.h5), a Zarr group (.zarr), or that in one zip (.zarr.zip). Every byte is checked against its record
    on the way. What is not committed yet is not in the file. kd cache unpack makes the same cache of it again.

    \b
    Examples:
      kd cache pack food.kd --to food.h5
      kd cache pack food.kd --to food.zarr --compress zstd --teacher resnet50
    """
    from kdcli.cache.admin import pack as packing

    console.quiet = quiet
    done = packing.pack(cache, to, tuple(teacher or ()), compress, overwrite)
    _say(done, json, {"compress": compress})


def unpack(
    packed: Annotated[Path, typer.Argument(metavar="FILE", help="What kd cache pack wrote.")],
    to: NewCache,
    backend: Annotated[
        str | None, typer.Option("--backend", help="zarr or hdf5; default: what the packed cache had.")
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Make a cache of a packed one, bit by bit the same.

    With another --backend the values are the same and the files are others.

    \b
    Examples:
      kd cache unpack food.h5 --to food.kd
      kd cache unpack food.zarr.zip --to food.kd --backend hdf5
    """
    from kdcli.cache.admin import pack as packing

    console.quiet = quiet
    match backend:
        case None | "zarr" | "hdf5":
            done = packing.unpack(packed, to, backend)
        case _:
            raise UsageError(f"--backend {backend} is unknown", "Backends are zarr and hdf5.")
    _say(done, json)


def merge(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE...", help="Caches of the same data.")],
    to: NewCache,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Make one cache of several of the same data.

    For shards that workers without a shared disk made (cache-teachers --shard i/n), and for caches of different
    teachers. Data, views, blocks and teachers of one name must be the same, and so must be the bytes of what
    several of them hold. The caches stay as they are; on the same disk the files are linked and take no space.

    \b
    Examples:
      kd cache merge shard0.kd shard1.kd --to food.kd
    """
    from kdcli.cache.admin import merge as merging

    console.quiet = quiet
    _say(merging.merge(caches, to), json)


def _say(done: "Moved", json: bool, more: dict[str, Any] | None = None) -> None:
    document = {**done.document(), **(more or {})}
    if json:
        console.document(document)
    else:
        console.table(
            ["part", "units", "of"], [[part, count, total] for part, (count, total) in done.parts.items()]
        )
    console.note(f"{done.path}: {document['bytes'] / 1e6:,.1f} MB")
    if not done.complete:
        console.note("Not complete: kd cache-teachers with the cache's own options fills what is missing.")
