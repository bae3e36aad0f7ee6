"""What training can be told, with defaults, types and ranges."""

import re
from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field, field_validator

from kdcli.methods.mlfd_options import MlfdOptions
from kdcli.methods.transfer_options import TransferOptions
from kdcli.options.fields import Mechanical, StepConfig
from kdcli.options.grids import positive_numbers
from kdcli.types import AmpName

MethodName = Literal[
    "labels-only",
    "distill-nearest",
    "distill-weighted",
    "distill-equal",
    "fixmatch",
    "consolidation",
    "consolidation-crd",
    "multi-head-kd",
    "multi-head-crd",
    "soft-label",
    "multi-task",
    "replay-oracle",
    "kl",
    "xe-kl",
    "kl-ls",
    "mcl",
    "dp",
    "dp-unsup",
    "cd",
    "crd",
    "soft-ce",
    "topk-kl",
    "mlfd",
]


def old_new_weight(text: str) -> float:
    """lambda_0 of a ratio OLD:NEW: ``1:3`` is 1/2, as lambda_0 and the experts' lambdas sum to 2 (P1 Exp. 4).

    Raises:
        ValueError: it is no ratio of two numbers >= 0 that are not both 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text)
    old, new = (float(number) for number in found.groups()) if found else (0.0, 0.0)
    if old + new == 0:
        raise ValueError("not a ratio OLD:NEW of numbers, such as 1:3")
    return 2 * old / (old + new)


@final
class StudentConfig(TransferOptions, MlfdOptions, StepConfig):
    """``kd train-student``. ``None`` means: the method's default (printed and recorded)."""

    command: ClassVar[str] = "train-student"

    @property
    def first_data(self) -> str:
        """DATA, of several the first without its name: the one that teachers have seen."""
        return self.data if isinstance(self.data, str) else self.data[0].partition("=")[2]

    data: str | tuple[str, ...] = Field(
        description="Data set the student trains on, or several of them, each as NAME=DATA.",
        json_schema_extra={"positional": True},
    )
    student: str = Field(description="Model spec of the student.")
    method: MethodName = Field(description="Objective; see kd methods.")
    out: Path = Field(description="Output folder of the run.", json_schema_extra=Mechanical)
    cache: tuple[Path, ...] = Field((), description="Cache folder; repeatable.")
    teacher: tuple[str, ...] = Field(
        (), description="Cached teachers to use; default all, or the ranking's. Repeatable."
    )
    generalist: str | None = Field(
        None, description="Cached teacher that consolidation starts from (head 0)."
    )
    ranking: str | None = Field(None, description="Ranking JSON of kd rank-sources; - reads standard input.")
    init: str | None = Field(
        None,
        description="pretrained, random, xavier, nearest-source or a SPEC to start from; default: pretrained "
        "for local-dir:, hf-hub: and ARCH@FILE, random for bare names.",
    )
    freeze: Literal["backbone"] | None = Field(
        None, description="backbone: only the heads train, on features of the frozen start."
    )
    train_from: str | None = Field(
        None, min_length=1, description="Tap up to which the student stays as it starts, read from the cache."
    )
    test: str | tuple[str, ...] | None = Field(
        None, description="Data set to test on after training; of several DATA: NAME=DATA each."
    )
    label_space: Literal["separate", "joint"] | None = Field(
        None, description="Of several data sets: a head each (default), or one over all class names."
    )
    validation: float | None = Field(
        None, gt=0, lt=1, description="Share of the labelled images to set aside and judge every epoch on."
    )
    select: Literal["last", "best", "best-on-test"] = Field(
        "last", description="Which epoch is exported; best: by the validation split; best-on-test: by --test."
    )
    lr_grid: str | None = Field(
        None, description="Learning rates to choose among: 0.001,0.003,0.01 or 0.0001:0.1:7log."
    )
    sequential: Literal["ascending", "descending", "random", "given"] | None = Field(
        None,
        description="One stage a teacher, in this order of accuracy, by seed, or as --teacher names them.",
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the data.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate (of the heads, where groups differ)."
    )
    backbone_lr_scale: float | None = Field(
        None, ge=0, description="Backbone learning rate as a share of --lr."
    )
    optimizer: str | None = Field(None, description="timm optimiser name.")
    weight_decay: float | None = Field(None, ge=0, description="Weight decay.")
    schedule: Literal["constant", "cosine", "step", "one-cycle"] | None = Field(
        None, description="Learning-rate schedule."
    )
    milestones: tuple[float, ...] | None = Field(
        None,
        description="Shares of the training at which the schedule step multiplies the rate by 0.1.",
        json_schema_extra={"comma": True},
    )
    warmup: float | None = Field(
        None, ge=0, lt=1, description="Share of the training in which the learning rate rises."
    )
    accumulate: int | None = Field(
        None, ge=1, description="Compute each step's images in this many pieces, adding up gradients."
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Scale the gradient of all parameters down to this norm."
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=1, description="Share of each label that is spread evenly over all classes."
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average of the weights; it is tested and exported."
    )
    temperature: float | None = Field(None, gt=0, description="Softmax temperature of the distillation term.")
    label_weight: float | None = Field(
        None, ge=0, le=1, description="Weight of the labelled term (P2's lambda)."
    )
    generalist_weight: float | None = Field(None, ge=0, le=2, description="Weight of head 0 (P1's lambda_0).")
    old_new: str | None = Field(
        None,
        description="OLD:NEW: the same weight as lambda_0 : sum of the experts' lambdas, scaled to a sum of 2.",
    )
    crd_weight: float | None = Field(None, ge=0, description="Weight of CRD beside a teacher's KD term.")
    crd_negatives: int | None = Field(None, ge=1, description="Negatives of CRD, at most images - 1.")
    crd_temperature: float | None = Field(None, gt=0, description="Temperature of CRD's scores.")
    crd_dim: int | None = Field(None, ge=1, description="Dimensions of CRD's embeddings.")
    crd_momentum: float | None = Field(None, ge=0, lt=1, description="Share CRD's memory keeps of a row.")
    unlabelled_ratio: float | None = Field(
        None, gt=0, description="Unlabelled images per labelled one in a step."
    )
    unlabelled_includes_labelled: bool | None = Field(
        None, description="Whether labelled images are among the unlabelled ones, too."
    )
    unlabelled_weight: float | None = Field(
        None, ge=0, description="Weight of the unlabelled term (FixMatch's lambda_u)."
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="Confidence from which FixMatch takes a prediction for a label."
    )
    strong_recipe: str | None = Field(
        None, description="Recipe of FixMatch's strong views; default: --recipe with RandAugment and Cutout."
    )
    bn: Literal["train", "frozen", "frozen-affine"] | None = Field(
        None, description="BatchNorm statistics: updated or frozen; frozen-affine: scale and shift as well."
    )
    image_size: int | None = Field(
        None, ge=8, description="Input size in pixels; default: the student's own."
    )
    recipe: str | None = Field(None, description="Recipe of live training views; with a cache, the cache's.")
    teacher_view: Literal["same", "eval"] | None = Field(
        None,
        description="same: teachers saw the student's view (default but for mlfd); eval: the clean view 0.",
    )
    batch_size: int | None = Field(None, ge=1, description="Images per step.")
    seed: int = Field(0, ge=0, description="Seed of initialisation and dropout.")
    data_seed: int = Field(0, ge=0, description="Seed of order and views.")
    amp: AmpName = Field("off", description="Mixed precision.")
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check the cache's checksums.", json_schema_extra=Mechanical
    )
    allow_partial: bool = Field(
        False, description="Train on the cached rows only, and say how many are missing."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    stage: Path | None = Field(
        None,
        description="Folder on a disk of this node: copy what is read of the cache there first.",
        json_schema_extra=Mechanical,
    )
    prewarm: bool = Field(
        False,
        description="Read the cache's files through once, so that the kernel has them in memory.",
        json_schema_extra=Mechanical,
    )
    resident: Literal["ram", "gpu"] | None = Field(
        None,
        description="Hold the teachers' outputs in memory (ram) or on the training device (gpu).",
        json_schema_extra=Mechanical,
    )
    compile: bool = Field(
        False, description="Run the student through torch.compile.", json_schema_extra=Mechanical
    )
    tracker: tuple[str, ...] = Field(
        (),
        description="Experiment tracker of accelerate, e.g. tensorboard or wandb; repeatable.",
        json_schema_extra=Mechanical,
    )
    overwrite: bool = Field(
        False, description="Start anew when the output holds another run.", json_schema_extra=Mechanical
    )
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
    )

    @field_validator("lr_grid")
    @classmethod
    def _known_rates(cls, text: str | None) -> str | None:
        if text is not None:
            learning_rates(text)
        return text

    @field_validator("milestones")
    @classmethod
    def _rising_shares(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is not None and not (
            shares == tuple(sorted(set(shares))) and all(0 < share < 1 for share in shares)
        ):
            raise ValueError("milestones are shares of the training between 0 and 1, each after the last")
        return shares

    @field_validator("old_new", mode="before")
    @classmethod
    def _known_ratio(cls, given: object) -> object:
        if isinstance(given, int) and given >= 60:  # YAML 1.1 reads 1:3 as the sexagesimal number 63
            given = "{}:{}".format(*divmod(given, 60))
        if given is not None:
            old_new_weight(str(given))
        return given


def learning_rates(text: str) -> tuple[float, ...]:
    """The rates of ``--lr-grid``: numbers between commas, or ``FIRST:LAST:COUNTlog``, evenly spaced in log.

    Returns:
        The rates, ascending, each once; a spaced one is rounded to four digits, so that it can be typed.

    Raises:
        ValueError: it is neither, holds fewer than two rates, or one that is not positive.
    """
    if len(rates := positive_numbers(text)) < 2:
        raise ValueError("must be two or more positive rates, as in 0.001,0.003,0.01 or 0.0001:0.1:7log")
    return tuple(rates)
