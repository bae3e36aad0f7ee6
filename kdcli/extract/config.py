"""What ``kd cache-teachers`` can be told: defaults, types and ranges."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field, field_validator

from kdcli.errors import UsageError
from kdcli.options.fields import Mechanical, StepConfig
from kdcli.outputs import STATS, Output, parse_keep
from kdcli.types import AmpName, FloatName


@final
class CacheConfig(StepConfig):
    """``kd cache-teachers``."""

    command: ClassVar[str] = "cache-teachers"

    data: str | None = Field(
        None,
        description="Data set whose images the teachers see; default: what the cache recorded.",
        json_schema_extra={"positional": True},
    )
    cache: Path = Field(description="Cache folder, created when it is not there.")
    teacher: tuple[str, ...] = Field(min_length=1, description="[NAME=]SPEC of a teacher; repeatable.")
    keep: tuple[str, ...] = Field(
        ("logits", "features"),
        min_length=1,
        description="Outputs to keep: logits, topk:K, features, maps:TAP,TAP; each may end in @eval.",
        json_schema_extra={"comma": True},
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
        (1.0, 2.0, 4.0, 5.0),
        description="Temperatures whose fp32 logsumexp is kept.",
        json_schema_extra={"comma": True},
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
