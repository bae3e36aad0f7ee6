"""``frames:MODEL``: a network of images shown the frames of a clip one by one; what it gives of them is averaged.

The mean of logits and of features is over the frames; feature maps keep them, [b, C, T, H, W].
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.arguments import Argument
from kdcli.models.grammar import ModelSpec
from kdcli.models.network import Classifier
from kdcli.outputs import MAPS
from kdcli.registry import MODELS, load_object
from kdcli.types import Preprocess, Size

DEFAULT_FRAMES: Final = 8
"""Of a clip, where ``[size=FRAMESxHEIGHTxWIDTH]`` does not say."""


@final
class FramesClassifier(Classifier):
    """The network of images, over the frames of clips.

    Args:
        inner: of images.
    """

    def __init__(self, inner: Classifier) -> None:
        super().__init__(inner.plain)
        self.inner = inner

    @property
    def head(self) -> nn.Module:
        """See the base."""
        return self.inner.head

    @property
    def num_classes(self) -> int:
        """See the base."""
        return self.inner.num_classes

    @property
    def settings(self) -> Mapping[str, Any]:
        """See the base."""
        return {**self.inner.settings, "frames": "mean"}

    def outputs(self, images: Float[Tensor, "b 3 t h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        return self.of_frames(images, lambda frames: self.inner.outputs(frames, names))

    def of_frames(
        self, clips: Float[Tensor, "b c t h w"], give: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Outputs of clips, by what is given of their frames.

        Args:
            clips: their images, or maps.
            give: outputs of a batch of frames.
        """
        found = give(clips.movedim(2, 1).flatten(0, 1))
        each = {
            name: output.reshape(clips.shape[0], clips.shape[2], *output.shape[1:])
            for name, output in found.items()
        }
        return {
            name: output.movedim(1, 2) if name.startswith(MAPS) else output.mean(dim=1)
            for name, output in each.items()
        }

    @property
    def stages(self) -> tuple[str, ...]:
        """See the base."""
        return self.inner.stages

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base."""
        return self.inner.taps

    @property
    def layers(self) -> tuple[str, ...]:
        """See the base."""
        return self.inner.layers

    @property
    def last_tap(self) -> str:
        """See the base."""
        return self.inner.last_tap

    @property
    def pooling(self) -> str:
        """See the base."""
        return f"{self.inner.pooling} of each frame" if self.inner.pooling else ""

    def check(self, size: Size, name: str) -> int:
        """See the base: the network of images is checked, with one image."""
        width = self.inner.check(size[-2:], name)
        self.size, self.without = size, self.inner.without
        return width


def of_images(network: Classifier) -> Classifier:
    """The network itself, or the one that is shown the frames of clips."""
    return network.inner if isinstance(network, FramesClassifier) else network


@final
class FramesArchitecture(Architecture):
    """An architecture of images, shown clips.

    Args:
        inner: of images.
        frames: of a clip, where nobody says.
        what: the model, for messages.
    """

    def __init__(self, inner: Architecture, what: str, frames: int = DEFAULT_FRAMES) -> None:
        self._inner, self._frames = inner, frames
        if inner.preprocess(None).frames:
            raise UsageError(f"'{what}' takes clips as it is", "Leave frames: out.")

    @property
    def name(self) -> str:
        """See the base."""
        return self._inner.name

    def configure(self, arguments: Mapping[str, Argument]) -> None:
        """See the base."""
        self._inner.configure(arguments)

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base."""
        return FramesClassifier(self._inner.random(num_classes, _sides(image_size)))

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        return FramesClassifier(self._inner.pretrained(_sides(image_size)))

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        own = self._inner.preprocess(_sides(image_size))
        frames = image_size[0] if image_size is not None and len(image_size) == 3 else self._frames
        return replace(own, size=(frames, *own.sides))

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        return self._inner.class_names()


def open_frames(spec: ModelSpec) -> Architecture:
    """The architecture behind ``frames:``."""
    inner = ModelSpec.parse(spec.name)
    return FramesArchitecture(load_object(MODELS.find(inner.kind).architecture)(inner), str(spec))


def _sides(size: Size | None) -> Size | None:
    return None if size is None else size[-2:]
