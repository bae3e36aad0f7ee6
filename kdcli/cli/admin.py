"""Commands around the pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as opt
from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.doctor import Checkup, ShardReading


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("demo")(demo)
    app.command("methods")(methods)
    app.command("doctor")(doctor)


def demo(
    export_weights: Annotated[
        Path | None,
        typer.Option(
            "--export-weights", help="Only write EfficientNet-Lite0's ImageNet weights to this folder."
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option("--image-size", min=32, help="Input size that --export-weights declares.")
    ] = 224,
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo.")] = Path("kd-demo"),
    json: opt.Json = False,
) -> None:
    """Run the whole main job on real images and weights.

    Both come from pip packages; the generalist has real ImageNet weights. Takes a few minutes on two
    processors. Prints each step as the command you would type, then the ranking and a table, and writes a
    report. A second run finds what the first one made.

    \b
    Examples:
      kd demo
      kd demo --export-weights weights/lite0
    """
    from kdcli.demo import export_pretrained_weights, run_demo
    from kdcli.demo.result import say

    if export_weights is not None:
        folder = export_pretrained_weights(export_weights, image_size)
        if json:
            console.document({"spec": f"local-dir:{folder}"})
        else:
            print(f"local-dir:{folder}")
        return
    result = run_demo(out)
    if json:
        console.document(result.document())
    else:
        say(result)


def methods(json: opt.Json = False) -> None:
    """List the methods: paper, equation, and what each needs.

    \b
    Examples:
      kd methods
      kd methods --json
    """
    from kdcli.registry import METHODS

    listed = list(METHODS.values())
    if json:
        console.document(
            {
                "methods": [
                    {
                        "name": method.name,
                        "paper": method.paper,
                        "equation": method.equation,
                        "needs": {
                            "cached": sorted(method.needs.kinds),
                            "labels": method.needs.labels,
                            "ranking": method.needs.ranking,
                            "generalist": method.needs.generalist,
                        },
                        "description": method.summary,
                    }
                    for method in listed
                ]
            }
        )
        return
    rows = []
    for method in listed:
        needs = [
            *(f"cached {kind}" for kind in sorted(method.needs.kinds)),
            *(("or topk:K",) if method.needs.largest else ()),
            *(("labels",) if method.needs.labels else ()),
            *(("--ranking",) if method.needs.ranking else ()),
            *(("--generalist",) if method.needs.generalist else ()),
        ]
        rows.append([method.name, method.paper, method.equation, ", ".join(needs), method.summary])
    console.table(["method", "paper", "equation", "needs", "what it does"], rows)


def doctor(json: opt.Json = False) -> None:
    """Show what kd finds here: versions, devices, folders.

    Also limits, offline flags, scheduler variables, and how to install what is missing.

    \b
    Examples:
      kd doctor
      kd doctor --json
    """
    from kdcli.doctor import examine

    checkup = examine()
    if json:
        console.document(checkup.document())
        return
    for number, (header, rows) in enumerate(_sections(checkup)):
        if number:
            print()
        console.table(header, rows)


def _sections(checkup: "Checkup") -> list[tuple[list[str], list[list[Any]]]]:
    """The tables of ``kd doctor``: header and rows."""
    found = checkup
    extras = [
        [
            name,
            _yes(extra.installed),
            ", ".join(package for package, version in extra.packages.items() if version is None),
            "" if extra.installed else extra.command,
        ]
        for name, extra in found.extras.items()
    ]
    problems = [[problem.message, problem.hint] for problem in found.problems]
    return [
        (["version of", "is"], [[name, version or "missing"] for name, version in found.versions.items()]),
        (
            ["device", "name", "GB", "free", "bf16", "fp16", "tf32"],
            [
                [
                    device.name,
                    device.title,
                    _or_dash(device.memory_gb),
                    _or_dash(device.free_gb),
                    *(device.precisions[name] for name in ("bf16", "fp16", "tf32")),
                ]
                for device in found.devices
            ],
        ),
        (
            ["folder", "path", "writable", "GB free"],
            [
                [name, folder.path, _yes(folder.writable), _or_dash(folder.free_gb)]
                for name, folder in found.folders.items()
            ],
        ),
        (["setting", "is"], _settings(found)),
        (["--shard", "gives", "from"], [_shard_row(name, shard) for name, shard in found.shards.items()]),
        (["extra", "installed", "missing", "command"], extras),
        (["problem", "what to do"], problems or [["none", ""]]),
    ]


def _shard_row(name: str, shard: "ShardReading") -> list[str]:
    variables = " ".join(f"{key}={value}" for key, value in shard.variables.items())
    if shard.gives is not None:
        return [name, shard.gives, variables]
    return [name, "-", f"{variables} ({shard.reason})" if variables else "nothing that is set"]


def _settings(checkup: "Checkup") -> list[list[Any]]:
    cuda, hub, limits, processors = checkup.cuda, checkup.hub, checkup.limits, checkup.processors
    return [
        ["CUDA of torch", cuda["built"] or "none (CPU-only build)"],
        ["CUDA usable", _yes(cuda["usable"])],
        ["CUDA_VISIBLE_DEVICES", "-" if cuda["visible"] is None else cuda["visible"] or "(empty)"],
        ["processors of this job", f"{processors['available']} of {processors['total']}"],
        ["default of --workers", processors["workers"]],
        ["open files at once", limits["open_files"] or "unlimited"],
        ["/dev/shm GB", _or_dash(limits["shared_memory_gb"])],
        ["HF models offline", _yes(hub["models_offline"])],
        ["HF data sets offline", _yes(hub["datasets_offline"])],
        ["HF_HOME", hub["home"]],
        *([name, value] for name, value in hub["variables"].items() if name != "HF_HOME"),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
