"""``kd report``: one page of results."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import configure, split_flags
from kdcli.console import console


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("report")(report)


def report(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN_OR_RESULT",
            help="Runs, sweeps, joint teachers, caches, comparisons, --json documents, or folders of these.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="html (default): one page; md: one file of tables; csv, svg or png: a folder of tables or charts.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="PATH", help="File, or folder for csv, svg and png (default report.html, ...)."
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Title of the report.")] = None,
    separate: Annotated[
        bool | None,
        typer.Option(
            "--separate", help="Tables of their own for other protocols or test data, which else are refused."
        ),
    ] = None,
    tsne: Annotated[
        bool | None,
        typer.Option("--tsne", help="Compute t-SNE of cached features, and with --data of the exports'."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Labelled images for --tsne of the runs' exports.")
    ] = None,
    tsne_images: Annotated[
        int | None, typer.Option("--tsne-images", help="Images of a t-SNE, drawn at random (default 1000).")
    ] = None,
    perplexity: Annotated[
        float | None,
        typer.Option("--perplexity", help="Of t-SNE: about how many neighbours count (default 30)."),
    ] = None,
    seed: opt.Seed = None,
    batch_size: opt.BatchSize = None,
    device: opt.Device = None,
    workers: opt.Workers = None,
    verify: opt.Verify = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show results as one page that needs no server or network.

    Reads what other commands left: runs (also unfinished ones), sweeps, joint teachers, caches,
    comparisons, and what rank-sources, eval-probe, compare, train-student and fuse-teachers print
    with --json. Folders are searched.

    \b
    Examples:
      kd report runs/
      kd report runs/ ranking.json photos.kd compared --out study.html
      kd report runs/a runs/b --separate --format csv --out tables
      kd report photos.kd --tsne --format png --out figures
    """
    flags, common = split_flags(dict(locals()))
    from kdcli.reporting.config import ReportConfig

    settings = configure(ReportConfig, flags, common)
    from kdcli.reporting.report import report as run

    result = run(settings)
    if json:
        console.document(result.document())
        return
    read = ", ".join(f"{count} {kind}" for kind, count in result.inputs.items() if count)
    console.note(f"read {read}")
    for file in result.files:
        print(file)
