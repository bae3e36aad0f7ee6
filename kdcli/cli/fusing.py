"""``kd fuse-teachers``."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import configure, split_flags, words
from kdcli.cli.sweeping import fraction
from kdcli.console import console


def fuse_teachers(
    cache: opt.Caches = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", metavar="NAME", help="Cached teacher to fuse; repeatable, at least two."),
    ] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option(
            "--tap", metavar="NAME=TAP", help="The map of a teacher; default: by its size. Repeatable."
        ),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option("--levels", help="L1: embeddings; L2 (default), L3, L4: maps of stride 32, 16, 8."),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            help="shared (default): one joint teacher with a head a data set; per-data-set: one a data set.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder.")] = None,
    map_channels: Annotated[
        str | None,
        typer.Option(
            "--map-channels", metavar="N[,N...]", help="Channels of fused, fused2, ... (default 512 each)."
        ),
    ] = None,
    map_size: Annotated[
        int | None, typer.Option("--map-size", help="Interpolate all maps to this height and width.")
    ] = None,
    space: Annotated[
        int | None, typer.Option("--space", help="Channels each map is brought to (default 4096).")
    ] = None,
    projection: Annotated[
        int | None, typer.Option("--projection", help="At L1, width each embedding is brought to.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help="Before every head (default 0.8).")
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option("--test", metavar="PATH", help="Cache of test images, one for each --cache, in order."),
    ] = None,
    validation: Annotated[
        float | None, typer.Option("--validation", help="Share of the images to judge every epoch on.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            "--select", help="last (default), best (by --validation), or best-on-test (P4's way; marked)."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data (default 50).")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images a step (default 240).")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="adamw (default) or adam.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate (default 1e-4).")] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay (default 1e-3).")
    ] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="constant (default) or cosine.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="Share of a label spread over all classes.")
    ] = None,
    write_back: Annotated[
        str | None,
        typer.Option(
            "--write-back", metavar="NAME", help="Keep its outputs in every cache, as the teacher NAME."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of --write-back: float16 (default) or float32.")
    ] = None,
    seed: opt.Seed = None,
    data_seed: Annotated[
        int | None, typer.Option("--data-seed", help="Seed of the validation split (default 0).")
    ] = None,
    device: opt.Device = None,
    verify: opt.Verify = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Start anew when --out holds another run.")
    ] = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Train a joint teacher on what cached teachers said (P4).

    No image is read. The result is a teacher, kd-fused:OUT.

    \b
    Examples:
      kd fuse-teachers --cache a.kd --cache b.kd --teacher t1 --teacher t2 --levels L2 --out joint --write-back joint
      kd fuse-teachers --cache a.kd --teacher t1 --teacher t2 --levels L1 --out joint
    """
    flags, common = split_flags(dict(locals()))
    flags["map_channels"] = words(map_channels)
    from kdcli.fusing.config import FuseConfig

    settings = configure(FuseConfig, flags, common)
    from kdcli.fusing.fuse import fuse_teachers as step

    result = step(settings)
    if json:
        console.document(result)
        return
    rows = [
        [
            name,
            head,
            one["select"]["epoch"],
            fraction(one["metrics"].get(f"val_top1/{head}")),
            fraction(one["metrics"].get(f"test_top1/{head}"))
            + (" (selected on it)" if one["select"]["on_test"] else ""),
            spec,
        ]
        for name, one in result["joint"].items()
        for head, spec in one["teachers"].items()
    ]
    console.table(["joint teacher", "head", "epoch", "val", "test", "spec"], rows)
