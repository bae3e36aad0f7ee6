"""``--engine`` and what belongs to it: how many processes do the work of one command, and who runs them."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from kdcli.options.fields import StepConfig, option


class EngineOptions(StepConfig):
    """Abstract: several processes of one command."""

    engine: Literal["local", "submitit", "ray"] | None = option(
        None, "Share the work among supervised processes: on this machine, by Slurm (submitit), or on Ray.",
        panel="Workers", mechanical=True,
    )  # fmt: skip
    num_workers: int = option(
        1, "How many processes the engine keeps at work.", panel="Workers", ge=1, le=4096, mechanical=True
    )
    cpus_per_worker: int | None = option(
        None, "Processors of each; default: its share of this machine's (local), else 1.",
        panel="Workers", ge=1, le=4096, mechanical=True,
    )  # fmt: skip
    gpus_per_worker: int | None = option(
        None, "GPUs of each; default: one, shared where there are fewer (local), else none.",
        panel="Workers", ge=0, le=64, mechanical=True,
    )  # fmt: skip
    address: str | None = option(
        None, "Ray's head, as HOST:PORT, auto or local; submitit's cluster, slurm or local. Default: auto; slurm.",
        panel="Workers", mechanical=True,
    )  # fmt: skip
    slurm: tuple[str, ...] = option(
        (), "A setting of Slurm's, such as partition=gpu. Repeatable.",
        panel="Workers", metavar="KEY=VALUE", mechanical=True,
    )  # fmt: skip
    logs: Path | None = option(
        None, "Folder of the workers' logs, seen by all of them; default: beside the result; here, of a bucket.",
        panel="Workers", mechanical=True,
    )  # fmt: skip

    @field_validator("slurm")
    @classmethod
    def _pairs(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if not re.fullmatch(r"[a-z_]+=.+", word):
                raise ValueError("is not KEY=VALUE, such as partition=gpu")
        return words

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        own = [name for name in EngineOptions.model_fields if name != "engine"]
        given = [name for name in own if getattr(self, name) != EngineOptions.model_fields[name].default]
        if self.engine is None and given:
            raise ValueError(f"--{given[0].replace('_', '-')} is of --engine, which is not given")
        if self.engine != "submitit" and self.slurm:
            raise ValueError("--slurm is of --engine submitit")
        if self.engine == "local" and self.address is not None:
            raise ValueError("--address is of --engine ray or submitit: local is this machine")
        return self


def alone(**changes: Any) -> dict[str, Any]:
    """What makes one process's configuration of one with an engine: for ``model_copy``, with further changes."""
    return {name: field.default for name, field in EngineOptions.model_fields.items()} | changes
