"""The commands of the pipeline, in the order of the data flow."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from kdcli.cli import fusing, probing, ranking, soup, sweeping, teachers
from kdcli.cli import mlfd_options as mlfd
from kdcli.cli import options as opt
from kdcli.cli import transfer as p3
from kdcli.cli.options import TrainData, configure, one_or_all, split_flags, words
from kdcli.cli.sweeping import fraction, read_ranking
from kdcli.console import console


def register(app: typer.Typer) -> None:
    """Add the pipeline commands to ``app``."""
    app.command("cache-teachers")(teachers.cache_teachers)
    app.command("rank-sources")(ranking.rank_sources)
    app.command("fuse-teachers")(fusing.fuse_teachers)
    app.command("train-student")(train_student)
    app.command("soup")(soup.soup)
    app.command("eval-probe")(probing.eval_probe)


def train_student(
    data: TrainData = None,
    cache: opt.Caches = None,
    student: Annotated[str | None, typer.Option("--student", help="Model spec of the student.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="labels-only, distill-nearest, distill-weighted, distill-equal, fixmatch, consolidation, "
            "consolidation-crd, multi-head-kd, multi-head-crd, soft-label, multi-task, replay-oracle, "
            "kl, xe-kl, kl-ls, mcl, dp, dp-unsup, cd, crd, soft-ce, topk-kl or mlfd; see kd methods.",
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
        typer.Option(
            "--init",
            help="pretrained, random, xavier, nearest-source or a SPEC; default by the kind of --student.",
        ),
    ] = None,
    freeze: Annotated[
        str | None, typer.Option("--freeze", help="backbone: train the heads only, on frozen features.")
    ] = None,
    train_from: Annotated[
        str | None,
        typer.Option(
            "--train-from",
            metavar="TAP",
            help="Keep the layers up to TAP as they start, and read their maps from the cache.",
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            "--test", help="Data set to test on after training; of several DATA: NAME=DATA, repeatable."
        ),
    ] = None,
    label_space: Annotated[
        str | None,
        typer.Option("--label-space", help="Of several DATA: separate (default), a head each, or joint."),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="SHARE",
            help="Set this share of each class aside; judge every epoch on it.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            help="Epoch to export: last (default), best (on the validation split) or best-on-test.",
        ),
    ] = None,
    lr_grid: Annotated[
        str | None,
        typer.Option(
            "--lr-grid",
            metavar="RATES",
            help="Choose among 0.001,0.003,0.01 or 0.0001:0.1:7log on the validation split.",
        ),
    ] = None,
    sequential: Annotated[
        str | None,
        typer.Option(
            "--sequential",
            metavar="ORDER",
            help="One stage a teacher, each from the last one's student: ascending or descending accuracy, random, "
            "given.",
        ),
    ] = None,
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
        str | None,
        typer.Option("--schedule", help="constant, cosine, step or one-cycle; default: the method's."),
    ] = None,
    milestones: Annotated[
        str | None,
        typer.Option(
            "--milestones", metavar="SHARES", help="Where --schedule step falls tenfold, e.g. 0.5,0.8."
        ),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Share of the training in which the rate rises.")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option("--accumulate", help="Compute each step's batch in this many pieces; less memory."),
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", help="Largest norm of the gradient (default: none).")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="Share of a label spread over all classes.")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option("--ema", help="Decay of a moving average of the weights, tested and exported."),
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
    kl_weight: p3.KlWeight = None,
    kl_direction: p3.KlDirection = None,
    top_classes: p3.TopClasses = None,
    mcl_tau: p3.MclTau = None,
    mcl_share: p3.MclShare = None,
    mcl_every: p3.MclEvery = None,
    frozen: p3.Frozen = None,
    frozen_teacher: p3.FrozenTeacher = None,
    loss_convention: mlfd.LossConvention = None,
    mlfd_levels: mlfd.MlfdLevels = None,
    distill_weight: mlfd.DistillWeight = None,
    level_weight: mlfd.LevelWeight = None,
    student_tap: mlfd.StudentTap = None,
    teacher_tap: mlfd.TeacherTap = None,
    adaptor: mlfd.AdaptorSide = None,
    map_resize: mlfd.MapResize = None,
    unlabelled_ratio: Annotated[
        float | None,
        typer.Option(
            "--unlabelled-ratio",
            help="Unlabelled images per labelled one in a step, in a batch of their own (FixMatch: 7).",
        ),
    ] = None,
    unlabelled_includes_labelled: Annotated[
        bool | None,
        typer.Option(
            "--unlabelled-includes-labelled/--no-unlabelled-includes-labelled",
            help="Labelled images are among the unlabelled ones, too (FixMatch: yes).",
        ),
    ] = None,
    unlabelled_weight: Annotated[
        float | None,
        typer.Option("--unlabelled-weight", help="Weight of the unlabelled term (FixMatch's lambda_u, 1)."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", help="Confidence from which FixMatch takes a prediction for a label (0.95)."
        ),
    ] = None,
    strong_recipe: Annotated[
        str | None,
        typer.Option(
            "--strong-recipe", help="FixMatch's strong views; default: --recipe, RandAugment and Cutout."
        ),
    ] = None,
    bn: Annotated[
        str | None, typer.Option("--bn", help="BatchNorm: train, frozen (statistics) or frozen-affine (all).")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Input size in pixels; default: the student's.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe of live training views; with a cache, the cache's.")
    ] = None,
    teacher_view: Annotated[
        str | None,
        typer.Option(
            "--teacher-view", help="same: teachers saw the student's view; eval (mlfd's default): view 0."
        ),
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
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Run the student through torch.compile.")
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option("--tracker", help="Log epochs to tensorboard, wandb, mlflow, ... too. Repeatable."),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Start anew where --out holds another run.")
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep",
            metavar="FILE",
            help="YAML file of several students to train over one stream of images.",
        ),
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
      kd train-student cars=cars/@split=train food=food/@split=train --method multi-task --test cars=cars/@split=test \\
          --student mobilenetv3_small_100 --out runs/b
    """
    flags, common = split_flags(dict(locals()))
    flags["milestones"] = words(flags["milestones"])
    flags |= {name: one_or_all(flags[name]) for name in ("data", "test")}
    if (file := flags.pop("sweep")) is not None:
        sweeping.train_sweep(flags, common, file)
        return
    from kdcli.training.config import StudentConfig

    settings = configure(StudentConfig, flags, common)
    chosen = read_ranking(settings)
    from kdcli.training.lr_grid import train_grid
    from kdcli.training.sequential import train_sequence
    from kdcli.training.train import train_student as lone_run

    step = train_sequence if settings.sequential else train_grid if settings.lr_grid else lone_run
    result = step(settings, ranking=chosen).document()
    export = quote(f"local-dir:{result['out']}/export")
    console.note(f"the student can be a teacher: kd cache-teachers ... --teacher NAME={export}")
    if json:
        console.document(result)
        return
    tests = result.get("tests") or {"": result["test"] or {}}
    several = ["set"] if result.get("tests") else []
    console.table(
        ["method", *several, "epochs", "top1", "top5", "seconds", "out"],
        [
            [
                result["method"],
                *([name] if several else []),
                result["epochs"],
                fraction(scores.get("top1")),
                fraction(scores.get("top5")),
                f"{result['seconds']:.1f}",
                result["out"],
            ]
            for name, scores in tests.items()
        ],
    )
    soup.print_stages(result.get("stages") or [])
