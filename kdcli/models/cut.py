"""A network cut at a tap: what comes before it stays as it is, what comes after runs from its feature map."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.classifiers import TimmClassifier
from kdcli.models.frames import FramesClassifier, of_images
from kdcli.models.network import Classifier, nearly_equal, synthetic_image
from kdcli.models.spec import Model
from kdcli.models.taps import require_tap
from kdcli.outputs import MAPS

_HINT = (
    "Networks whose stages follow each other can be cut: ResNet, RegNet, EfficientNet, MobileNetV3, ConvNeXt."
)


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """A timm network in two parts, by the layers that its forward runs one after the other.

    Attributes:
        tap: name of the last layer of the lower part.
        lower: the layers up to it, in order.
        upper: the layers after it by name, in order, as far as the pooling.
    """

    tap: str
    lower: tuple[nn.Module, ...]
    upper: Mapping[str, nn.Module]

    def outputs(
        self, network: Classifier, feature_map: Float[Tensor, "b c *t h w"], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Features, logits, and maps of layers after the tap, of images whose feature map at the tap is given.

        Args:
            network: the network that was cut, or its own one that is shown the frames of clips.
            feature_map: what its lower part gave.
            names: ``logits``, ``features``, and ``maps/LAYER`` of layers that :func:`cut_at` was asked for.
        """
        if isinstance(network, FramesClassifier):
            inner = network.inner
            return network.of_frames(feature_map, lambda frames: self.outputs(inner, frames, names))
        assert isinstance(network, TimmClassifier)  # no other network can be cut
        found: dict[str, Tensor] = {}
        for name, layer in self.upper.items():
            feature_map = found[MAPS + name] = layer(feature_map)
        found |= network.finish(feature_map, [name for name in names if name not in found])
        return {name: found[name] for name in names}


@final
@dataclass(slots=True)
class _Call:
    """One layer of a traced forward: what went in and what came out."""

    name: str
    layer: nn.Module
    inputs: tuple[Any, ...]
    output: Any


def cut_at(model: Model, tap: str, matched: Collection[str] = ()) -> Cut:
    """Cut a network at a tap, where that can be done honestly.

    One image is followed through the network: each layer must be handed exactly what the one before it
    gave, and both parts together must give the features of the whole.

    Args:
        model: an open timm model; its network is put into eval mode.
        tap: name of a layer.
        matched: further taps, whose maps the upper part has to give.

    Raises:
        UsageError: there is no such tap, the network does more than run its layers in turn, or a matched map is not
            one of the upper part.
    """
    for each in (tap, *matched):
        require_tap(model, each)
    network = of_images(model.network.eval())
    if not isinstance(network, TimmClassifier):
        raise UsageError(f"--train-from {tap}: only timm's networks can be cut", _HINT)
    refuse = _refusal(model, tap)
    parameter = next(network.parameters(), torch.zeros(()))
    image = synthetic_image(model.preprocess.sides).to(parameter.device)
    units = _units(network.plain, tap, refuse)
    with torch.no_grad():
        calls, result = _follow(network.plain, units, image)
        _require_chain(calls, image, result, refuse)
        names = [call.name for call in calls]
        if tap not in names:
            raise refuse(f"its forward does not run '{tap}' by itself")
        place = names.index(tap) + 1
        upper = {call.name: call.layer for call in calls[place:]}
        if upper and network.last_tap not in upper:
            upper[network.last_tap] = upper.pop(
                names[-1]
            )  # what it gives is what the features are pooled from
        cut = Cut(tap, tuple(call.layer for call in calls[:place]), upper)
        maps = [MAPS + each for each in matched]
        whole = network.outputs(image, ["features", MAPS + tap, *maps])
        feature_map = whole[MAPS + tap]
        handed_on = calls[place - 1].output
        if handed_on.shape != feature_map.shape:
            raise refuse("what the layer hands on is not laid out as its feature map [b, C, H, W]")
        if not nearly_equal(cut.outputs(network, feature_map, ["features"])["features"], whole["features"]):
            raise refuse("the layers after it do not give its features from the map alone")
        for each in matched:
            _require_matched(cut, each, network.taps)
        again = cut.outputs(network, feature_map, maps)
        for each in maps:
            if again[each].shape != whole[each].shape or not nearly_equal(again[each], whole[each]):
                raise refuse(
                    f"its layers do not give the map of '{each.removeprefix(MAPS)}' as it is matched"
                )
    return cut


def _require_matched(cut: Cut, tap: str, taps: Sequence[str]) -> None:
    """Refuse to match a map that no layer of the upper part gives."""
    if tap not in cut.upper:
        known = [each for each in taps if each in cut.upper]
        raise UsageError(
            f"--train-from {cut.tap} trains the layers after it, and the map of '{tap}' is of none of them",
            "Cut lower" + (f", or match another one: --student-tap {known[-1]}." if known else "."),
        )


def _refusal(model: Model, tap: str) -> Callable[[str], UsageError]:
    return lambda reason: UsageError(
        f"--train-from {tap}: a {model.architecture} cannot be cut there: {reason}", _HINT
    )


def _units(plain: nn.Module, tap: str, refuse: Callable[[str], UsageError]) -> dict[str, nn.Module]:
    """The layers to follow: the network's children, those that hold the tap taken apart."""
    units: dict[str, nn.Module] = {}
    for name, child in plain.named_children():
        holds = tap.startswith(f"{name}.")
        inner = _units(child, tap.removeprefix(f"{name}."), refuse) if holds else {}
        units |= {f"{name}.{key}": layer for key, layer in inner.items()} if holds else {name: child}
    own = [name for name, _ in plain.named_parameters(recurse=False)]
    if own:
        raise refuse(f"it has weights outside of its layers ({own[0]})")
    return units


def _follow(plain: Any, units: dict[str, nn.Module], image: Tensor) -> tuple[list[_Call], Any]:
    """The layers that ``forward_features`` runs, in order, and what it returns."""
    calls: list[_Call] = []
    handles = [
        unit.register_forward_hook(
            lambda layer, inputs, output, name=name: calls.append(_Call(name, layer, inputs, output))
        )
        for name, unit in units.items()
    ]
    try:
        result = plain.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, result


def _require_chain(
    calls: list[_Call], image: Tensor, result: Any, refuse: Callable[[str], UsageError]
) -> None:
    """Make sure that every layer takes what the one before it gave, and the last gives the result."""
    value: Any = image
    before = "the image"
    for call in calls:
        if len(call.inputs) != 1 or call.inputs[0] is not value:
            raise refuse(f"its forward does something of its own between {before} and '{call.name}'")
        value, before = call.output, f"'{call.name}'"
    if result is not value:
        raise refuse(f"its forward does something of its own after {before}")
    if len({id(call.layer) for call in calls}) != len(calls):
        raise refuse("its forward runs a layer twice")
