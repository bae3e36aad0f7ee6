"""The classifiers of timm and torchvision: logits by calling them, features from before their heads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from jaxtyping import Float
from timm.models import get_model_args
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.arguments import known_arguments, telling
from kdcli.models.network import Classifier
from kdcli.outputs import MAPS


@final
class TimmClassifier(Classifier):
    """timm's own cut: ``forward_head(forward_features(x), pre_logits=True)``.

    Whatever the head is (a convolution, an MLP, the two of a distilled network, whose mean is the logits), it is
    applied as timm applies it.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__(plain)
        self._head_is_last = not isinstance(self.head, nn.ModuleList)

    @property
    def head(self) -> nn.Module:
        """See the base."""
        # timm gives a method, which nn.Module's typing cannot know; networks with several heads give a tuple.
        classifier: Any = self.plain.get_classifier()  # type: ignore[operator]
        return classifier if isinstance(classifier, nn.Module) else nn.ModuleList(classifier)

    @property
    def num_classes(self) -> int:
        """See the base."""
        return int(getattr(self.plain, "num_classes", 0) or 0)

    @property
    def settings(self) -> Mapping[str, Any]:
        """See the base: what timm would be told to build it again."""
        return telling(get_model_args(self.plain), known_arguments(type(self.plain)))

    @property
    def linear(self) -> bool:
        """See the base."""
        return self._head_is_last and super().linear

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        plain: Any = self.plain
        if "logits" in names and not self.num_classes:
            raise UsageError("the model has no classifier, so it gives no logits", "Use --keep features.")
        if set(names) == {"logits"}:
            return {"logits": plain(images)}
        places = sorted(
            self._tap_names.index(name.removeprefix(MAPS)) for name in names if name.startswith(MAPS)
        )
        if not places:
            return self.finish(plain.forward_features(images), names)
        # stop_early is timm's default for some (Hiera), and what they return then is not the last layer's.
        last, maps = plain.forward_intermediates(images, indices=places, stop_early=False)
        found = {MAPS + self._tap_names[place]: each for place, each in zip(places, maps, strict=True)}
        found |= self.finish(last, [name for name in names if name not in found])
        return {name: found[name] for name in names}

    def finish(self, last: Any, names: Collection[str]) -> dict[str, Tensor]:
        """Features, logits, or both, of what ``forward_features`` gave.

        Args:
            last: in the layout of this network.
            names: among ``logits`` and ``features``.
        """
        plain: Any = self.plain
        found: dict[str, Tensor] = {}
        if "features" in names:
            found["features"] = plain.forward_head(last, pre_logits=True)
        if "logits" in names:
            at_hand = found and self._head_is_last
            found["logits"] = self.head(found["features"]) if at_hand else plain.forward_head(last)
        return {name: found[name] for name in names}

    def _width(self, image: Tensor, whole: Float[Tensor, "1 _"]) -> int:
        """See the base; a head that cannot be applied to the features by itself is left to timm."""
        width = super()._width(image, whole)
        if self.without and self._head_is_last:
            self._head_is_last, self.without = False, ""
            return super()._width(image, whole)
        return width

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: timm's feature_info names, without those that name several layers."""
        if not hasattr(self.plain, "forward_intermediates"):
            return ()
        names = self._tap_names
        return tuple(name for name in names if names.count(name) == 1)

    @property
    def _tap_names(self) -> list[str]:
        plain: Any = self.plain
        return [str(entry["module"]) for entry in getattr(plain, "feature_info", None) or ()]


@final
class TorchvisionClassifier(Classifier):
    """torchvision has no such cut: the input of the last layer with weights is caught on its way in.

    That is a linear layer, or a 1x1 convolution before the pooling (SqueezeNet), whose input is pooled here.

    Args:
        plain: torchvision's network.
        arguments: that it was built with, beside the number of classes; an export records them.
    """

    def __init__(self, plain: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__(plain)
        self.arguments = dict(arguments)
        last = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
        last = last or [name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)]
        self._head_name = last[-1]

    @property
    def settings(self) -> Mapping[str, Any]:
        """See the base."""
        return telling(self.arguments, known_arguments(type(self.plain)))

    @property
    def head(self) -> nn.Module:
        """See the base."""
        return self.plain.get_submodule(self._head_name)

    @property
    def num_classes(self) -> int:
        """See the base."""
        head = self.head
        return head.out_channels if isinstance(head, nn.Conv2d) else super().num_classes

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        taps = [name.removeprefix(MAPS) for name in names if name.startswith(MAPS)]
        caught: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            with _outputs_of(self.plain, taps) as maps:
                found = {"logits": self.plain(images)}
        finally:
            handle.remove()
        features = caught[-1]
        found["features"] = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        found |= {MAPS + tap: _as_map(tap, each, images) for tap, each in maps.items()}
        return {name: found[name] for name in names}

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: names of submodules, of which those with 4-D outputs give maps."""
        return tuple(name for name, _ in self.plain.named_modules() if name)


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
