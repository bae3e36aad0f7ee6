"""A classification network cut before its last linear layer, and the digest of its weights."""

from abc import ABCMeta, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.outputs import MAPS


class Classifier(nn.Module, metaclass=ABCMeta):
    """A network as ``classify(features(x))``, where features are the input of its last linear layer.

    That cut is what PARC and the distillation papers call features (dbolya/parc; P2 section 3.2).

    Attributes:
        plain: the library's own network; its state-dict names are those of digests and exports.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The last linear layer; an ``nn.Identity`` when the network has no classes."""

    @abstractmethod
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised images."""

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 for a network that gives features only."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def classify(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        """Logits of pooled features.

        Raises:
            UsageError: the network has no classes.
        """
        if not self.num_classes:
            raise UsageError("the model has no classifier, so it gives no logits", "Use --keep features.")
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Logits of normalised images."""
        return self.classify(self.features(images))

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the layers whose feature maps can be had, in the order of the forward."""
        return ()

    def features_and_maps(
        self, images: Float[Tensor, "b 3 h w"], taps: Sequence[str]
    ) -> tuple[Float[Tensor, "b d"], dict[str, Float[Tensor, "b _ _ _"]]]:
        """Pooled features, and per tap its feature map as [b, C, H, W], in one forward.

        Args:
            images: normalised images.
            taps: among :attr:`taps`.

        Raises:
            UsageError: what a tap gives is no feature map.
        """
        if taps:
            raise UsageError("the model has no taps, so it gives no feature maps", "Leave maps:TAP out.")
        return self.features(images), {}

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """What is asked for of one forward.

        Args:
            images: normalised images.
            names: among ``logits``, ``features`` and ``maps.TAP``.

        Returns:
            Per name logits [b, c], features [b, d], or a feature map [b, C, H, W].
        """
        taps = [name.removeprefix(MAPS) for name in names if name.startswith(MAPS)]
        features, maps = self.features_and_maps(images, taps) if taps else (self.features(images), {})
        found = {MAPS + tap: image_map for tap, image_map in maps.items()}
        if "features" in names:
            found["features"] = features
        if "logits" in names:
            found["logits"] = self.classify(features)
        return {name: found[name] for name in names}

    def check(self, size: tuple[int, int], name: str) -> int:
        """Make sure that the cut network is the whole network, on one synthetic image; sets eval mode.

        Args:
            size: (height, width) in pixels of its input.
            name: what to call it in errors.

        Returns:
            The width of its features; 0 when it cannot give them.

        Raises:
            UsageError: it takes no images of that size, or is not features followed by one linear layer
                (e.g. the two heads of a distilled DeiT).
        """
        if not isinstance(self.head, nn.Linear | nn.Identity):
            kind = type(self.head).__name__
            raise UsageError(
                f"'{name}' does not end in one linear layer (its head is a {kind})",
                "Choose a model with one linear classifier, e.g. the plain variant of a distilled one.",
            )
        self.eval()
        image = synthetic_image(size)
        with torch.inference_mode():
            try:
                whole = self.plain(image)
                features = self.features(image)
                cut = self.classify(features) if self.num_classes else features
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(
                    f"'{name}' takes no images of {size[0]} x {size[1]} pixels: {reason}",
                    "Leave --image-size out, or choose a size that suits the model.",
                ) from error
        if features.ndim != 2 or not (isinstance(whole, Tensor) and nearly_equal(whole, cut)):
            raise UsageError(
                f"'{name}' is not pooled features followed by one linear layer: its logits differ from those"
                " of its last layer alone",
                "Choose a model with one linear classifier.",
            )
        return features.shape[1]

    def digest(self) -> str:
        """SHA-256 of its weights, see :func:`weights_sha256`."""
        return weights_sha256(self.plain)


@final
class TimmClassifier(Classifier):
    """timm's own cut: ``forward_head(forward_features(x), pre_logits=True)``."""

    @property
    def head(self) -> nn.Module:
        """See the base."""
        # timm gives a method, which nn.Module's typing cannot know; distilled networks give a tuple.
        classifier: Any = self.plain.get_classifier()  # type: ignore[operator]
        return classifier if isinstance(classifier, nn.Module) else nn.ModuleList(classifier)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """See the base."""
        plain: Any = self.plain
        pooled: Tensor = plain.forward_head(plain.forward_features(images), pre_logits=True)
        return pooled

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: timm's feature_info names, without those that name several layers."""
        if not hasattr(self.plain, "forward_intermediates"):
            return ()
        names = self._tap_names
        return tuple(name for name in names if names.count(name) == 1)

    def features_and_maps(
        self, images: Float[Tensor, "b 3 h w"], taps: Sequence[str]
    ) -> tuple[Float[Tensor, "b d"], dict[str, Float[Tensor, "b _ _ _"]]]:
        """See the base: timm itself turns NHWC maps and the tokens of transformers into [b, C, H, W]."""
        plain: Any = self.plain
        places = sorted(self._tap_names.index(tap) for tap in taps)
        last, maps = plain.forward_intermediates(images, indices=places)
        pooled: Tensor = plain.forward_head(last, pre_logits=True)
        return pooled, {self._tap_names[place]: found for place, found in zip(places, maps, strict=True)}

    @property
    def _tap_names(self) -> list[str]:
        plain: Any = self.plain
        return [str(entry["module"]) for entry in getattr(plain, "feature_info", None) or ()]


@final
class TorchvisionClassifier(Classifier):
    """torchvision has no such cut: the input of the last ``nn.Linear`` is caught on its way in."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__(plain)
        linear = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UsageError(
                f"a {type(plain).__name__} does not end in a linear layer",
                "Choose a model with a linear classifier.",
            )
        self._head_name = linear[-1]

    @property
    def head(self) -> nn.Module:
        """See the base."""
        return self.plain.get_submodule(self._head_name)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """See the base."""
        caught: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            self.plain(images)
        finally:
            handle.remove()
        return caught[-1]

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: names of submodules, of which those with 4-D outputs give maps."""
        return tuple(name for name, _ in self.plain.named_modules() if name)

    def features_and_maps(
        self, images: Float[Tensor, "b 3 h w"], taps: Sequence[str]
    ) -> tuple[Float[Tensor, "b d"], dict[str, Float[Tensor, "b _ _ _"]]]:
        """See the base."""
        with _outputs_of(self.plain, taps) as caught:
            features = self.features(images)
        return features, {tap: _as_map(tap, found, images) for tap, found in caught.items()}


@contextmanager
def _outputs_of(plain: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Catch what submodules give while the context lasts."""
    caught: dict[str, list[Any]] = {name: [] for name in names}

    def catch(into: list[Any], output: Any) -> None:
        # A copy: the next module may write into it (bn1, then an in-place ReLU).
        into.append(output.clone() if isinstance(output, Tensor) else output)

    handles = [
        plain.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, into=into: catch(into, output)
        )
        for name, into in caught.items()
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _as_map(tap: str, found: list[Any], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b _ _ _"]:
    """What a hook caught, as [b, C, H, W]: the two sides that are in proportion to the image's are H, W."""
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim != 4:
        times = f"runs {len(found)} times" if len(found) != 1 else "gives no 4-D tensor"
        raise UsageError(f"'{tap}' is no feature map: it {times} in a forward", "Choose a stage, or a block.")
    output: Tensor = found[0]
    _, first, second, third = output.shape
    height, width = images.shape[2:]
    channels_first, channels_last = second * width == third * height, first * width == second * height
    if channels_first == channels_last:
        raise UsageError(
            f"'{tap}' is no feature map: in its shape {tuple(output.shape)}, height and width cannot be told",
            "Choose a stage, or a block.",
        )
    return output if channels_first else output.permute(0, 3, 1, 2)


def head_name(classifier: Classifier) -> str:
    """State-dict prefix of the last linear layer in the plain network."""
    head = classifier.head
    return next((name for name, module in classifier.plain.named_modules() if module is head), "")


def synthetic_image(size: tuple[int, int]) -> Float[Tensor, "1 3 h w"]:
    """A fixed image to look at a network with, as if normalised, on the CPU.

    It has no random numbers: opening a model must not move the generator that initialises a student.
    """
    return torch.sin(torch.arange(3 * size[0] * size[1], dtype=torch.float32) * 0.37).reshape(1, 3, *size)


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two ways to the same output agree but for rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def weights_sha256(module: nn.Module) -> str:
    """Digest of a network's state dict: per tensor, in name order, its name, dtype, shape and bytes.

    Independent of device and memory format; a :class:`Classifier` has the digest of its plain network,
    and one that runs an ONNX file that of the file.
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
