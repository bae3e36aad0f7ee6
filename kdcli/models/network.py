"""A classification network cut before its last linear layer, and the digest of its weights."""

from abc import ABCMeta, abstractmethod
from hashlib import sha256
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError


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


def head_name(classifier: Classifier) -> str:
    """State-dict prefix of the last linear layer in the plain network."""
    head = classifier.head
    return next((name for name, module in classifier.plain.named_modules() if module is head), "")


def check_cut(classifier: Classifier, size: tuple[int, int], name: str) -> int:
    """Make sure that the cut network is the whole network, on one synthetic image.

    Args:
        classifier: the network; left in eval mode.
        size: (height, width) in pixels of its input.
        name: what to call it in errors.

    Returns:
        The width of its features.

    Raises:
        UsageError: it takes no images of that size, or is not features followed by one linear layer
            (e.g. the two heads of a distilled DeiT).
    """
    if not isinstance(classifier.head, nn.Linear | nn.Identity):
        kind = type(classifier.head).__name__
        raise UsageError(
            f"'{name}' does not end in one linear layer (its head is a {kind})",
            "Choose a model with one linear classifier, e.g. the plain variant of a distilled one.",
        )
    classifier.eval()
    # No random numbers: opening a model must not move the generator that initialises a student.
    image = torch.sin(torch.arange(3 * size[0] * size[1], dtype=torch.float32) * 0.37).reshape(1, 3, *size)
    with torch.inference_mode():
        try:
            whole = classifier.plain(image)
            features = classifier.features(image)
            cut = classifier.classify(features) if classifier.num_classes else features
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"'{name}' takes no images of {size[0]} x {size[1]} pixels: {reason}",
                "Leave --image-size out, or choose a size that suits the model.",
            ) from error
    same = isinstance(whole, Tensor) and whole.shape == cut.shape
    if not same or features.ndim != 2 or not torch.allclose(whole, cut, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UsageError(
            f"'{name}' is not pooled features followed by one linear layer: its logits differ from those"
            " of its last layer alone",
            "Choose a model with one linear classifier.",
        )
    return features.shape[1]


def weights_sha256(module: nn.Module) -> str:
    """Digest of a network's state dict: per tensor, in name order, its name, dtype, shape and bytes.

    Independent of device and memory format; a :class:`Classifier` has the digest of its plain network.
    """
    state = (module.plain if isinstance(module, Classifier) else module).state_dict()
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
