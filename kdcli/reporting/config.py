"""What ``kd report`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field

from kdcli.options.fields import Mechanical, StepConfig


@final
class ReportConfig(StepConfig):
    """``kd report``. All inputs in one report; what does not belong into one table is refused."""

    command: ClassVar[str] = "report"

    inputs: tuple[Path, ...] = Field(
        min_length=1,
        description="Runs, sweeps, joint teachers, caches, comparisons, JSON documents of kd, or folders of these.",
        json_schema_extra={"positional": True},
    )
    format: Literal["html", "md", "csv", "svg", "png"] = Field(
        "html",
        description="html: one page; md: one file of tables; csv, svg, png: a folder of tables or charts.",
    )
    out: Path | None = Field(
        None,
        description="File, or folder for csv, svg and png; default: report.html, report.md, report-csv, ...",
    )
    title: str = Field("kd report", description="Of the report.")
    separate: bool = Field(
        False, description="Give results of different protocols or test data tables of their own."
    )
    tsne: bool = Field(
        False, description="Compute t-SNE of the cached teachers' features, and with --data of the exports'."
    )
    data: str | None = Field(None, description="Labelled images for --tsne of the runs' exports.")
    tsne_images: int = Field(1000, ge=10, description="Images of a t-SNE, drawn at random.")
    perplexity: float = Field(30.0, gt=1, description="Of t-SNE: about how many neighbours count.")
    seed: int = Field(0, ge=0, description="Seed of the images drawn and of t-SNE.")
    batch_size: int = Field(64, ge=1, description="Images per forward.", json_schema_extra=Mechanical)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    workers: int | None = Field(
        None,
        ge=0,
        description="Decode processes; default: the processors of this job.",
        json_schema_extra=Mechanical,
    )
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check a cache's checksums.", json_schema_extra=Mechanical
    )
    data_root: Path | None = Field(
        None, description="Folder of torch/ and hfds/ data sets, and of relative folders."
    )
    download: bool = Field(
        False, description="Allow a data set to be downloaded.", json_schema_extra=Mechanical
    )
