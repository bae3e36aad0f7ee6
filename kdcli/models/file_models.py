"""``ARCH@FILE.safetensors``: an architecture of timm or torchvision with the weights of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

from kdcli.errors import UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.arguments import Argument
from kdcli.models.grammar import TORCHVISION, ModelSpec
from kdcli.models.network import Classifier
from kdcli.models.timm_models import TimmArchitecture
from kdcli.models.torchvision_models import TorchvisionArchitecture
from kdcli.models.weights import classes_in, load_strictly, read_shapes, with_body_of
from kdcli.types import Preprocess, Size


@final
class FileArchitecture(Architecture):
    """The architecture, with as many classes as the classifier in the file has.

    Args:
        spec: of kind file.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.file is None:
            raise UsageError(f"'{spec}' names no file", "Write ARCH@FILE.safetensors.")
        self._file: Path = spec.file
        timm = not spec.name.startswith(TORCHVISION)
        self._inner: Architecture = TimmArchitecture(spec) if timm else TorchvisionArchitecture(spec)

    @property
    def name(self) -> str:
        """See the base."""
        return self._inner.name

    def configure(self, arguments: Mapping[str, Argument]) -> None:
        """See the base."""
        self._inner.configure(arguments)

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base."""
        classifier = self._as_in_file(image_size)
        if num_classes in (None, classifier.num_classes):
            return classifier
        return with_body_of(classifier, self._inner.random(num_classes, image_size))

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        classifier = self._as_in_file(image_size)
        load_strictly(classifier.plain, self._file)
        return classifier

    def _as_in_file(self, image_size: Size | None) -> Classifier:
        shapes = read_shapes(self._file)
        classifier = self._inner.random(None, image_size)
        classes = classes_in(shapes, classifier)
        return classifier if classes == classifier.num_classes else self._inner.random(classes, image_size)

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        return self._inner.preprocess(image_size)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        return self._inner.class_names()
