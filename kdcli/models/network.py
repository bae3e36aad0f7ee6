"""What kd asks of a network, and the digest of its weights."""

import json
from abc import ABCMeta, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.types import Size


class Classifier(nn.Module, metaclass=ABCMeta):
    """A network that gives logits, pooled features, feature maps, or some of these, all in one forward.

    Features are what its classifier is applied to: [b, d], after pooling (dbolya/parc; P2 section 3.2). Most
    classifiers are one linear layer of them; :attr:`head` tells.

    Attributes:
        plain: the library's own network; its state-dict names are those of digests and exports.
        without: why it gives no features; empty where it gives them.
        size: height and width in pixels of the images that it was checked with, of clips the frames before them.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.without = ""
        self.size: Size = (224, 224)

    @property
    def casts(self) -> bool:
        """Whether it computes at the precision it is asked for; else it has one of its own."""
        return True

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Its classifier: one layer, or a ``ModuleList`` of several; an ``nn.Identity`` when it has no classes."""

    @abstractmethod
    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """What is asked for of one forward.

        Args:
            images: normalised images.
            names: among ``logits``, ``features`` and ``maps.TAP`` of its :attr:`taps` and :attr:`layers`.

        Returns:
            Per name logits [b, c], features [b, d], or a feature map [b, C, H, W], of clips [b, C, T, H, W].

        Raises:
            UsageError: it does not give one of them.
        """

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 for a network that gives features only."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    @property
    def linear(self) -> bool:
        """Whether its classifier is one linear layer, and that of the features."""
        return isinstance(self.head, nn.Linear)

    @property
    def last_layer(self) -> nn.Module:
        """What may make its logits of its features; whether it does, :func:`kdcli.models.heads.linear_head` tells."""
        return self.head

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised images."""
        return self.outputs(images, ("features",))["features"]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Logits of normalised images."""
        return self.outputs(images, ("logits",))["logits"]

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the places whose feature maps can be had: the stages, and :attr:`last_tap` last where it has one."""
        return self.stages

    @property
    def stages(self) -> tuple[str, ...]:
        """Of the taps those that its library names as layers, in the order of the forward."""
        return ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its other layers, of which those that give a map once in a forward can be tapped, too."""
        return ()

    @property
    def last_tap(self) -> str:
        """The tap of what its features are pooled from, see :attr:`pooling`; empty where that is no map."""
        return ""

    @property
    def pooling(self) -> str:
        """How its features come of the last map: ``class token``, ``average``, ``attention pool``, ...; empty: not
        known."""
        return ""

    def check(self, size: Size, name: str) -> int:
        """Make sure, on one synthetic image, that what it gives is what the plain network gives; sets eval mode.

        Args:
            size: (height, width) in pixels of its input, of clips (frames, height, width).
            name: what to call it in errors.

        Returns:
            The width of its features; 0 when it cannot give them, and then :attr:`without` says why.

        Raises:
            UsageError: it takes no images of that size, or gives neither logits nor features of them.
        """
        self.eval()
        self.size = size
        image = synthetic_image(size)
        with torch.inference_mode():
            try:
                whole = self.plain(image)
            except (RuntimeError, AssertionError, ValueError) as error:
                raise UsageError(
                    f"'{name}' takes no images of {' x '.join(map(str, size))} pixels: {first_line(error)}",
                    "Leave --image-size out, or choose a size that suits the model.",
                ) from error
            wanted = (1, self.num_classes) if self.num_classes else (1,)
            if not isinstance(whole, Tensor) or whole.ndim != 2 or whole.shape[: len(wanted)] != wanted:
                given = tuple(whole.shape) if isinstance(whole, Tensor) else f"a {type(whole).__name__}"
                needed = f"logits {wanted}" if self.num_classes else "pooled features (1, d)"
                raise UsageError(
                    f"'{name}' gives {given} for an image, not {needed}",
                    "Choose a classifier, or a network that pools its features.",
                )
            return self._width(image, whole)

    def _width(self, image: Tensor, whole: Float[Tensor, "1 _"]) -> int:
        """The width of its features, where they and the logits that come with them are the plain network's."""
        names = ("features", "logits") if self.num_classes else ("features",)
        try:
            found = self.outputs(image, names)
        except (
            Exception
        ) as error:  # whatever its library raises on the way; it is told where features are asked for
            self.without = f"what comes before its classifier cannot be had ({first_line(error)})"
            return 0
        features = found["features"]
        if features.ndim != 2:
            self.without = f"what its classifier is applied to is {_sides(features)}, not pooled to [b, d]"
        elif not nearly_equal(found[names[-1]], whole):
            self.without = "its logits do not come from the features that its library names"
        return 0 if self.without else features.shape[1]

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it computes beyond what its library's network of that name and these weights say; JSON's values."""
        return {}

    def digest(self) -> str:
        """SHA-256 of its weights, see :func:`weights_sha256`, and of its settings, if it has any."""
        weights, settings = weights_sha256(self.plain), self.settings
        if not settings:
            return weights
        return sha256(f"{weights}\n{json.dumps(settings, sort_keys=True)}".encode()).hexdigest()


def _sides(tensor: Tensor) -> str:
    return f"[b, {', '.join(map(str, tensor.shape[1:]))}]"


def first_line(error: Exception) -> str:
    """What an error says first, or what it is called."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def synthetic_image(size: Size) -> Float[Tensor, "1 3 *t h w"]:
    """A fixed image, or clip, to look at a network with, as if normalised, on the CPU.

    It has no random numbers: opening a model must not move the generator that initialises a student.
    """
    return torch.sin(torch.arange(3 * prod(size), dtype=torch.float32) * 0.37).reshape(1, 3, *size)


@contextmanager
def looking(network: Classifier) -> Iterator[Float[Tensor, "1 3 h w"]]:
    """A synthetic image to look at a network with, where it lies, of its type, in eval mode; its modes come back."""
    modes = {module: module.training for module in network.modules()}
    like = next(network.parameters(), torch.zeros(()))
    network.eval()
    try:
        with torch.no_grad():
            yield synthetic_image(network.size).to(like)
    finally:
        for module, mode in modes.items():
            module.training = mode


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two ways to the same output agree but for rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def weights_sha256(module: nn.Module) -> str:
    """Digest of a network's state dict: per tensor, in name order, its name, dtype, shape and bytes.

    Independent of device and memory format; a :class:`Classifier` has the digest of its plain network and its
    settings, and one that runs an ONNX file that of the file.
    """
    if isinstance(module, Classifier):
        return module.digest()
    state = module.state_dict()
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
