"""What ``kd fuse-teachers`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator

from kdcli.options.fields import Mechanical, StepConfig
from kdcli.types import FloatName


@final
class FuseConfig(StepConfig):
    """``kd fuse-teachers``."""

    command: ClassVar[str] = "fuse-teachers"

    cache: tuple[Path, ...] = Field(
        min_length=1,
        description="Cache of a data set with labels; repeatable.",
        json_schema_extra=Mechanical,
    )
    teacher: tuple[str, ...] = Field(min_length=1, description="Cached teacher to fuse; repeatable.")
    tap: tuple[str, ...] = Field((), description="TEACHER=TAP: the map to fuse of a teacher; repeatable.")
    levels: Literal["L1", "L2", "L3", "L4"] = Field("L2", description="Levels of features (P4 Table 4).")
    heads: Literal["shared", "per-data-set"] = Field(
        "shared",
        description="One joint teacher with a head a data set (P4 Algorithm 1), or one a data set (P4's code).",
    )
    out: Path = Field(description="Output folder.", json_schema_extra=Mechanical)
    map_channels: tuple[int, ...] = Field(
        (),
        description="Channels of fused, fused2, ...: those of the student there; default 512 each.",
        json_schema_extra={"comma": True},
    )
    map_size: int | None = Field(None, ge=1, description="Interpolate maps to this height and width.")
    space: int = Field(4096, ge=1, description="Channels to which each teacher's map is brought.")
    projection: int | None = Field(
        None, ge=1, description="At L1, width to which each teacher's embedding is brought."
    )
    dropout: float = Field(0.8, ge=0, lt=1, description="Before every head.")
    test: tuple[Path, ...] = Field(
        (),
        description="Cache of test images, one for each --cache and in that order.",
        json_schema_extra=Mechanical,
    )
    validation: float | None = Field(
        None, gt=0, lt=1, description="Share of the labelled images to set aside and judge every epoch on."
    )
    select: Literal["last", "best", "best-on-test"] = Field(
        "last",
        description="Which epoch is kept; best: by the validation split; best-on-test: as P4 did, marked so.",
    )
    epochs: int = Field(50, ge=1, description="Passes over the data.")
    batch_size: int = Field(240, ge=4, description="Images a step.")
    optimizer: Literal["adam", "adamw"] = Field("adamw", description="Optimiser.")
    lr: float = Field(1e-4, gt=0, description="Learning rate.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning-rate schedule.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of each label spread over all classes."
    )
    seed: int = Field(0, ge=0, description="Seed of the weights, of dropout and of the order.")
    data_seed: int = Field(0, ge=0, description="Seed of the validation split.")
    write_back: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name under which every cache is to keep the joint teacher's outputs.",
        json_schema_extra=Mechanical,
    )
    dtype: FloatName = Field(
        "float16", description="Storage type of what is written back.", json_schema_extra=Mechanical
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.", json_schema_extra=Mechanical)
    verify: Literal["never", "once", "always"] = Field(
        "once", description="When to check the cache's checksums.", json_schema_extra=Mechanical
    )
    overwrite: bool = Field(
        False, description="Start anew when the output holds another run.", json_schema_extra=Mechanical
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
