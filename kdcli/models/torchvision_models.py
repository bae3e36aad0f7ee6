"""torchvision's classification architectures, also of clips: ``torchvision/NAME``, and folders of kd's exports."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import nn
from torchvision import models

from kdcli.errors import BadDataError, UsageError
from kdcli.geometry import LEAST_CROP
from kdcli.models.architectures import Architecture
from kdcli.models.arguments import (
    Argument,
    known_arguments,
    refused_arguments,
    require_arguments,
    require_recorded,
)
from kdcli.models.classifiers import TorchvisionClassifier
from kdcli.models.declared import declared_preprocess
from kdcli.models.folder import CONFIG_FILE, WEIGHTS_FILE
from kdcli.models.grammar import TORCHVISION, ModelSpec
from kdcli.models.hub import download_errors
from kdcli.models.kinds import known_torchvision
from kdcli.models.network import Classifier, first_line
from kdcli.models.timm_models import require_width
from kdcli.models.weights import load_strictly, read_shapes, require_no_larger
from kdcli.types import Interpolation, Preprocess, Size

_ALWAYS: dict[str, dict[str, Any]] = {
    # torchvision switches transform_input on only when it loads the weights itself (which it does by unpickling).
    # Auxiliary classifiers serve a loss of their own: a network without them gives the same logits.
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True, "aux_logits": False},
}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_FRAMES = {"mvit": 16, "swin3d": 32, "s3d": 64}
"""Of a clip, as torchvision's references tested them or, of S3D, half as many; 16 of others."""
_SIZE_ARGUMENT = {"vit": "image_size", "maxvit": "input_size"}


def _clip_models() -> list[str]:
    list_models: Callable[..., list[str]] = models.list_models
    return list_models(module=models.video)


@final
class TorchvisionArchitecture(Architecture):
    """An architecture of torchvision, with the weights torchvision calls its default, or those of a folder.

    Args:
        spec: of kind torchvision, local-dir, or file with a torchvision architecture.
        config: the config.json of the folder, see export.py.

    Raises:
        NotFoundError: the folder names an architecture that torchvision lacks.
        BadDataError: its config.json cannot be used.
    """

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any] | None = None) -> None:
        self._spec, self._config = spec, config
        self._name = spec.name if config is None else known_torchvision(config["architecture"], str(spec))
        self._short = self._name.removeprefix(TORCHVISION)
        self._arguments: dict[str, Argument] = {}
        get_weights: Callable[[str], Any] = models.get_model_weights
        self._weights = get_weights(self._short).DEFAULT
        self._own: dict[str, Any] = dict(_ALWAYS.get(self._short, {}))
        if config is not None:
            self._own |= self._recorded(config)
        elif spec.kind == "file" and spec.file is not None and "aux_logits" in self._own:
            self._own["aux_logits"] = any(name.startswith(_AUXILIARY) for name in read_shapes(spec.file))

    def _recorded(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a folder says of how its network is built."""
        arguments, classes = config.get("model_args") or {}, config.get("num_classes")
        where = f"the {CONFIG_FILE} of '{self._spec}'"
        known = known_arguments(type(self._made({}))) | _ALWAYS.get(self._short, {})
        known = {name: default for name, default in known.items() if name != "num_classes"}
        require_recorded(arguments, known, where, self._name)
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise BadDataError(
                f"{where} has num_classes {classes!r}, not a number above 0", "Export the model anew."
            )
        return {**arguments, "num_classes": classes}

    @property
    def name(self) -> str:
        """See the base."""
        return self._name

    def configure(self, arguments: Mapping[str, Argument]) -> None:
        """See the base."""
        if arguments:
            require_arguments(arguments, known_arguments(type(self._made({}))), self.name)
        self._arguments = dict(arguments)

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base."""
        if num_classes == 0:
            raise UsageError(
                f"'{self._spec}' cannot be built without a classifier: torchvision has no such networks",
                "Choose a timm architecture.",
            )
        arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        if image_size is not None and self._size_argument:
            if self._size_argument == "image_size" and image_size[0] != image_size[1]:
                raise UsageError(f"'{self._spec}' takes square images", "Give one number: --image-size 224.")
            arguments[self._size_argument] = (
                image_size[0] if self._size_argument == "image_size" else image_size
            )
        return self._build(arguments)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        own = self.preprocess(None).size
        if image_size not in (None, own) and self._size_argument:
            raise UsageError(
                f"the weights of '{self._spec}' are for images of {own[0]} pixels alone",
                "Leave --image-size out.",
            )
        if self._config is not None and self._spec.file is not None:
            return self._of_folder(self._config, self._spec.file)
        classifier = self._build({})
        with download_errors(str(self._spec)):
            state = self._weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_AUXILIARY)}
        try:
            classifier.plain.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise BadDataError(
                f"the downloaded weights of '{self._spec}' do not fit it: {first_line(error)}",
                "Leave --model-arg out, or update torchvision.",
            ) from error
        return classifier

    def _of_folder(self, config: Mapping[str, Any], folder: Path) -> Classifier:
        weights = folder / WEIGHTS_FILE
        shapes = read_shapes(weights)
        with torch.device("meta"):
            require_no_larger(self._build({}).plain, shapes, weights)
        classifier = self._build({})
        load_strictly(classifier.plain, weights)
        require_width(config.get("num_features"), classifier, folder / CONFIG_FILE)
        return classifier

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        if self._config is not None:
            where = f"the {CONFIG_FILE} of '{self._spec}'"
            found = declared_preprocess(self._config.get("pretrained_cfg") or {}, where, image_size)
            width = self._config.get("crop_width")
            if width is not None and not (isinstance(width, float) and LEAST_CROP <= width < 2):
                raise BadDataError(
                    f"{where}: crop_width is {width!r}, no share of an image", "Export the model anew."
                )
            return replace(found, crop_width=width)
        transforms = self._weights.transforms()
        crop, resize = int(transforms.crop_size[0]), int(transforms.resize_size[0])
        size: Size = image_size or (crop, crop)
        if self._short in _clip_models() and len(size) == 2:
            size = (_FRAMES.get(self._short.partition("_")[0], 16), *size)
        squeezed = (
            [int(side) for side in transforms.resize_size] if len(transforms.resize_size) == 2 else None
        )
        uneven = squeezed is not None and len(set(squeezed)) == 2
        return Preprocess(
            size=size,
            interpolation=cast("Interpolation", transforms.interpolation.value),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            crop_fraction=crop / resize,
            crop_mode="squash" if squeezed else "center",
            crop_width=crop / squeezed[1] if squeezed and uneven else None,
        )

    def class_names(self) -> tuple[str, ...] | None:
        """See the base: torchvision's own are descriptions, some of them twice, so they name no class."""
        names = None if self._config is None else self._config.get("label_names")
        return tuple(map(str, names)) if isinstance(names, list) and names else None

    @property
    def _size_argument(self) -> str | None:
        return _SIZE_ARGUMENT.get(self._short.partition("_")[0])

    def _made(self, arguments: Mapping[str, Any]) -> nn.Module:
        """The network; warnings of torchvision about its initialisation are for those who call it themselves."""
        get_model: Callable[..., nn.Module] = models.get_model
        silent = {"init_weights": True} if self._short in _ALWAYS else {}
        return get_model(self._short, **arguments, **silent)

    def _build(self, arguments: Mapping[str, Any]) -> Classifier:
        told = {**self._own, **self._arguments, **arguments}
        try:
            plain = self._made(told)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            if self._arguments:
                raise refused_arguments(self._arguments, str(self._spec), error) from error
            if self._config is not None and not arguments:
                raise BadDataError(
                    f"the {CONFIG_FILE} of '{self._spec}': model_args: a {self._name} cannot be built with"
                    f" {str(told)[:200]}: {first_line(error)}",
                    "Export the model anew.",
                ) from error
            raise UsageError(
                f"'{self._spec}' cannot be built with {told}: {error}", "Leave --image-size out."
            ) from error
        if told.get("aux_logits"):
            plain.aux_logits = False  # type: ignore[assignment]  # in training their logits would come as well
        told.pop("num_classes", None)
        return TorchvisionClassifier(plain, told)
