"""Options that many commands have, each declared once: abstract models to inherit from.

What is ``shared`` is a matter of kd train-student's sweeps alone; other commands take no notice of it.
"""

import os
from pathlib import Path
from typing import Final, Literal, final

from pydantic import BaseModel, ConfigDict, field_validator

from kdcli.errors import UsageError
from kdcli.geometry import EvalGeometry
from kdcli.options.fields import Address, StepConfig, option
from kdcli.types import AmpChoice

MOST_WORKERS: Final = 1024
WORKERS_PER_CORE: Final = 16
"""Decode processes that ``--workers`` takes at most, in all and a processor."""


@final
class Common(BaseModel):
    """What every command takes beside its own options."""

    model_config = ConfigDict(frozen=True)

    config: Path | None = option(None, "YAML file with options; flags win.", panel="Common", metavar="FILE")
    sets: tuple[str, ...] = option(
        (), "Override one option. Repeatable.", panel="Common", metavar="KEY=VALUE", flags=("--set",)
    )
    print_config: bool = option(
        False, "Print as YAML what was chosen of the options, and exit.", panel="Common"
    )
    all_options: bool = option(False, "With --print-config: all options.", panel="Common", flags=("--all",))
    as_json: bool = option(
        False, "Print exactly one JSON document on stdout.", panel="Common", flags=("--json",)
    )
    quiet: bool = option(
        False, "Only warnings and errors on stderr, no narration.", panel="Common", flags=("-q",)
    )
    verbose: bool = option(False, "More narration on stderr.", panel="Common", flags=("-v",))


@final
class NoOptions(StepConfig):
    """Of a command that takes what all commands take, and no more."""


class StageOption(StepConfig):
    """Abstract: what is kept here of caches and images in a store."""

    stage_limit: float | None = option(
        None, "Most GB that is kept on this disk of caches and images in stores, in $KD_STAGE or the user's cache "
        "folder; default: what the disk has.",
        panel="Data", metavar="GB", gt=0, le=10**6, mechanical=True, shared=True,
    )  # fmt: skip


class CachesOption(StageOption):
    """Abstract: caches to read."""

    cache: tuple[Address, ...] = option(
        (), "Cache folder, or s3://, gs://, az://BUCKET/PATH, file:///PATH of a pushed one. Repeatable.",
        panel="Data", first=True, shared=True, there="cache", metavar="PATH",
    )  # fmt: skip


class OneCache(StepConfig):
    """Abstract: the cache that a command is about."""

    cache: Path = option(..., "Cache folder.", panel="Data", positional=True, first=True)


class OneCacheRead(StepConfig):
    """Abstract: the cache that a command reads."""

    cache: Address = option(
        ..., "Cache folder, or URL of a pushed one.", panel="Data", positional=True, first=True
    )


class DataRootOption(StepConfig):
    """Abstract: where data sets are found."""

    data_root: Path | None = option(
        None, "Folder of torch/ and hfds/ data sets, and of relative folders.", panel="Data", shared=True
    )


class DataOptions(StageOption, DataRootOption):
    """Abstract: where data sets are found, and whether they may be fetched."""

    download: bool = option(
        False, "Allow a data set to be downloaded.", panel="Data", mechanical=True, shared=True
    )
    exif: Literal["apply", "ignore"] = option(
        "apply", "Turn images as EXIF says, or not, as timm; DATA@exif=ignore, as which it is recorded, wins.",
        panel="Data", mechanical=True, shared=True,
    )  # fmt: skip


class BadImagesOption(StepConfig):
    """Abstract: what becomes of images that cannot be read."""

    bad_images: Literal["fail", "drop"] = option(
        "fail", "Images that cannot be read. fail: exit with 12. drop: leave them out, name and record them.",
        panel="Data", shared=True,
    )  # fmt: skip


class MultiLabelOption(StepConfig):
    """Abstract: what class names mean."""

    multi_label: str | None = option(
        None, "Class names are several labels joined by this, as in cat|dog; judged by mean average precision.",
        panel="Data", metavar="SEPARATOR", min_length=1, shared=True,
    )  # fmt: skip


class VerifyOption(StepConfig):
    """Abstract: trust in the bytes of a cache."""

    verify: Literal["never", "once", "always"] = option(
        "once", "When to check the cache's checksums.", panel="Run", mechanical=True, shared=True
    )


def known_geometry(text: str) -> str:
    """A value of ``--eval-geometry``, for a field validator.

    Raises:
        ValueError: it is none.
    """
    try:
        return str(EvalGeometry.parse(text))
    except UsageError as error:
        raise ValueError(f"{error.message}. {error.hint}") from error


def fixed_geometry(text: str | None) -> str | None:
    """The same where there is no model whose share of the image all others could take; or none.

    Raises:
        ValueError: it is none, or leaves the share open.
    """
    if text is None:
        return None
    known = known_geometry(text)
    if known.partition("+")[0] == "shared":
        raise ValueError("give the share: shared:CROP, e.g. shared:0.875")
    return known


class PartialOption(StepConfig):
    """Abstract: whether a cache may be incomplete."""

    allow_partial: bool = option(
        False, "Go on without rows that are not cached yet, and say how many.", panel="Data", shared=True
    )


class SeedOption(StepConfig):
    """Abstract: what is drawn at random."""

    seed: int = option(0, "Seed of what is drawn at random.", panel="Run", ge=0, lt=2**32)


class DeviceOption(StepConfig):
    """Abstract: where networks run."""

    device: str = option(
        "auto", "auto, cpu, cuda or cuda:N.", panel="Run", mechanical=True, shared=True, complete="device"
    )


class WorkersOption(StepConfig):
    """Abstract: who decodes images."""

    workers: int | None = option(
        None, "Decode processes; default: one a processor, but one.",
        panel="Run", ge=0, mechanical=True, shared=True,
    )  # fmt: skip

    @field_validator("workers")
    @classmethod
    def _within_reason(cls, workers: int | None) -> int | None:
        """Many processes on few processors only fill the memory; a pool far beyond them is a slip."""
        cores = os.cpu_count() or 1
        if workers is not None and workers > min(MOST_WORKERS, WORKERS_PER_CORE * cores):
            most = min(MOST_WORKERS, WORKERS_PER_CORE * cores)
            raise ValueError(f"at most {most} on a machine of {cores} cores")
        return workers


class ForwardOptions(DeviceOption, WorkersOption):
    """Abstract: how images go through a network where the batch size changes nothing."""

    batch_size: int = option(64, "Images per forward.", panel="Run", ge=1, mechanical=True, le=2**20)


class AmpOption(StepConfig):
    """Abstract: precision of what a network computes."""

    amp: AmpChoice = option(
        "auto", "Precision. off: float32. tf32, bf16, fp16: faster on cards. auto: bf16 where a card has it, else off; "
        "of what was begun, as it was.",
        panel="Run", metavar="HOW", shared=True,
    )  # fmt: skip


class ExactAmpOption(StepConfig):
    """Abstract: precision where figures of several machines are compared: the same unless it is asked otherwise."""

    amp: AmpChoice = option(
        "off", "Precision of forwards. off: float32, the same figures everywhere. tf32, bf16, fp16: faster on cards. "
        "auto: bf16 where a card has it.",
        panel="Run", metavar="HOW",
    )  # fmt: skip


class OverwriteOption(StepConfig):
    """Abstract: what becomes of an earlier result."""

    overwrite: bool = option(
        False, "Start anew where --out holds another run.", panel="Output", mechanical=True, shared=True
    )


class HubOptions(StepConfig):
    """Abstract: on which terms something goes to the Hugging Face hub."""

    licence: str | None = option(
        None, "Licence of what goes to hf://, by the hub's identifiers (cc-by-4.0, apache-2.0, ...), or other:NAME.",
        panel="Output", metavar="ID",
    )  # fmt: skip
    private: bool = option(
        False, "Where hf:// has to be made, let only its owners see it; default: as the hub does, mostly public.",
        panel="Output",
    )  # fmt: skip


class DryRunOption(StepConfig):
    """Abstract: look before you leap."""

    dry_run: bool = option(False, "Say what would be done; write nothing.", panel="Run", mechanical=True)
