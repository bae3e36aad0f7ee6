"""What ``kd cache-teachers`` and ``kd cache plan`` can be told."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, final

from pydantic import Field, field_validator

from kdcli.engines.config import EngineOptions
from kdcli.errors import UsageError
from kdcli.models.arguments import parse_arguments
from kdcli.models.grammar import parse_size
from kdcli.options.common import (
    AmpOption,
    BadImagesOption,
    DataOptions,
    DeviceOption,
    DryRunOption,
    WorkersOption,
    known_geometry,
)
from kdcli.options.fields import Address, option
from kdcli.outputs import STATS, Output, parse_keep
from kdcli.types import DecodeMode, FloatName

Value = TypeVar("Value")
DEFAULT_BATCH = 64
"""Images per forward: what fills a processor, and with views beside each other a card."""


class CacheOptions(
    EngineOptions, DataOptions, BadImagesOption, AmpOption, DeviceOption, WorkersOption, DryRunOption
):
    """Abstract: what a cache is to hold, and how it is filled."""

    data: str | None = option(
        None, "Data set: SOURCE[@key=value,...]; a bare path is a folder. Default: what the cache recorded.",
        panel="Data", positional=True, there="data",
    )  # fmt: skip
    cache: Address = option(
        ..., "Cache folder, or s3://, gs://, az://BUCKET/PATH that writers share; created when it is not there.",
        panel="Data", metavar="PATH",
    )  # fmt: skip
    teacher: tuple[str, ...] = option(
        ..., "A teacher: a model spec. Repeatable.",
        panel="Teachers", metavar="[NAME=]SPEC", min_length=1, complete="model", there="model",
    )  # fmt: skip
    teacher_size: tuple[str, ...] = option(
        (), "Size of the images that a teacher, or each, is shown, as 224 or HEIGHTxWIDTH; recorded. Default: its own. "
        "Repeatable.",
        panel="Teachers", metavar="[NAME=]SIZE",
    )  # fmt: skip
    teacher_arg: tuple[str, ...] = option(
        (), "An argument of the library that builds a teacher, or each of them, such as global_pool=token; recorded. "
        "Repeatable.",
        panel="Teachers", metavar="[NAME=]K=V",
    )  # fmt: skip
    keep: tuple[str, ...] = option(
        ("logits", "features"),
        "Outputs to keep: logits, topk:K, features, maps:TAP,TAP, tokens (the last map), pixels; @poolN after a map: "
        "averaged over N x N places, of clips @poolTxN; @eval after one: of view 0 only.",
        panel="Teachers", comma=True, min_length=1, complete="output",
    )  # fmt: skip
    dtype: FloatName = option("float16", "Storage type of logits, features and maps.", panel="Teachers")
    temperatures: tuple[Annotated[float, Field(ge=0.001, le=1000)], ...] = option(
        (1.0, 2.0, 4.0, 5.0), "Temperatures whose fp32 logsumexp is kept.",
        panel="Teachers", comma=True, metavar="T,T",
    )  # fmt: skip
    min_accuracy: float | None = option(
        None, "Refuse a teacher that gets a smaller share of some labelled images right.",
        panel="Teachers", metavar="SHARE", ge=0, le=1, mechanical=True,
    )  # fmt: skip
    min_accuracy_images: int = option(
        256, "Images that --min-accuracy looks at.", panel="Teachers", ge=1, mechanical=True, le=10**7
    )
    views: str | None = option(
        None, "eval, or eval+train:K for K replayable training views; default: the cache's, else eval.",
        panel="Views",
    )  # fmt: skip
    recipe: str | None = option(
        None, "Recipe of the training views; default: the cache's, else imagenet.",
        panel="Views", complete="recipe",
    )  # fmt: skip
    eval_geometry: str | None = option(
        None, "What view 0 shows a model: own, what timm's evaluation shows it; shared[:CROP], one centred square for "
        "all; whole, the image squeezed; +clips:N, so many clips of a video, averaged. Default: a cached teacher's "
        "recorded one, else own.",
        panel="Views", metavar="HOW", complete="geometry",
    )  # fmt: skip
    decode: DecodeMode | None = option(
        None, "exact, or scaled: large JPEG photos are decoded at 1/2, 1/4 or 1/8 of their sides, where that leaves "
        "twice the pixels that a view needs; recorded. Default: the cache's, else exact.",
        panel="Views",
    )  # fmt: skip
    backend: Literal["zarr", "hdf5"] | None = option(
        None, "Storage of a new cache; default: zarr.", panel="Run"
    )
    batch_size: int | Literal["auto"] = option(
        DEFAULT_BATCH, "Images per forward, or auto: as many as the device's memory takes, up to what fills it; "
        "recorded, and reused by a resume.", panel="Run", metavar="N",
    )  # fmt: skip
    compile: bool = option(
        False, "Run the teachers through torch.compile; recorded, and reused by a resume.", panel="Run"
    )
    block_rows: int | None = option(
        None,
        "Rows per block, a multiple of 32; default: by size.",
        panel="Run",
        ge=32,
        multiple_of=32,
        le=2**24,
    )
    buffer_gb: float = option(
        1.0, "Memory for the outputs of one task, in GB.", panel="Run", metavar="GB", gt=0, le=10**5
    )
    shard: str | None = option(
        None, "Do only this share of the blocks: I/N, array, srun or torchrun.",
        panel="Run", metavar="I/N", mechanical=True, complete="shard",
    )  # fmt: skip
    wait: bool = option(
        True, "Wait for work that other live writers hold; --no-wait: exit 23 instead.",
        panel="Run", mechanical=True,
    )  # fmt: skip
    claim_timeout: float | None = option(
        None, "A writer that is silent for so long loses its claims; a new cache records it. Default: its own, or 600.",
        panel="Run", metavar="SECONDS", ge=1, mechanical=True, le=10**6,
    )  # fmt: skip
    grace: float = option(
        20.0, "Seconds a stop signal leaves for the current task.",
        panel="Run", metavar="SECONDS", ge=0, mechanical=True, le=10**6,
    )  # fmt: skip

    @field_validator("eval_geometry")
    @classmethod
    def _known_geometry(cls, text: str | None) -> str | None:
        return text if text is None else known_geometry(text)

    @field_validator("teacher_size")
    @classmethod
    def _known_sizes(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            _checked(parse_size, split_size(text)[1])
        return texts

    @field_validator("teacher_arg")
    @classmethod
    def _known_arguments(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            _checked(lambda words: parse_arguments(words, "--teacher-arg"), [split_argument(text)[1]])
        return texts

    @field_validator("batch_size", mode="before")
    @classmethod
    def _known_batch_size(cls, value: object) -> object:
        """A number, or auto."""
        if value == "auto":
            return value
        try:
            size = int(str(value))
        except ValueError:
            size = 0
        if not 1 <= size <= 2**20:
            raise ValueError(f"must be a number from 1 to {2**20}, or auto")
        return size

    @field_validator("keep")
    @classmethod
    def _known_outputs(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """One word an output, so that a file, a flag and a hint mean the same."""
        return tuple(str(output) for output in _outputs(words) if output.kind != STATS)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What is kept, the statistics that come with it included."""
        return parse_keep(self.keep)


@final
class CacheConfig(CacheOptions):
    """``kd cache-teachers``."""

    command: ClassVar[str] = "cache-teachers"


@final
class PlanConfig(CacheOptions):
    """``kd cache plan``: the options of cache-teachers, and how closely to look."""

    command: ClassVar[str] = "cache plan"

    measure: bool = option(
        False, "Run a few batches and a temporary write: says hours and what bounds them.", panel="Run"
    )

    @property
    def step(self) -> CacheConfig:
        """What is planned."""
        return CacheConfig(**self.model_dump(exclude={"measure"}))


def split_size(text: str) -> tuple[str, str]:
    """``[NAME=]SIZE``: the name, empty for all teachers, and the size."""
    name, _, size = text.rpartition("=")
    return name, size


def split_argument(text: str) -> tuple[str, str]:
    """``[NAME=]KEY=VALUE``: the name, empty for all teachers, and KEY=VALUE."""
    name, _, argument = text.partition("=") if text.count("=") > 1 else ("", "", text)
    return name, argument


def _checked(read: Callable[[Any], Value], given: Any) -> Value:
    try:
        return read(given)
    except UsageError as error:
        raise ValueError(f"{error.message}. {error.hint}") from error


def _outputs(words: tuple[str, ...]) -> tuple[Output, ...]:
    return _checked(parse_keep, words)
