"""Export in timm's own layout: ``timm.create_model("local-dir:DIR", pretrained=True)`` opens it.

One that is shown the frames of clips is exported as the network of images that it is, and how many ``frames``.
A network of torchvision is exported in the same layout, which kd opens as ``local-dir:DIR`` too. Plain torch opens it
with ``get_model(NAME, num_classes=N, **model_args).load_state_dict(load_file("model.safetensors"), strict=True)``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models import get_model_args, get_model_input_config

from kdcli.errors import UsageError
from kdcli.files import atomic_write_bytes, storage_errors
from kdcli.models.classifiers import TorchvisionClassifier
from kdcli.models.folder import CONFIG_FILE, WEIGHTS_FILE
from kdcli.models.frames import of_images
from kdcli.models.spec import Model
from kdcli.models.student import require_trainable
from kdcli.reading import read_bytes


def export_model(model: Model, directory: Path, class_names: Sequence[str] | None) -> None:
    """Write config.json and model.safetensors; a folder without config.json is an unfinished export.

    Args:
        model: of timm or torchvision; its weights as they are now, its preprocessing with the size it was opened at.
        directory: created when it is not there; other files in it are left alone.
        class_names: of the logits, in order; recorded as timm's ``label_names``.

    Raises:
        UsageError: the model is of another kind, or the names are not as many as the classes.
        StorageError, NoSpaceError: writing failed.
    """
    files = export_files(model, class_names)
    content, weights = files[WEIGHTS_FILE], directory / WEIGHTS_FILE
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        there = weights.is_file() and weights.stat().st_size == len(content)
        if (
            not there or read_bytes(weights, len(content)) != content
        ):  # else a whole model stays whole all the time
            (directory / CONFIG_FILE).unlink(missing_ok=True)
            atomic_write_bytes(weights, content)
    atomic_write_bytes(directory / CONFIG_FILE, files[CONFIG_FILE])


def export_files(model: Model, class_names: Sequence[str] | None) -> dict[str, bytes]:
    """What :func:`export_model` writes, by name.

    Raises:
        UsageError: as there.
    """
    require_trainable(model)
    if class_names is not None and len(class_names) != model.num_classes:
        raise UsageError(
            f"{len(class_names)} class names for the {model.num_classes} classes of '{model.spec}'",
            "Give one name per class, or none.",
        )
    state = model.network.plain.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    config = json.dumps(_config(model, class_names), indent=2, allow_nan=False) + "\n"
    return {WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}), CONFIG_FILE: config.encode()}


def model_arguments(model: Model) -> dict[str, Any]:
    """What its library needs to build it again, beside its name; drop rates of timm's networks are not recorded."""
    network = of_images(model.network)
    if isinstance(network, TorchvisionClassifier):
        return network.arguments
    arguments: dict[str, Any] = get_model_args(model.network.plain)
    return arguments


def _config(model: Model, class_names: Sequence[str] | None) -> dict[str, Any]:
    """The document timm reads. It has no source: the weights beside it are all there is."""
    plain: Any = model.network.plain
    declared: dict[str, Any] = getattr(plain, "pretrained_cfg", {})
    network = of_images(model.network)
    by_frame = network is not model.network
    timm = {} if isinstance(network, TorchvisionClassifier) else get_model_input_config(plain)
    names = {"label_names": list(class_names)} if class_names is not None else {}
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **names,
        **({"frames": model.preprocess.frames} if by_frame else {}),
        **({} if model.preprocess.crop_width is None else {"crop_width": model.preprocess.crop_width}),
        "model_args": model_arguments(model),
        "pretrained_cfg": {
            "input_size": [3, *(model.preprocess.sides if by_frame else model.preprocess.size)],
            "fixed_input_size": timm.get("fixed_input_size", False),
            "interpolation": model.preprocess.interpolation,
            "mean": list(model.preprocess.mean),
            "std": list(model.preprocess.std),
            "crop_pct": model.preprocess.crop_fraction,
            "crop_mode": model.preprocess.crop_mode,
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": timm.get("first_conv"),
            "classifier": declared.get("classifier"),
            "custom_load": False,
        },
    }
