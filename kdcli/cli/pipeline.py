"""The four commands of the pipeline, in the order of the data flow."""

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli import options as opt
from kdcli.cli import ranking, teachers
from kdcli.cli.options import Data, configure, split_flags
from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.config import TrainConfig
    from kdcli.types import Ranking


def register(app: typer.Typer) -> None:
    """Add the pipeline commands to ``app``."""
    app.command("cache-teachers")(teachers.cache_teachers)
    app.command("rank-sources")(ranking.rank_sources)
    app.command("train-student")(train_student)
    app.command("eval-probe")(eval_probe)


def train_student(
    data: Data = None,
    cache: opt.Caches = None,
    student: Annotated[str | None, typer.Option("--student", help="Model spec of the student.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="labels-only, distill-nearest, distill-weighted, distill-equal, consolidation, "
            "consolidation-crd, multi-head-kd, crd or soft-label; see kd methods.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder of the run.")] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="NAME",
            help="Cached teacher to use; default all, or the ranking's. Repeatable.",
        ),
    ] = None,
    generalist: Annotated[
        str | None, typer.Option("--generalist", help="Cached teacher that consolidation starts from.")
    ] = None,
    ranking: Annotated[
        str | None, typer.Option("--ranking", help="JSON of kd rank-sources; - reads standard input.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="pretrained, random or a SPEC; default by the kind of --student."),
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="Data set to test on after training.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the data; default: the method's.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; default: the method's.")
    ] = None,
    backbone_lr_scale: Annotated[
        float | None, typer.Option("--backbone-lr-scale", help="Backbone learning rate as a share of --lr.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="timm optimiser; default: the method's.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay; default: the method's.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="constant, cosine or step; default: the method's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Softmax temperature of the distillation term.")
    ] = None,
    label_weight: Annotated[
        float | None, typer.Option("--label-weight", help="Weight of the labelled term (P2's lambda, 0.8).")
    ] = None,
    generalist_weight: Annotated[
        float | None,
        typer.Option("--generalist-weight", help="Weight of head 0 (P1's lambda_0, 1); all sum to 2."),
    ] = None,
    old_new: Annotated[
        str | None,
        typer.Option("--old-new", metavar="OLD:NEW", help="The same weight as a ratio; 1:3 is 0.5."),
    ] = None,
    crd_weight: Annotated[
        float | None, typer.Option("--crd-weight", help="Weight of CRD beside a teacher's KD term (0.8).")
    ] = None,
    crd_negatives: Annotated[
        int | None, typer.Option("--crd-negatives", help="Negatives of CRD (16384), at most images - 1.")
    ] = None,
    crd_temperature: Annotated[
        float | None, typer.Option("--crd-temperature", help="Temperature of CRD's scores (0.07).")
    ] = None,
    crd_dim: Annotated[
        int | None, typer.Option("--crd-dim", help="Dimensions of CRD's embeddings (128).")
    ] = None,
    crd_momentum: Annotated[
        float | None, typer.Option("--crd-momentum", help="Share CRD's memory keeps of a row (0.5).")
    ] = None,
    bn: Annotated[str | None, typer.Option("--bn", help="BatchNorm statistics: train or frozen.")] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Input size in pixels; default: the student's.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe of live training views; with a cache, the cache's.")
    ] = None,
    teacher_view: Annotated[
        str | None,
        typer.Option("--teacher-view", help="same (default): teachers saw the student's view; eval: view 0."),
    ] = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    data_seed: Annotated[
        int | None, typer.Option("--data-seed", help="Seed of order and views (default 0).")
    ] = None,
    amp: opt.Amp = None,
    verify: opt.Verify = None,
    allow_partial: opt.AllowPartial = None,
    device: opt.Device = None,
    workers: opt.Workers = None,
    stage: Annotated[
        Path | None,
        typer.Option(
            "--stage", metavar="DIR", help="Copy what is read of the cache to this local disk first."
        ),
    ] = None,
    prewarm: Annotated[
        bool | None, typer.Option("--prewarm", help="Read the cache's files into the page cache first.")
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option("--resident", help="ram or gpu: hold the teachers' outputs there while training."),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Start anew where --out holds another run.")
    ] = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    print_config: opt.PrintConfig = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Train a student on labels and cached teachers.

    Which of the two, and how, is the method's. Teachers are read, never run.

    \b
    Examples:
      kd train-student photos/@split=train --student mobilenetv3_small_100 --method labels-only --out runs/plain
      kd rank-sources --cache C --json |
          kd train-student photos/@split=train --cache C --ranking - --method distill-weighted \\
              --student mobilenetv3_small_100 --out runs/a --json
    """
    flags, common = split_flags(dict(locals()))
    from kdcli.config import TrainConfig

    settings = configure(TrainConfig, flags, common)
    chosen = _read_ranking(settings)
    from kdcli.training.run import train_student as step

    result = step(settings, ranking=chosen).document()
    if json:
        console.document(result)
        return
    test_scores = result["test"] or {}
    console.table(
        ["method", "epochs", "top1", "top5", "seconds", "out"],
        [
            [
                result["method"],
                result["epochs"],
                _fraction(test_scores.get("top1")),
                _fraction(test_scores.get("top5")),
                f"{result['seconds']:.1f}",
                result["out"],
            ]
        ],
    )


def eval_probe(
    data: Data = None,
    test: Annotated[str | None, typer.Option("--test", help="Data set to test on.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Model spec; runs its forward.")] = None,
    cache: opt.Caches = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Cached teacher to probe, without a forward.")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Images per class (default 5).")] = None,
    draws: Annotated[
        int | None, typer.Option("--draws", help="Random draws of the shots (default 50).")
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
    """Judge a representation by a few-shot linear SVM.

    The protocol of P1: random shots of each class, many draws, accuracy on --test.

    \b
    Examples:
      kd eval-probe photos/@split=train --test photos/@split=test --model local-dir:runs/a/export
      kd eval-probe photos/@split=train --test photos/@split=test --cache train.kd --cache test.kd --teacher gen
    """
    flags, common = split_flags(dict(locals()))
    from kdcli.config import ProbeConfig

    settings = configure(ProbeConfig, flags, common)
    from kdcli.probing.step import eval_probe as step

    result = step(settings).document()
    if json:
        console.document(result)
        return
    accuracy = result["accuracy"]
    console.table(
        ["representation", "shots", "classes", "draws", "accuracy", "+-95%", "std"],
        [
            [
                result["representation"],
                result["shots"],
                result["classes"],
                result["draws"],
                _fraction(accuracy["mean"]),
                _fraction(accuracy["ci95"]),
                _fraction(accuracy["std"]),
            ]
        ],
    )


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _read_ranking(settings: "TrainConfig") -> "Ranking | None":
    """The ranking in a file or, for ``-``, on standard input."""
    source = settings.ranking
    if source is None:
        return None
    from kdcli.errors import NotFoundError
    from kdcli.ranking import parse_ranking
    from kdcli.runtime import storage_errors

    if source == "-":
        return parse_ranking(sys.stdin.read())
    path = Path(source)
    if not path.is_file():
        caches = " ".join(f"--cache {quote(str(cache))}" for cache in settings.cache) or "--cache CACHE"
        raise NotFoundError(
            f"--ranking {path} is {'a folder' if path.is_dir() else 'not there'}",
            f"kd rank-sources {caches} --json > {'ranking.json' if path.is_dir() else quote(str(path))}",
        )
    with storage_errors(path):
        return parse_ranking(path.read_text(encoding="utf-8"))
