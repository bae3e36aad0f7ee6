"""What each step can be told, with defaults, types and ranges.

Fields marked ``mechanical`` do not change results; all others are part of a run's identity.
"""

import re
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.config import JsonDict

from kdcli.config.grids import positive_numbers
from kdcli.config.mlfd import MlfdOptions
from kdcli.config.transfer import TransferOptions
from kdcli.errors import UsageError
from kdcli.outputs import STATS, Output, parse_keep
from kdcli.types import AmpName, FloatName

Mechanical: JsonDict = {"mechanical": True}


class StepConfig(BaseModel):
    """Base of all step configurations: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The fields that change results, as JSON values."""
        document: dict[str, Any] = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("mechanical"):
                del document[name]
        return document


@final
class CacheConfig(StepConfig):
    """``kd cache-teachers``."""

    data: str | None = Field(
        None, description="Data set whose images the teachers see; default: what the cache recorded."
    )
    cache: Path = Field(description="Cache folder, created when it is not there.")
    teacher: tuple[str, ...] = Field(min_length=1, description="[NAME=]SPEC of a teacher; repeatable.")
    keep: tuple[str, ...] = Field(
        ("logits", "features"),
        min_length=1,
        description="Outputs to keep: logits, topk:K, features, maps:TAP,TAP; each may end in @eval.",
    )
    backend: Literal["zarr", "hdf5"] | None = Field(
        None, description="Storage of a new cache: zarr (default) or hdf5."
    )
    views: str | None = Field(
        None,
        description="eval, or eval+train:K for K replayable training views; default: the cache's, else eval.",
    )
    recipe: str | None = Field(
        None, description="Recipe of the training views; default: the cache's, else imagenet."
    )
    eval_crop: float | None = Field(
        None, gt=0, le=1, description="Crop fraction of view 0; default: the first teacher's."
    )
    dtype: FloatName = Field("float16", description="Storage type of logits and features.")
    amp: AmpName = Field("off", description="Mixed precision of the teachers' forward.")
    temperatures: tuple[float, ...] = Field(
        (1.0, 2.0, 4.0, 5.0), description="Temperatures whose fp32 logsumexp is kept."
    )
    batch_size: int = Field(64, ge=1, description="Images per forward; recorded and reused by a resume.")
    block_rows: int | None = Field(
        None, ge=32, multiple_of=32, description="Rows per block, a multiple of 32; default: by size."
    )
    buffer_gb: float = Field(1.0, gt=0, description="Memory for the outputs of one task, in GB.")
    min_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Refuse a teacher that gets fewer of some labelled images right.",
        json_schema_extra=Mechanical,
    )
    min_accuracy_images: int = Field(
        256, ge=1, description="Images that --min-accuracy looks at.", json_schema_extra=Mechanical
    )
    bad_images: Literal["fail", "drop"] = Field(
        "fail", description="fail: finish the rest, list every bad file, exit 12; drop: record them absent."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    shard: str | None = Field(
        None,
        description="i/n: do only this share of the blocks; also array, srun or torchrun.",
        json_schema_extra=Mechanical,
    )
    wait: bool = Field(
        True,
        description="Wait for work that other live writers hold; --no-wait exits 23 instead.",
        json_schema_extra=Mechanical,
    )
    grace: float = Field(
        20.0,
        ge=0,
        description="Seconds a stop signal leaves for the current task.",
        json_schema_extra=Mechanical,
    )
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
    )
    dry_run: bool = Field(
        False, description="Print what would be done; write nothing.", json_schema_extra=Mechanical
    )

    @field_validator("keep")
    @classmethod
    def _known_outputs(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """One word an output, so that a file, a flag and a hint mean the same."""
        return tuple(str(output) for output in _outputs(words) if output.kind != STATS)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What is kept, the statistics that come with it included."""
        return parse_keep(self.keep)


def _outputs(words: tuple[str, ...]) -> tuple[Output, ...]:
    try:
        return parse_keep(words)
    except UsageError as error:
        raise ValueError(f"{error.message} {error.hint}") from error


MetricName = Literal[
    "parc",
    "parc-standardised",
    "parc-bolya",
    "cka",
    "cka-rbf",
    "cka-debiased",
    "rsa",
    "logme",
    "leep",
    "nleep",
    "nce",
    "hscore",
    "knn",
    "linear-probe",
]


@final
class RankConfig(StepConfig):
    """``kd rank-sources``. One of ``cache``, ``features`` + ``labels``, and ``ranking`` + ``against``."""

    cache: tuple[Path, ...] = Field((), description="Cache folder; repeatable.")
    features: Path | None = Field(None, description="Folder of .npy files [n, d], one a source; no cache.")
    labels: Path | None = Field(
        None,
        description="With --features: .npy file of the labels, [n], or 0/1 rows [n, l] of images with several.",
    )
    ranking: tuple[Path, ...] = Field(
        (), description="Rankings made before, one a target, to compare with --against. Repeatable."
    )
    teacher: tuple[str, ...] = Field((), description="Cached teachers to rank; default all. Repeatable.")
    exclude: tuple[str, ...] = Field((), description="Cached teachers to leave out. Repeatable.")
    data: str | None = Field(
        None, description="Rank on this part of the cached data (and with its labels); default: all of it."
    )
    metric: Literal[MetricName, "all"] = Field(
        "parc", description="Task-similarity metric; all: the table of every metric, ranked by parc."
    )
    variant: Literal["plain", "standardised", "bolya"] | None = Field(
        None, description="Preparation of PARC's features; default: plain."
    )
    on: Literal["features", "pseudo"] | None = Field(
        None, description="Representation: features (default) or softmax outputs; default: the metric's."
    )
    probe_size: int = Field(500, ge=4, description="Images of the probe set.")
    repeats: int = Field(1, ge=1, description="Probe sets of consecutive seeds; scores are their means.")
    scheme: Literal["weighted", "nearest", "equal", "random-weights", "inverse"] = Field(
        "weighted", description="How scores become weights; weighted is P2 Eq. 5."
    )
    power: float = Field(
        12.0, ge=0, description="Power p of the weights (P2 Eq. 5); 0 is equal, inf is nearest."
    )
    sources: int | None = Field(None, ge=1, description="Give weight to this many of the best only.")
    against: tuple[str, ...] = Field(
        (), description="Results of students to compare the scores with: files, folders or patterns."
    )
    top: int = Field(3, ge=1, description="k of the top-k relative accuracies of --against.")
    plot: Path | None = Field(
        None, description="Folder for P2's figures of --against.", json_schema_extra=Mechanical
    )
    seed: int = Field(0, ge=0, description="Seed of the probe set, of random weights and of resampling.")
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check the cache's checksums.", json_schema_extra=Mechanical
    )
    allow_partial: bool = Field(False, description="Go on when rows are not cached yet, and say how many.")
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )


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
class TrainConfig(TransferOptions, MlfdOptions, StepConfig):
    """``kd train-student``. ``None`` means: the method's default (printed and recorded)."""

    @property
    def first_data(self) -> str:
        """DATA, of several the first without its name: the one that teachers have seen."""
        return self.data if isinstance(self.data, str) else self.data[0].partition("=")[2]

    data: str | tuple[str, ...] = Field(
        description="Data set the student trains on, or several of them, each as NAME=DATA."
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
        None, description="Shares of the training at which the schedule step multiplies the rate by 0.1."
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
