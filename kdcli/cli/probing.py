"""``kd eval-probe``: how good representations are, and how they compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli.options import TrainData, configure, one_or_all, split_flags, words
from kdcli.cli.sweeping import fraction
from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.probing.result import Comparison, ProbeTable


def eval_probe(
    data: TrainData = None,
    test: Annotated[
        list[str] | None,
        typer.Option("--test", help="Data set to test on; of several DATA: NAME=DATA, repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[NAME=]SPEC",
            help="Model spec, run of kd train-student or folder of runs; runs its forward. Repeatable.",
        ),
    ] = None,
    cache: opt.Caches = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher", metavar="NAME", help="Cached teacher to probe, without a forward. Repeatable."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="svm (default), logistic, knn or fine-tune."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="NAME",
            help="Train nothing: test this head that was kept with the model; label is its own.",
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option("--shots", help="Images per class (default 5), or all in a single run.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option("--draws", help="Random draws of the shots (default 50).")
    ] = None,
    seed: opt.Seed = None,
    folds: Annotated[
        int | None, typer.Option("--folds", help="Of the cross-validation (default 5, at most the shots).")
    ] = None,
    c_grid: Annotated[
        str | None,
        typer.Option(
            "--c-grid", metavar="VALUES", help="Values of C: 0.01,0.1,1,10 (default), or 0.0001:100:7log."
        ),
    ] = None,
    neighbours: Annotated[int | None, typer.Option("--neighbours", help="k of knn (default 20).")] = None,
    solver: Annotated[
        str | None,
        typer.Option("--solver", help="exact (default), or sklearn: LinearSVC, the slow reference."),
    ] = None,
    multi_label: Annotated[
        str | None,
        typer.Option(
            "--multi-label",
            metavar="SEPARATOR",
            help="Class names are several labels joined by this, e.g. cat|dog; judged by mAP.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="NAME", help="Compare the others with this one (default: the first)."
        ),
    ] = None,
    related: Annotated[
        list[str] | None,
        typer.Option("--related", metavar="NAME", help="Target related to what was learned. Repeatable."),
    ] = None,
    unrelated: Annotated[
        list[str] | None,
        typer.Option("--unrelated", metavar="NAME", help="Target unrelated to it. Repeatable."),
    ] = None,
    equal_within: Annotated[
        float | None,
        typer.Option("--equal-within", help="Mean difference up to which the tally says equal (0.01)."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", help="Difference that 'no worse than' tolerates, of TOST (0.01)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of fine-tune's runs; they resume.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Of fine-tune (default 50).")] = None,
    lr_grid: Annotated[
        str | None,
        typer.Option(
            "--lr-grid", metavar="RATES", help="Of fine-tune (0.0001,0.001,0.01,0.1); a lone one is taken."
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation", metavar="SHARE", help="Share of fine-tune's images that chooses the rate (0.2)."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe of fine-tune's training views (imagenet).")
    ] = None,
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
    """Judge representations by linear and other probes.

    By default the protocol of P1: random shots of each class, many draws, a linear SVM, accuracy on --test. The
    draws are the same for every representation, so that differences are paired.

    \b
    Examples:
      kd eval-probe photos/@split=train --test photos/@split=test --model local-dir:runs/a/export
      kd eval-probe photos/@split=train --test photos/@split=test --cache train.kd --cache test.kd --teacher gen
      kd eval-probe cars=cars/@split=train food=food/@split=train --test cars=cars/@split=test \\
          --test food=food/@split=test --related cars --unrelated food --model generalist=runs/gen --model runs/students
      kd eval-probe photos/@split=train --test photos/@split=test --model runs/a --protocol logistic --shots all
      kd eval-probe --test photos/@split=test --model runs/a --head label
    """
    flags, common = split_flags(dict(locals()))
    flags |= {name: one_or_all(flags[name]) for name in ("data", "test")}
    flags["c_grid"] = words(flags["c_grid"])
    from kdcli.options.resolving import created_by
    from kdcli.probing.config import ProbeConfig

    settings = configure(ProbeConfig, flags, common)
    from kdcli.probing.probe import eval_probes

    table = eval_probes(settings)
    if json:
        console.document({**table.document(), "created": created_by(settings)})
        return
    _print(table)


# --- tables -----------------------------------------------------------------------------------


def _print(table: "ProbeTable") -> None:
    first = table.results[0]
    several = len({result.target for result in table.results}) > 1
    score = "mAP" if first.metric == "mAP" else "accuracy"
    columns = ["representation", *(["target"] if several else []), "shots", "classes", "draws"]
    console.table(
        [*columns, score, "+-95%", "std", "top5", "per-class"],
        [
            [
                result.representation,
                *([result.target] if several else []),
                "-" if result.shots is None else result.shots,
                result.classes,
                result.draws,
                fraction(result.accuracy.mean),
                fraction(result.accuracy.ci95),
                fraction(result.accuracy.std),
                fraction(None if result.top5 is None else result.top5.mean),
                fraction(result.mean_per_class.mean),
            ]
            for result in table.results
        ],
    )
    if table.comparisons:
        _print_comparisons(table.comparisons, table.baseline, several)
        _print_tally(table)


def _print_comparisons(comparisons: "Sequence[Comparison]", baseline: str, several: bool) -> None:
    margin = comparisons[0].paired.margin
    over = comparisons[0].over
    pairs = f", paired over {over}" if over else ""
    print(f"\nminus {baseline}{pairs}; no worse: by at most {margin:g} (TOST), p below 0.05")
    rows = []
    for each in comparisons:
        paired = each.paired
        no_worse = paired.p_not_worse
        rows.append(
            [
                each.representation,
                *([each.target] if several else []),
                f"{paired.mean:+.4f}",
                fraction(paired.ci95),
                _p(paired.p),
                "-" if no_worse is None else f"{'yes' if no_worse < 0.05 else 'not shown'} ({_p(no_worse)})",
                each.verdict,
            ]
        )
    header = ["representation", *(["target"] if several else []), "difference", "+-95%", "p", "no-worse"]
    console.table([*header, "verdict"], rows)


def _print_tally(table: "ProbeTable") -> None:
    print(
        f"\ntargets on which it is better or worse than {table.baseline} by more than {table.equal_within:g}"
    )
    rows = [
        [name, kind, *(len(found[verdict]) for verdict in ("better", "equal", "worse"))]
        for name, kinds in table.tallies().items()
        for kind, found in kinds.items()
    ]
    console.table(["representation", "targets", "better", "equal", "worse"], rows)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"
