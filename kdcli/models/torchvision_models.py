"""torchvision's classification architectures: ``torchvision/NAME``, with their default weights."""

from collections.abc import Callable
from typing import Any, cast, final

from torchvision import models

from kdcli.errors import BadDataError, UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.grammar import TORCHVISION, ModelSpec
from kdcli.models.hub import download_errors
from kdcli.models.classifiers import TorchvisionClassifier
from kdcli.models.network import Classifier
from kdcli.types import Interpolation, Preprocess

# torchvision switches transform_input on only when it loads the weights itself (which it does by unpickling);
# without init_weights these two warn.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": True},
    "inception_v3": {"transform_input": True, "init_weights": True},
}
_SIZE_ARGUMENT = {"vit": "image_size", "maxvit": "input_size"}


@final
class TorchvisionArchitecture(Architecture):
    """An architecture of torchvision, with the weights torchvision calls its default.

    Args:
        spec: of kind torchvision, or file with a torchvision architecture.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._short = spec.name.removeprefix(TORCHVISION)
        get_weights: Callable[[str], Any] = models.get_model_weights
        self._weights = get_weights(self._short).DEFAULT

    @property
    def name(self) -> str:
        """See the base."""
        return self._spec.name

    def random(self, num_classes: int | None, image_size: int | None) -> Classifier:
        """See the base."""
        arguments: dict[str, Any] = {}
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        if image_size is not None and self._size_argument:
            square = (image_size, image_size)
            arguments[self._size_argument] = image_size if self._size_argument == "image_size" else square
        return self._build(arguments)

    def pretrained(self, image_size: int | None) -> Classifier:
        """See the base."""
        own = self.preprocess(None).size[0]
        if image_size not in (None, own) and self._size_argument:
            raise UsageError(
                f"the weights of '{self._spec}' are for images of {own} pixels, not {image_size}",
                "Leave --image-size out.",
            )
        classifier = self._build({})
        with download_errors(str(self._spec)):
            state = self._weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        try:
            classifier.plain.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise BadDataError(
                f"the downloaded weights of '{self._spec}' do not fit it", "Update torchvision."
            ) from error
        return classifier

    def preprocess(self, image_size: int | None) -> Preprocess:
        """See the base."""
        transforms = self._weights.transforms()
        crop, resize = int(transforms.crop_size[0]), int(transforms.resize_size[0])
        side = image_size or crop
        return Preprocess(
            size=(side, side),
            interpolation=cast("Interpolation", transforms.interpolation.value),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            crop_fraction=crop / resize,
        )

    def class_names(self) -> tuple[str, ...] | None:
        """See the base: torchvision's are descriptions, some of them twice, so they name no class."""
        return None

    @property
    def _size_argument(self) -> str | None:
        return _SIZE_ARGUMENT.get(self._short.partition("_")[0])

    def _build(self, arguments: dict[str, Any]) -> Classifier:
        get_model: Callable[..., Any] = models.get_model
        try:
            return TorchvisionClassifier(
                get_model(self._short, **arguments, **_ARGUMENTS.get(self._short, {}))
            )
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UsageError(
                f"'{self._spec}' cannot be built with {arguments}: {error}", "Leave --image-size out."
            ) from error
