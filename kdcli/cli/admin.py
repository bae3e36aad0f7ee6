"""Commands around the pipeline."""

from typing import TYPE_CHECKING, Any

from kdcli.cells import short, yes
from kdcli.console import console, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kdcli.demo.config import DemoConfig
    from kdcli.doctor import Checkup, ShardReading
    from kdcli.options.common import Common, NoOptions


def demo(config: "DemoConfig", common: "Common") -> None:
    """Run the whole main job on real images and weights.

    Both come from pip packages; the generalist has real ImageNet weights. Takes a few minutes on two
    processors. Prints each step as the command you would type, then the ranking and a table, and writes a
    report. A second run finds what the first one made.

    \b
    Examples:
      kd demo
      kd demo --export-weights weights/lite0
    """
    from kdcli.demo.demo import run_demo
    from kdcli.demo.result import say
    from kdcli.demo.weights import export_pretrained_weights

    if config.export_weights is not None:
        spec = (
            f"local-dir:{export_pretrained_weights(config.export_weights, config.image_size, config.network)}"
        )
        if common.as_json:
            console.document({"spec": spec})
        else:
            console.say(spec)
        return
    result = run_demo(config.out)
    if common.as_json:
        console.document(result.document())
    else:
        say(result)


def doctor(_config: "NoOptions", common: "Common") -> None:
    """Show what kd finds here: versions, devices, folders.

    Also limits, offline flags, scheduler variables, and how to install what is missing.

    \b
    Examples:
      kd doctor
      kd doctor --json
    """
    from kdcli.doctor import examine

    checkup = examine()
    if common.as_json:
        console.document(checkup.document())
        return
    for number, (header, rows) in enumerate(_sections(checkup)):
        if number:
            console.say()
        console.table(header, rows)
    then = "kd demo" if checkup.extras["demo"].installed else checkup.extras["demo"].command
    console.finished(
        f"{counted(len(checkup.problems), 'problems')} found",
        then,
        "kd distill IMAGES --teacher SPEC --student ARCH",
    )


def _sections(checkup: "Checkup") -> list[tuple[list[str], list[list[Any]]]]:
    """The tables of ``kd doctor``: header and rows."""
    found = checkup
    extras = [
        [
            name,
            yes(extra.installed),
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
                    short(device.memory_gb),
                    short(device.free_gb),
                    *(device.precisions[name] for name in ("bf16", "fp16", "tf32")),
                ]
                for device in found.devices
            ],
        ),
        (
            ["folder", "path", "writable", "GB free"],
            [
                [name, folder.path, yes(folder.writable), short(folder.free_gb)]
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


def _jpeg(codecs: "Mapping[str, str | None]") -> str:
    turbo = codecs["libjpeg_turbo"]
    return f"Pillow {codecs['pillow']}, " + (
        f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {codecs['jpg']}"
    )


def _settings(checkup: "Checkup") -> list[list[Any]]:
    cuda, hub, limits, processors = checkup.cuda, checkup.hub, checkup.limits, checkup.processors
    return [
        ["CUDA of torch", cuda["built"] or "none (CPU-only build)"],
        ["CUDA usable", yes(cuda["usable"])],
        ["CUDA_VISIBLE_DEVICES", "-" if cuda["visible"] is None else cuda["visible"] or "(empty)"],
        ["processors of this job", f"{processors['available']} of {processors['total']}"],
        ["default of --workers", processors["workers"]],
        ["JPEGs are decoded by", _jpeg(checkup.codecs)],
        ["open files at once", limits["open_files"] or "unlimited"],
        ["/dev/shm GB", short(limits["shared_memory_gb"])],
        ["HF models offline", yes(hub["models_offline"])],
        ["HF data sets offline", yes(hub["datasets_offline"])],
        ["HF_HOME", hub["home"]],
        *([name, value] for name, value in hub["variables"].items() if name != "HF_HOME"),
    ]
