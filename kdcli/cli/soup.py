"""``kd soup``, and the table of a sequence's stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.cli.sweeping import fraction
from kdcli.console import console


def soup(
    parents: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_EXPORT...", help="Students: OUT of train-student, or exports."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the soup, an export like OUT/export.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W", help="One a student, e.g. 2,1,1; default: all equal."),
    ] = None,
    recalibrate_bn: Annotated[
        str | None,
        typer.Option(
            "--recalibrate-bn",
            metavar="DATA",
            help="Estimate BatchNorm's running statistics on these images instead of averaging them.",
        ),
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="Data set to test the soup on.")] = None,
    batch_size: opt.BatchSize = None,
    device: opt.Device = None,
    workers: opt.Workers = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Average the weights of students that share a start.

    BatchNorm's running statistics are averaged, too. The result opens as local-dir:DIR; DIR/soup.json says what it
    is made of. P3 averages one student a teacher.

    \b
    Examples:
      kd soup runs/from-a runs/from-b runs/from-c --out runs/soup --test photos/@split=test
      kd soup runs/from-a runs/from-b --weights 2,1 --recalibrate-bn photos/@split=train --out runs/soup-bn
    """
    console.quiet, console.verbose = quiet, verbose
    from kdcli.training.soup import Recipe, make_soup

    given = {"batch_size": batch_size, "device": device, "workers": workers, "download": download}
    recipe = Recipe(
        tuple(parents),
        out,
        _numbers(weights),
        recalibrate_bn,
        test,
        data_root=data_root,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    document = make_soup(recipe)
    console.note(f"the soup opens as {document['spec']}")
    if json:
        console.document(document)
        return
    rows = [
        [each["spec"], f"{each['share']:.4g}", each["weights"][:12], "-", "-"] for each in document["parents"]
    ]
    scores = document["test"] or {}
    rows.append(
        [
            document["spec"],
            "soup",
            document["sha256"][:12],
            fraction(scores.get("top1")),
            fraction(scores.get("top5")),
        ]
    )
    console.table(["student", "share", "weights", "top1", "top5"], rows)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        from kdcli.errors import UsageError

        raise UsageError(
            f"--weights {text}: not numbers between commas", "For example --weights 2,1,1"
        ) from None


def print_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """The table of a sequence's stages; nothing where there are none that were tested."""
    columns = ("top1", "delta", "delta_previous", "gain", "gain_previous", "loss", "loss_previous")
    tested = [stage for stage in stages if "top1" in stage]
    if tested:
        console.table(
            ["stage", "teacher", "teacher_top1", *columns],
            [
                [
                    stage["stage"],
                    stage["teacher"],
                    fraction(stage["teacher_top1"]),
                    *(_signed(name, stage[name]) for name in columns),
                ]
                for stage in tested
            ],
        )


def _signed(name: str, value: float | None) -> str:
    return f"{value:+.4f}" if value is not None and name.startswith("delta") else fraction(value)
