"""What caching and ranking can be told, and the base of all steps: defaults, types and ranges.

Fields marked ``mechanical`` do not change results; all others are part of a run's identity.
"""

from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.config import JsonDict

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
