"""What kind of network an architecture is: its family, and how many parameters it has. No weights are made."""

from typing import Any, Literal

from kdcli.models.grammar import ONNX, TORCHVISION

Family = Literal["cnn", "transformer", "mlp", "unknown"]
"""P3's types of architecture (Tables 5 and 6): CNN, Trafo, MLP."""

_TRANSFORMERS = frozenset(
    {
        "beit",
        "cait",
        "coat",
        "convit",
        "crossvit",
        "davit",
        "deepseek_vit",
        "deit",
        "edgenext",
        "efficientformer",
        "efficientformer_v2",
        "efficientvit_mit",
        "efficientvit_msra",
        "eva",
        "gcvit",
        "gemma4_vit",
        "hiera",
        "hieradet_sam2",
        "iformer",
        "levit",
        "maxxvit",
        "mobilevit",
        "mvitv2",
        "naflexvit",
        "nest",
        "nextvit",
        "pit",
        "pvt_v2",
        "qwen3_vit",
        "shvit",
        "swiftformer",
        "swin_transformer",
        "swin_transformer_v2",
        "swin_transformer_v2_cr",
        "tiny_vit",
        "tnt",
        "twins",
        "visformer",
        "vision_transformer",
        "vision_transformer_hybrid",
        "vision_transformer_relpos",
        "vision_transformer_sam",
        "vitamin",
        "volo",
        "xcit",
    }
)
"""Modules of timm whose networks mix places by attention, hybrids included; mlp_mixer apart, the others convolve."""
_TORCHVISION_TRANSFORMERS = ("vit_", "swin_", "maxvit")


def family_of(architecture: str) -> Family:
    """The family of an architecture, as the module of the library that defines it tells.

    Args:
        architecture: timm's name without tag, ``torchvision/NAME``, or anything else (unknown).
    """
    if architecture.startswith(TORCHVISION):
        short = architecture.removeprefix(TORCHVISION)
        return "transformer" if short.startswith(_TORCHVISION_TRANSFORMERS) else "cnn"
    from timm.models import is_model, model_entrypoint

    if not is_model(architecture):
        return "unknown"
    module = model_entrypoint(architecture).__module__.rpartition(".")[2]
    return "transformer" if module in _TRANSFORMERS else "mlp" if module == "mlp_mixer" else "cnn"


def parameters_of(architecture: str, classes: int) -> int | None:
    """How many parameters an architecture has with a classifier of ``classes`` classes.

    The network is built without memory (torch's meta device), so that a billion of them cost nothing.

    Returns:
        None for an ONNX file or a joint teacher: the name says nothing about what is in them.
    """
    import torch
    from timm import create_model
    from timm.models import is_model

    if architecture == ONNX or not (architecture.startswith(TORCHVISION) or is_model(architecture)):
        return None
    network: Any
    with torch.device("meta"):
        if architecture.startswith(TORCHVISION):
            from torchvision import models

            network = models.get_model(
                architecture.removeprefix(TORCHVISION), weights=None, num_classes=classes
            )
        else:
            network = create_model(architecture, num_classes=classes)
    return count_parameters(network)


def count_parameters(network: Any) -> int:
    """Numbers that training may change, over all layers."""
    return sum(parameter.numel() for parameter in network.parameters())
