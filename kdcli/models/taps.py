"""What can be had of an open model: logits, features, and feature maps at named taps."""

from collections.abc import Iterable, Sequence

import torch

from kdcli.errors import UsageError, nearest
from kdcli.models.network import nearly_equal, synthetic_image
from kdcli.models.spec import Model
from kdcli.outputs import MAPS, POOL, Output, raw_outputs, resolved

_SHOWN = 40
"""How many taps an error lists."""


def require_outputs(model: Model, outputs: Iterable[Output]) -> None:
    """Make sure that a model gives what is to be kept; nothing is run.

    Raises:
        UsageError: it has no classes, fewer than K of them, no features, or no such tap.
    """
    outputs = tuple(outputs)
    raw = raw_outputs(outputs)
    if "logits" in raw and not model.num_classes:
        raise UsageError(f"'{model.spec}' has no classifier, so it gives no logits", "Use --keep features.")
    if "features" in raw and not model.num_features:
        raise UsageError(
            f"'{model.spec}' gives no features: {model.network.without or 'it has logits alone'}",
            "Use --keep logits, or a model that pools its features before its classifier.",
        )
    for output in outputs:
        if output.top_k > model.num_classes:
            raise UsageError(
                f"--keep {output}: '{model.spec}' has only {model.num_classes} classes",
                f"Use --keep logits, or topk:K with K of at most {model.num_classes}.",
            )
    _require_taps(model, [output.tap for output in outputs if output.kind == "maps"])


def with_last_tap(model: Model, outputs: Iterable[Output]) -> tuple[Output, ...]:
    """What is to be kept of a model, its tokens by the name of its last tap.

    Raises:
        UsageError: what its features are pooled from is no map; or it was asked for by its name, too.
    """

    def last_tap() -> str:
        if model.network.last_tap:
            return model.network.last_tap
        known = model.network.taps
        taps = (
            f"Keep a map by its tap, maps:TAP: {_listed(known)}."
            if known
            else "Leave tokens out: --keep features."
        )
        raise UsageError(
            f"'{model.spec}' has no map that its features are pooled from, so it has no tokens", taps
        )

    return resolved(outputs, last_tap)


def tap_shapes(model: Model, taps: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape (C, H, W) of the feature map at each tap, of clips (C, T, H, W), found with one synthetic image.

    Args:
        model: an open model; its network stays where it is, in eval mode.
        taps: names of stages or of other layers.

    Raises:
        UsageError: there is no such tap, or it gives no feature map; or the forward that gives the maps
            gives other features than the plain one.
    """
    _require_taps(model, taps)
    if not taps:
        return {}
    network = model.network.eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    image = synthetic_image(model.preprocess.size).to(device)
    plain = ("features",) if model.num_features else ("logits",)
    with torch.inference_mode():
        found = network.outputs(image, [*plain, *(MAPS + tap for tap in taps)])
        same = nearly_equal(found[plain[0]], network.outputs(image, plain)[plain[0]])
    maps = {tap: found[MAPS + tap] for tap in taps}
    if not same or any(each.ndim != image.ndim for each in maps.values()):
        raise UsageError(
            f"'{model.spec}' cannot give feature maps: timm's forward_intermediates differs from its forward",
            "Leave maps out for this teacher.",
        )
    return {tap: tuple(maps[tap].shape[1:]) for tap in taps}


def pooled_shape(model: Model, output: Output, shape: tuple[int, ...]) -> list[int]:
    """The shape (C, H, W) of a map as it is kept, of clips (C, T, H, W).

    Args:
        model: for messages.
        output: the map.
        shape: as the model gives it.

    Raises:
        UsageError: it is to be pooled over a grid that is finer than its own, or over time that it has not.
    """
    channels, *time, height, width = shape
    if output.pool_time and not time:
        raise UsageError(
            f"--keep {output}: the map '{output.tap}' of '{model.spec}' is of images, which have no time",
            f"Pool over places alone: {POOL}{output.pool}.",
        )
    if output.pool > min(height, width) or output.pool_time > min(time, default=0):
        own = " x ".join(map(str, (*time, height, width)))
        size = " x ".join(map(str, model.preprocess.size))
        raise UsageError(
            f"--keep {output}: the map '{output.tap}' of '{model.spec}' is {own} at {size} pixels",
            f"Pool over a grid of at most {own}, leave {output.grid} out, or show it larger "
            "images: --teacher-size.",
        )
    kept = [output.pool_time] if output.pool_time else time
    return [channels, *kept, output.pool or height, output.pool or width]


def require_tap(model: Model, tap: str) -> None:
    """Make sure that a model has a tap.

    Raises:
        UsageError: it has none of that name; the nearest and the others are named.
    """
    _require_taps(model, [tap])


def _require_taps(model: Model, taps: Sequence[str]) -> None:
    known, layers = model.network.taps, model.network.layers
    for tap in taps:
        if not known and not layers:
            raise UsageError(f"'{model.spec}' has no taps, so it gives no feature maps", "Leave maps out.")
        if tap not in known and tap not in layers:
            raise UsageError(
                f"'{model.spec}' has no tap '{tap}'.{nearest(tap, [*known, *layers])}",
                f"Its taps: {_listed(known or layers)}{'; or any other layer' if known and layers else ''}.",
            )


def _listed(known: Sequence[str]) -> str:
    """The taps, those deep inside others left out where there are too many."""
    for depth in (9, 2, 1, 0):
        shown = [name for name in known if name.count(".") <= depth]
        if len(shown) <= _SHOWN:
            break
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) < len(known) or len(shown) > _SHOWN else "")
