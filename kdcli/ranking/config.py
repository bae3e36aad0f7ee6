"""What ``kd rank-sources`` can be told: defaults, types and ranges."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field, field_validator

from kdcli.options.fields import Mechanical, StepConfig
from kdcli.registry import METRICS


@final
class RankConfig(StepConfig):
    """``kd rank-sources``. One of ``cache``, ``features`` + ``labels``, and ``ranking`` + ``against``."""

    command: ClassVar[str] = "rank-sources"

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
    metric: str = Field(
        "parc",
        description="Task-similarity metric, or your own as pkg.mod:OBJECT; all: the table of every metric, ranked "
        "by parc.",
    )
    variant: str | None = Field(
        None, description="Of the metric, such as bolya of parc: the same as --metric parc-bolya."
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

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        if name != "all":
            METRICS.find(name)
        return name
