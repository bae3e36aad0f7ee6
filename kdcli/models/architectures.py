"""What kd asks of a library that networks come from; the answers of timm, torchvision and ONNX have a file each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from kdcli.errors import UsageError
from kdcli.models.arguments import Argument
from kdcli.models.network import Classifier
from kdcli.types import Preprocess, Size


class Architecture(ABC):
    """One architecture of one library, with the weights its spec names."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The architecture, without pretrained tag; ``torchvision/NAME`` for torchvision, or ``onnx``."""

    def configure(self, arguments: Mapping[str, Argument]) -> None:
        """Build it with these arguments of its library from now on.

        Raises:
            UsageError: it does not know one of them.
        """
        if arguments:
            raise UsageError(
                f"--model-arg {next(iter(arguments))}: '{self.name}' runs as it is, it takes no arguments",
                "Leave --model-arg out.",
            )

    @abstractmethod
    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """The network with random weights.

        Args:
            num_classes: width of its classifier; default: the architecture's own.
            image_size: of its input; default: its own.

        Raises:
            UsageError: its input size is fixed.
        """

    @abstractmethod
    def pretrained(self, image_size: Size | None) -> Classifier:
        """The network with the weights and the classes its spec names.

        Raises:
            NotFoundError: there are none, or they cannot be had.
            BadDataError: they are damaged, or do not fit.
            UsageError: its input size is fixed.
        """

    @abstractmethod
    def preprocess(self, image_size: Size | None) -> Preprocess:
        """The preprocessing its spec declares, at another input size when one is given."""

    @abstractmethod
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the pretrained classes, in order of the logits, where they are known."""
