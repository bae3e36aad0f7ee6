"""What ``kd fuse-teachers`` can be told."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field, model_validator

from kdcli.options.common import DeviceOption, OverwriteOption, SeedOption, VerifyOption
from kdcli.options.fields import option
from kdcli.options.learning import LearningOptions, Schedule, with_default
from kdcli.types import FloatName


@final
class FuseConfig(SeedOption, DeviceOption, VerifyOption, OverwriteOption, LearningOptions):
    """``kd fuse-teachers``."""

    command: ClassVar[str] = "fuse-teachers"

    cache: tuple[Path, ...] = option(
        ...,
        "Cache of a data set with labels. Repeatable.",
        panel="Data",
        min_length=1,
        mechanical=True,
        there="cache",
    )
    test: tuple[Path, ...] = option(
        (), "Cache of test images, one for each --cache and in that order. Repeatable.",
        panel="Data", mechanical=True, there="cache",
    )  # fmt: skip
    validation: float | None = option(
        None, "Share of the labelled images to set aside and judge every epoch on.",
        panel="Data", metavar="SHARE", gt=0, lt=1,
    )  # fmt: skip
    data_seed: int = option(0, "Seed of the validation split.", panel="Data", ge=0, lt=2**32)
    teacher: tuple[str, ...] = option(
        ..., "Cached teacher to fuse, two at least. Repeatable.",
        panel="Teachers", metavar="NAME", min_length=1, complete="teacher",
    )  # fmt: skip
    tap: tuple[str, ...] = option(
        (), "The map to fuse of a teacher; default: by its size. Repeatable.",
        panel="Teachers", metavar="TEACHER=TAP",
    )  # fmt: skip
    levels: Literal["L1", "L2", "L3", "L4"] = option(
        "L2", "L1: embeddings. L2, L3, L4: maps of stride 32, 16, 8, too (P4 Table 4).", panel="Method"
    )
    heads: Literal["shared", "per-data-set"] = option(
        "shared", "One joint teacher with a head a data set (P4 Algorithm 1), or one a data set (P4's code).",
        panel="Method",
    )  # fmt: skip
    map_channels: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = option(
        (), "Channels of fused, fused2, ...: those of the student there; default: 512 each.",
        panel="Method", comma=True, metavar="N,N",
    )  # fmt: skip
    map_size: int | None = option(
        None, "Interpolate all maps to this height and width.", panel="Method", ge=1, le=1024
    )
    space: int = option(
        4096, "Channels to which each teacher's map is brought.", panel="Method", ge=1, le=2**16
    )
    projection: int | None = option(
        None, "At L1, width to which each teacher's embedding is brought.", panel="Method", ge=1, le=2**16
    )
    dropout: float = option(0.8, "Before every head.", panel="Method", metavar="SHARE", ge=0, lt=1)
    # P4 section 4.4 and Table 1, of the networks of its first set (240: EfficientNet-B0's). No numbers of the joint
    # teacher's own are printed; the released code trains L1 by Adam at 2e-4 without decay, batches of 2048.
    epochs: int = with_default(LearningOptions, "epochs", 200)
    batch_size: int = with_default(LearningOptions, "batch_size", 240)
    optimizer: str = with_default(LearningOptions, "optimizer", "adam")
    lr: float = with_default(LearningOptions, "lr", 1e-4)
    weight_decay: float = with_default(LearningOptions, "weight_decay", 1e-3)
    schedule: Schedule = with_default(LearningOptions, "schedule", "constant")
    label_smoothing: float = with_default(LearningOptions, "label_smoothing", 0.0)
    accumulate: int = with_default(LearningOptions, "accumulate", 1)
    init: Literal["random", "xavier"] = option(
        "random", "random: torch's own start. xavier: N(0, 2 / (d_in + d_out)), as P4 starts networks.",
        panel="Optimisation",
    )  # fmt: skip
    select: Literal["last", "best", "best-on-test"] = option(
        "last", "Epoch to keep. best: by --validation. best-on-test: as P4 did, and marked so.",
        panel="Optimisation",
    )  # fmt: skip
    out: Path = option(..., "Output folder.", panel="Output", metavar="DIR", mechanical=True, there="free")
    write_back: str | None = option(
        None, "Keep its outputs in every cache, as the teacher NAME.",
        panel="Output", metavar="NAME", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", mechanical=True,
    )  # fmt: skip
    dtype: FloatName = option(
        "float16", "Storage type of what is written back.", panel="Output", mechanical=True
    )

    @model_validator(mode="after")
    def _judged_by_what_is_there(self) -> "FuseConfig":
        if self.select == "best" and self.validation is None:
            raise ValueError("--select best needs --validation SHARE; a test set never selects unasked")
        if self.select == "best-on-test" and not self.test:
            raise ValueError("--select best-on-test needs --test CACHE")
        if self.test and len(self.test) != len(self.cache):
            raise ValueError(
                f"--test is given {len(self.test)} times and --cache {len(self.cache)} times: one for each"
            )
        for word in self.tap:
            name, equals, tap = word.partition("=")
            if not (name and equals and tap):
                raise ValueError(f"--tap {word} is not TEACHER=TAP")
        return self

    @property
    def taps(self) -> dict[str, str]:
        """The named map of each teacher."""
        return {name: tap for name, _, tap in (word.partition("=") for word in self.tap)}
