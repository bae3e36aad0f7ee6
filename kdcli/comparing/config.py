"""What ``kd compare`` can be told."""

from pathlib import Path
from typing import ClassVar, final

from kdcli.options.common import (
    CachesOption,
    DataOptions,
    ExactAmpOption,
    ForwardOptions,
    PartialOption,
    VerifyOption,
)
from kdcli.options.fields import option


@final
class CompareConfig(CachesOption, DataOptions, PartialOption, ForwardOptions, ExactAmpOption, VerifyOption):
    """``kd compare``. Two models at least, on ``data`` or on what the caches hold."""

    command: ClassVar[str] = "compare"

    models: tuple[str, ...] = option(
        (), "Cached teacher, run of kd train-student, folder of runs, or model spec; default: all cached.",
        panel="Data", positional=True, metavar="[NAME=]MODEL", complete="teacher",
    )  # fmt: skip
    test: str | None = option(
        None, "Labelled images to compare on; default: all that the cache holds.", panel="Data", there="data"
    )
    teacher: tuple[str, ...] = option(
        (), "Model that is a teacher in the pairs; default: all. Repeatable.",
        panel="Teachers", metavar="NAME", complete="teacher",
    )  # fmt: skip
    student: tuple[str, ...] = option(
        (), "Model that is a student in the pairs; default: all. Repeatable.",
        panel="Teachers", metavar="NAME", complete="teacher",
    )  # fmt: skip
    pair: tuple[str, ...] = option(
        (),
        "Pair to measure; default: every ordered one. Repeatable.",
        panel="Teachers",
        metavar="TEACHER,STUDENT",
    )
    after: tuple[str, ...] = option(
        (), "STUDENT after it was distilled, where no run says so; several teachers as A+B. Repeatable.",
        panel="Teachers", metavar="METHOD,TEACHER,STUDENT=MODEL",
    )  # fmt: skip
    class_similarity: str | None = option(
        None, "Square matrix of class similarities, .npy or .csv, in the order of the classes; or a CLIP, "
        "transformers/DIR-or-ID, that makes it of their names.",
        panel="Method", metavar="FILE",
    )  # fmt: skip
    generalist: str | None = option(
        None, "Model whose class means stand in for --class-similarity; default: the most accurate.",
        panel="Method", metavar="NAME", complete="teacher",
    )  # fmt: skip
    equal_within: float = option(
        0.01, "Difference in accuracy up to which a teacher counts as equal.", panel="Method", ge=0, le=1
    )
    bins: int = option(5, "Bins of the difference in accuracy.", panel="Method", ge=1, le=1000)
    out: Path | None = option(
        None, "Keep predictions and the result there; what is kept is not run again.",
        panel="Output", metavar="DIR", mechanical=True,
    )  # fmt: skip
    figures: Path | None = option(
        None, "Folder for P3's figures.", panel="Output", metavar="DIR", mechanical=True
    )
