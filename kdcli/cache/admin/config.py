"""What the commands of ``kd cache`` can be told; those of ``kd cache plan`` are beside cache-teachers'."""

from pathlib import Path
from typing import ClassVar, Literal, final

from kdcli.options.common import (
    DataOptions,
    DataRootOption,
    DeviceOption,
    DryRunOption,
    HubOptions,
    OneCache,
    OneCacheRead,
    WorkersOption,
)
from kdcli.options.fields import Address, StepConfig, option


@final
class LsConfig(StepConfig):
    """``kd cache ls``."""

    command: ClassVar[str] = "cache ls"

    paths: tuple[Address, ...] = option(
        (), "Folders to search, caches, or URLs of pushed ones; default: this folder.",
        panel="Data", positional=True, metavar="PATH",
    )  # fmt: skip


@final
class InfoConfig(OneCacheRead):
    """``kd cache info``."""

    command: ClassVar[str] = "cache info"

    watch: bool = option(False, "Follow its writers until it is complete.", panel="Output")
    every: float | None = option(
        None, "Pause of --watch; default: 2 on a terminal, else 30.",
        panel="Output", metavar="SECONDS", ge=0.1, le=86400,
    )  # fmt: skip


@final
class DiffConfig(StepConfig):
    """``kd cache diff``."""

    command: ClassVar[str] = "cache diff"

    a: Path = option(..., "Cache folder.", panel="Data", positional=True)
    b: Path = option(..., "Cache folder to compare it with.", panel="Data", positional=True)


@final
class GcConfig(DryRunOption):
    """``kd cache gc``."""

    command: ClassVar[str] = "cache gc"

    caches: tuple[Path, ...] = option(
        ..., "Cache folders.", panel="Data", positional=True, metavar="CACHE", min_length=1
    )


@final
class RmConfig(OneCache):
    """``kd cache rm``."""

    command: ClassVar[str] = "cache rm"

    teacher: str | None = option(
        None, "Only this teacher, or one kind of its output.",
        panel="Teachers", metavar="NAME[/KIND]", complete="teacher",
    )  # fmt: skip
    yes: bool = option(False, "Do not ask.", panel="Run", flags=("-y",))
    force: bool = option(False, "Even while somebody writes it; else exit 23.", panel="Run")


@final
class VerifyConfig(OneCacheRead, DataRootOption, DeviceOption):
    """``kd cache verify``."""

    command: ClassVar[str] = "cache verify"

    teacher: tuple[str, ...] = option(
        (), "Check only this teacher, found now at SPEC. Repeatable.",
        panel="Teachers", metavar="NAME[=SPEC]", complete="teacher",
    )  # fmt: skip
    live: bool = option(False, "Also run each teacher on 64 cached images and compare.", panel="Teachers")
    data: str | None = option(None, "Where the images are now; default: as recorded.", panel="Data")


@final
class RepairConfig(OneCache, DataRootOption, DeviceOption, WorkersOption):
    """``kd cache repair``."""

    command: ClassVar[str] = "cache repair"

    data: str | None = option(None, "Where the images are now; default: as recorded.", panel="Data")
    teacher: tuple[str, ...] = option(
        (), "Where a teacher is now. Repeatable.", panel="Teachers", metavar="NAME=SPEC", complete="teacher"
    )
    accept: bool = option(False, "Keep outputs that come out otherwise than recorded.", panel="Run")


@final
class ExtendConfig(DataOptions, DryRunOption):
    """``kd cache extend``."""

    command: ClassVar[str] = "cache extend"

    cache: Address = option(
        ..., "Cache folder, or s3://, gs://, az://BUCKET/PATH.", panel="Data", positional=True, first=True
    )
    data: str | None = option(
        None, "Data set whose images are added: the new ones, or all of them.", panel="Data", positional=True
    )
    views: str | None = option(None, "eval+train:K: all views that the cache is to hold.", panel="Views")


@final
class PackConfig(OneCache):
    """``kd cache pack``."""

    command: ClassVar[str] = "cache pack"

    to: Path = option(..., "What to write: .h5, .zarr or .zarr.zip.", panel="Output", metavar="FILE")
    teacher: tuple[str, ...] = option(
        (), "Take only this teacher along. Repeatable.", panel="Teachers", metavar="NAME", complete="teacher"
    )
    compress: Literal["none", "gzip", "zstd"] = option(
        "none", "Compression; zstd: with .zarr only.", panel="Output"
    )
    overwrite: bool = option(False, "Replace the packed cache that is there.", panel="Output")


class NewCache(StepConfig):
    """Abstract: what makes a cache of others."""

    to: Path = option(..., "Folder of the new cache.", panel="Output", metavar="CACHE")


@final
class PushConfig(OneCache, HubOptions):
    """``kd cache push``."""

    command: ClassVar[str] = "cache push"

    to: str = option(
        ..., "s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, file:///PATH or hf://datasets/ORG/NAME.",
        panel="Output", positional=True, metavar="DEST",
    )  # fmt: skip


@final
class PullConfig(StepConfig):
    """``kd cache pull``."""

    command: ClassVar[str] = "cache pull"

    source: str = option(..., "What kd cache push was given.", panel="Data", positional=True, metavar="SRC")
    to: Path = option(
        ..., "Folder of the new cache, or of what was pulled before: it is completed.",
        panel="Output", metavar="CACHE",
    )  # fmt: skip
    teacher: tuple[str, ...] = option(
        (), "Pull only this teacher. Repeatable.", panel="Teachers", metavar="NAME", complete="teacher"
    )
    keep: tuple[str, ...] = option(
        (), "Pull only these kinds: logits, topk, features, maps, maps:TAP or pixels.",
        panel="Teachers", metavar="KIND,...", comma=True, complete="output",
    )  # fmt: skip
    views: str | None = option(
        None, "eval, or eval+train:K for the first K training views; default: all.", panel="Views"
    )


@final
class UnpackConfig(NewCache):
    """``kd cache unpack``."""

    command: ClassVar[str] = "cache unpack"

    packed: Path = option(..., "What kd cache pack wrote.", panel="Data", positional=True, metavar="FILE")
    backend: Literal["zarr", "hdf5"] | None = option(
        None, "Storage of the new cache; default: what the packed one had.", panel="Output"
    )


@final
class MergeConfig(NewCache):
    """``kd cache merge``."""

    command: ClassVar[str] = "cache merge"

    caches: tuple[Path, ...] = option(
        ..., "Caches of the same data.", panel="Data", positional=True, metavar="CACHE", min_length=1
    )
