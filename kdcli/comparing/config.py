"""What ``kd compare`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field

from kdcli.options.fields import Mechanical, StepConfig


@final
class CompareConfig(StepConfig):
    """``kd compare``. Two models at least, on ``data`` or on what the caches hold."""

    command: ClassVar[str] = "compare"

    models: tuple[str, ...] = Field(
        (),
        description="[NAME=]MODEL: a cached teacher, a run of kd train-student, a folder of runs, or a model spec.",
        json_schema_extra={"positional": True},
    )
    cache: tuple[Path, ...] = Field((), description="Cache folder; repeatable. Its teachers need no forward.")
    data: str | None = Field(
        None, description="Labelled images to compare on; default: all that the cache holds."
    )
    teacher: tuple[str, ...] = Field((), description="Models that are teachers in the pairs; default all.")
    student: tuple[str, ...] = Field((), description="Models that are students in the pairs; default all.")
    after: tuple[str, ...] = Field(
        (), description="METHOD,TEACHER,STUDENT=MODEL: STUDENT after it was distilled, where no run says so."
    )
    class_similarity: Path | None = Field(
        None, description="Square matrix of class similarities, .npy or .csv, in the order of the classes."
    )
    generalist: str | None = Field(
        None,
        description="Model whose class means stand in for --class-similarity; default: the most accurate.",
    )
    equal_within: float = Field(
        0.01, ge=0, le=1, description="Difference in accuracy up to which a teacher counts as equal."
    )
    bins: int = Field(5, ge=1, description="Bins of the difference in accuracy.")
    out: Path | None = Field(
        None, description="Folder for predictions and the result.", json_schema_extra=Mechanical
    )
    figures: Path | None = Field(None, description="Folder for P3's figures.", json_schema_extra=Mechanical)
    batch_size: int = Field(64, ge=1, description="Images per forward.", json_schema_extra=Mechanical)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check the cache's checksums.", json_schema_extra=Mechanical
    )
    allow_partial: bool = Field(False, description="Go on when rows are not cached yet, and say how many.")
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
    )
