"""Options that several commands share, and the bridge from flags to a configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.options.fields import StepConfig

Config = TypeVar("Config", bound="StepConfig")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with options; flags win.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one option; repeatable.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved options as YAML and exit.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No narration on stderr, only warnings and errors.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More narration on stderr.")]

Data = Annotated[
    str | None, typer.Argument(help="Data set: SOURCE[@key=value,...]; a bare path is a folder.")
]

TrainData = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATA", help="Data set: SOURCE[@key=value,...]; several as NAME=DATA each."),
]

Caches = Annotated[
    list[Path] | None, typer.Option("--cache", metavar="PATH", help="Cache folder; repeatable.")
]
Device = Annotated[str | None, typer.Option("--device", help="auto (default), cpu, cuda or cuda:N.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Decode processes; default: one per processor but one.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images per forward.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed (default 0).")]
Amp = Annotated[str | None, typer.Option("--amp", help="Mixed precision: off (default), bf16 or fp16.")]
Verify = Annotated[
    str | None, typer.Option("--verify", help="Check the cache's checksums: never, once (default) or always.")
]
AllowPartial = Annotated[
    bool | None,
    typer.Option("--allow-partial", help="Go on without rows that are not cached yet, and say how many."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder of torch/ and hfds/ data sets, and of relative folders."),
]
Download = Annotated[bool | None, typer.Option("--download", help="Allow a data set to be downloaded.")]


def configure(kind: type[Config], flags: Mapping[str, Any], common: Mapping[str, Any]) -> Config:
    """Resolve flags, ``--set`` and ``--config``; with ``--print-config`` print the result and exit."""
    from kdcli.options.resolving import resolve, to_yaml

    console.quiet, console.verbose = bool(common.get("quiet")), bool(common.get("verbose"))
    config = resolve(kind, flags, common.get("sets") or (), common.get("config"))
    if common.get("print_config"):
        print(to_yaml(config), end="")
        raise typer.Exit
    return config


def split_flags(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a command's parameters into the step's flags and the options common to all commands."""
    names = ("json", "config", "sets", "print_config", "quiet", "verbose")
    common = {name: values.pop(name) for name in names}
    return values, common


def words(text: str | None) -> list[str] | None:
    """Split a comma-separated option."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def one_or_all(values: list[str] | None) -> str | tuple[str, ...] | None:
    """A lone value of a repeatable option as it is."""
    return values[0] if values and len(values) == 1 else tuple(values or ()) or None
