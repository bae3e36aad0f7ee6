"""Commands around the pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as opt
from kdcli.console import console


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("demo")(demo)


def demo(
    export_weights: Annotated[
        Path | None,
        typer.Option(
            "--export-weights", help="Write EfficientNet-Lite0's ImageNet weights to this folder and exit."
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option("--image-size", min=32, help="Input size the folder declares.")
    ] = 224,
    json: opt.Json = False,
) -> None:
    """Try kd on real images and real ImageNet weights that pip packages ship.

    Examples:
      kd demo --export-weights weights/lite0
    """
    from kdcli.demo import export_pretrained_weights
    from kdcli.errors import UsageError

    if export_weights is None:
        raise UsageError("kd demo needs --export-weights DIR", "kd demo --export-weights weights/lite0")
    folder = export_pretrained_weights(export_weights, image_size)
    if json:
        console.document({"spec": f"local-dir:{folder}"})
    else:
        print(f"local-dir:{folder}")
