"""What ``kd demo`` can be told."""

from pathlib import Path
from typing import ClassVar, final

from kdcli.demo.weights import Network
from kdcli.options.fields import StepConfig, option


@final
class DemoConfig(StepConfig):
    """``kd demo``."""

    command: ClassVar[str] = "demo"

    out: Path = option(Path("kd-demo"), "Folder of the demo.", panel="Output", metavar="DIR")
    export_weights: Path | None = option(
        None, "Only write EfficientNet-Lite's ImageNet weights to this folder.",
        panel="Output", metavar="DIR",
    )  # fmt: skip
    image_size: int = option(
        224, "Input size that --export-weights declares.", panel="Output", ge=32, le=1024
    )
    network: Network = option("lite0", "Which network --export-weights writes.", panel="Output")
