"""``kd cache-teachers``, and ``kd cache plan``, which takes the same options."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import Data, configure, split_flags, words
from kdcli.console import console, duration, size

if TYPE_CHECKING:
    from kdcli.extract.config import CacheConfig
    from kdcli.extract.costs import CachePlan


def cache_teachers(
    data: Data = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Cache folder; created when it is not there.")
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", metavar="[NAME=]SPEC", help="A teacher; repeatable.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help="Outputs to keep: logits,features (default), topk:K, maps:TAP,TAP; @eval: of view 0 only.",
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option("--views", help="eval (default), or eval+train:K for K replayable training views."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe of the training views (default imagenet).")
    ] = None,
    eval_crop: Annotated[
        float | None,
        typer.Option("--eval-crop", help="Crop fraction of view 0; default: the first teacher's."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Storage of a new cache: zarr (default) or hdf5.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Storage: float16 (default) or float32.")
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option("--temperatures", help="Temperatures of the kept logsumexp (default 1,2,4,5)."),
    ] = None,
    amp: opt.Amp = None,
    batch_size: opt.BatchSize = None,
    block_rows: Annotated[
        int | None, typer.Option("--block-rows", help="Rows per block, a multiple of 32; default: by size.")
    ] = None,
    buffer_gb: Annotated[
        float | None, typer.Option("--buffer-gb", help="Memory for one task's outputs (default 1).")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            "--min-accuracy", help="Refuse a teacher that gets a smaller share of labelled images right."
        ),
    ] = None,
    min_accuracy_images: Annotated[
        int | None,
        typer.Option("--min-accuracy-images", help="Images that --min-accuracy looks at (default 256)."),
    ] = None,
    bad_images: Annotated[
        str | None,
        typer.Option("--bad-images", help="fail (default): list them at the end; drop: record them absent."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="i/n, array, srun or torchrun: do only this share of the blocks."),
    ] = None,
    no_wait: Annotated[
        bool | None, typer.Option("--no-wait", help="Exit 23 instead of waiting for other writers.")
    ] = None,
    grace: Annotated[
        float | None, typer.Option("--grace", help="Seconds a stop signal leaves for a task (20).")
    ] = None,
    device: opt.Device = None,
    workers: opt.Workers = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    dry_run: Annotated[
        bool | None, typer.Option("--dry-run", help="Print counts and bytes; write nothing.")
    ] = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run teachers once over a data set and cache what they say.

    \b
    Examples:
      kd cache-teachers photos/ --cache photos.kd --teacher resnet50.a1_in1k
      kd cache-teachers photos/@split=train --cache train.kd --teacher gen=local-dir:weights --views eval+train:8
    """
    settings = _settings(dict(locals()))
    from kdcli.extract import cache_teachers as step

    result = step(settings)
    if json:
        console.document(result.document())
        return
    rows = [
        [
            name,
            part.id[:12],
            f"{part.done}/{part.total}",
            part.written,
            " ".join(f"{array}{tuple(spec['shape'])}" for array, spec in part.arrays.items()),
        ]
        for name, part in result.teachers.items()
    ]
    console.table(["teacher", "id", "tasks", "written", "arrays"], rows)


def _settings(parameters: dict[str, Any]) -> "CacheConfig":
    flags, common = split_flags(parameters)
    flags["keep"] = words(flags["keep"])
    flags["temperatures"] = words(flags["temperatures"])
    flags["wait"] = False if flags.pop("no_wait") else None
    from kdcli.extract.config import CacheConfig

    return configure(CacheConfig, flags, common)


def plan(*, measure: bool = False, **parameters: Any) -> None:
    """Say what kd cache-teachers would write, and how long.

    Bytes per array, what is left to do, and the free space; takes the same options.

    With --measure it also runs 20 batches of decoding and of each teacher and writes a temporary file, and
    says how long the run takes and what it is bound by. Changes nothing.

    \b
    Examples:
      kd cache plan photos/ --cache photos.kd --teacher resnet50.a1_in1k --keep logits,maps:layer4
      kd cache plan photos/ --cache photos.kd --teacher resnet50.a1_in1k --views eval+train:8 --measure
    """
    settings = _settings(dict(parameters))
    from kdcli.extract.costs import plan_cache

    found = plan_cache(settings, measured=measure)
    if parameters["json"]:
        console.document(found.document())
    else:
        _print_plan(found)
    found.require_space(settings.cache)


def _print_plan(found: "CachePlan") -> None:
    rows = [
        [teacher, array, size(count)]
        for teacher, arrays in found.arrays.items()
        for array, count in arrays.items()
    ]
    console.table(["part", "array", "size"], rows)
    print()
    facts: list[list[object]] = [
        ["images x views", f"{found.rows} x {found.views}"],
        ["tasks to do", found.tasks],
        ["size when complete", size(found.bytes)],
        ["still to be written", size(found.bytes_missing)],
        ["free there", size(found.bytes_free)],
    ]
    if (speed := found.measured) is not None:
        forward: list[list[object]] = [
            [f"forward {name}", f"{rate:.1f} views/s"] for name, rate in speed.forward.items()
        ]
        facts += [
            ["decode", f"{speed.decode:.1f} views/s"],
            *forward,
            ["write", f"{speed.write_mb:.0f} MB/s = {speed.write:.1f} views/s"],
            ["bound by", speed.bound],
            ["time", duration(speed.hours * 3600)],
        ]
    console.table(["plan", ""], facts)


def _with_options_of_cache_teachers() -> None:
    """Give :func:`plan` the options of cache-teachers, without a second list of them."""
    own = inspect.signature(cache_teachers)
    option = typer.Option(
        "--measure", help="Run a few batches and a temporary write; says hours and the bound."
    )
    extra = inspect.Parameter(
        "measure", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.parameters.values()
    ]
    plan.__signature__ = own.replace(parameters=[*parameters, extra])  # type: ignore[attr-defined]
    plan.__annotations__ = {**cache_teachers.__annotations__, "measure": extra.annotation}


_with_options_of_cache_teachers()
