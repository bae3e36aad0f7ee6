"""What kind of network an architecture is: its family, and how many parameters it has. No weights are made."""

from typing import Any, Literal

from kdcli.errors import KdError
from kdcli.models.grammar import FRAMES, TORCHVISION, ModelSpec
from kdcli.types import Size

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
        None for what is no architecture of timm or torchvision: its name says nothing about what is in them.
    """
    network = _without_memory(architecture, classes, None)
    return None if network is None else count_parameters(network)


def cost_of(model: str, classes: int, side: int | None = None) -> tuple[int | None, int | None]:
    """Parameters, and multiply-adds of the forward of one sample, of a model by its string.

    Args:
        model: as a student is named; ``frames:`` counts all frames of a clip.
        classes: of its classifier.
        side: of its images in pixels; default: what the string tells, or its own.

    Returns:
        None for what its name tells nothing about.
    """
    from kdcli.models.frames import DEFAULT_FRAMES

    try:
        spec, frames = ModelSpec.parse(model), 1
        size: Size | None = (side, side) if side is not None else spec.size
        if spec.kind == FRAMES:
            frames = spec.size[0] if spec.size is not None and len(spec.size) == 3 else DEFAULT_FRAMES
            spec, size = ModelSpec.parse(spec.name), None if size is None else size[-2:]
    except KdError:  # a name of another machine
        return None, None
    architecture = spec.name.partition(".")[0] if spec.kind == "timm" else str(spec.bare)
    operations = operations_of(architecture, classes, size)
    return parameters_of(architecture, classes), None if operations is None else frames * operations


def operations_of(architecture: str, classes: int, size: int | Size | None = None) -> int | None:
    """Multiply-adds of one image's forward: what papers call FLOPs (a ResNet-50 at 224 pixels has 4.1 G).

    Args:
        architecture: see :func:`family_of`.
        classes: of its classifier.
        size: side of the image in pixels, or its height and width, or a clip's frames, height and width; default: the
            architecture's own.

    Returns:
        None for what no architecture tells, or one that cannot be run without memory or at this size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if isinstance(size, int):
        size = size, size
    try:
        network = _without_memory(architecture, classes, size)
    except (TypeError, AssertionError):  # its size is fixed
        return None
    if network is None:
        return None
    shape = size or tuple(getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))[1:])
    if architecture.startswith(TORCHVISION):
        from kdcli.models.torchvision_models import TorchvisionArchitecture

        shape = TorchvisionArchitecture(ModelSpec.parse(architecture)).preprocess(size).size
    network.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, *shape, device="meta"))
    except (RuntimeError, AssertionError):  # an operation without a meta kernel, a fixed size
        return None
    return int(counter.get_total_flops()) // 2


def _without_memory(architecture: str, classes: int, size: Size | None) -> Any:
    """The network on torch's meta device; None where the name says nothing about what is in it."""
    import torch
    from timm import create_model
    from timm.models import is_model, resolve_model_input_args

    torchvision = architecture.startswith(TORCHVISION)
    if ":" in architecture or not (torchvision or is_model(architecture)):  # a timm name has no colon
        return None
    with torch.device("meta"):
        if torchvision:
            from torchvision import models

            return models.get_model(architecture.removeprefix(TORCHVISION), weights=None, num_classes=classes)
        arguments: dict[str, Any] = resolve_model_input_args(architecture, {"img_size": size} if size else {})
        return create_model(**arguments | {"num_classes": classes})


def count_parameters(network: Any) -> int:
    """Numbers that training may change, over all layers."""
    return sum(parameter.numel() for parameter in network.parameters())
