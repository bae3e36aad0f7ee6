"""What ``kd report`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from kdcli.options.common import DataOptions, ForwardOptions, SeedOption, VerifyOption
from kdcli.options.fields import Address, option


@final
class ReportConfig(DataOptions, SeedOption, ForwardOptions, VerifyOption):
    """``kd report``. All inputs in one report; what does not belong into one table is refused."""

    command: ClassVar[str] = "report"

    inputs: tuple[Address, ...] = option(
        ..., "Runs, sweeps, joint teachers, caches (also by URL), comparisons, --json documents, or folders of these.",
        panel="Data", positional=True, metavar="RUN_OR_RESULT", min_length=1, there="anything",
    )  # fmt: skip
    data: str | None = option(
        None, "Labelled images for --tsne of the runs' exports.", panel="Data", there="data"
    )
    format: Literal["html", "md", "csv", "svg", "png"] = option(
        "html", "html: one page. md: one file of tables. csv, svg, png: a folder of tables or charts.",
        panel="Output",
    )  # fmt: skip
    out: Path | None = option(
        None, "File, or folder for csv, svg and png; default: report.html, report.md, report-csv, ...",
        panel="Output",
    )  # fmt: skip
    title: str = option("kd report", "Title of the report.", panel="Output")
    separate: bool = option(
        False, "Tables of their own for results of other protocols or test data, which are refused otherwise.",
        panel="Output",
    )  # fmt: skip
    images: bool = option(True, "Show thumbnails of images; --no-images for private data.", panel="Output")
    test_images: int = option(
        200, "Test images that the best students are run on again, for pictures, classes, calibration; 0: none.",
        panel="Output", ge=0, le=10**6,
    )  # fmt: skip
    tsne: bool = option(
        False, "Compute t-SNE of the cached teachers' features, and with --data of the exports'.",
        panel="Output",
    )  # fmt: skip
    tsne_images: int = option(1000, "Images of a t-SNE, drawn at random.", panel="Output", ge=10, le=10**6)
    perplexity: float = option(
        30.0, "Of t-SNE: about how many neighbours count.", panel="Output", gt=1, le=10**4
    )
