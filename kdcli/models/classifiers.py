"""The classifiers of timm and torchvision: logits by calling them, features from before their heads."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, Final, final

from jaxtyping import Float
from timm.models import get_model_args
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.arguments import known_arguments, telling
from kdcli.models.layers import as_map, outputs_of
from kdcli.models.network import Classifier, looking, nearly_equal
from kdcli.outputs import MAPS

NORM: Final = "norm"
"""Tap of the normalised tokens of a transformer, those of no place left out."""
_FINAL: Final = "final"
"""Tap of what other networks pool, where no stage of timm's feature_info is that."""
_POOLING: Final[Mapping[str, str]] = {
    "token": "class token",
    "map": "attention pool",
    "avg": "average",
    "fast": "average",
    "fastavg": "average",
    "max": "maximum",
    "fastmax": "maximum",
    "avgmax": "mean of average and maximum",
    "fastavgmax": "mean of average and maximum",
    "catavgmax": "average and maximum",
    "fastcatavgmax": "average and maximum",
}
"""timm's words."""


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
        taps = [name.removeprefix(MAPS) for name in names if name.startswith(MAPS)]
        if not taps:
            return self.finish(plain.forward_features(images), names)
        stages = self._tap_names
        places = {stages.index(tap) for tap in taps if tap in self.stages}
        pooled = self.last_tap if self.last_tap in set(taps) - set(self.stages) else ""
        if pooled:
            places.add(len(stages) - 1)
        with outputs_of(plain, [tap for tap in taps if tap not in self.taps]) as caught:
            last, found = self._run_stages(images, places) if places else (plain.forward_features(images), {})
        if pooled:
            found[pooled] = _final_map(plain, last, found[stages[-1]])
        behind = getattr(plain, "output_fmt", "") == "NHWC"
        others = int(getattr(plain, "num_prefix_tokens", 0))
        found |= {tap: as_map(tap, each, images, others, behind) for tap, each in caught.items()}
        outputs = {MAPS + tap: each for tap, each in found.items()}
        outputs |= self.finish(last, [name for name in names if name not in outputs])
        return {name: outputs[name] for name in names}

    def _run_stages(
        self, images: Float[Tensor, "b 3 h w"], places: set[int]
    ) -> tuple[Any, dict[str, Tensor]]:
        """What ``forward_features`` gives, and the maps of some stages on the way, by name."""
        plain: Any = self.plain
        indices, names = sorted(places), self._tap_names
        # stop_early is timm's default for some (Hiera), and what they return then is not the last layer's.
        last, maps = plain.forward_intermediates(images, indices=indices, stop_early=False)
        return last, {names[place]: each for place, each in zip(indices, maps, strict=True)}

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
    def pooling(self) -> str:
        """See the base: as timm calls it, where it has a word."""
        plain: Any = self.plain
        places = (plain, getattr(plain, "head", None))
        pools = [getattr(place, name, None) for place in places for name in ("global_pool", "pool_type")]
        kinds = [getattr(pool, "pool_type", pool) for pool in pools]
        return next((_POOLING[kind] for kind in kinds if isinstance(kind, str) and kind in _POOLING), "")

    @property
    def stages(self) -> tuple[str, ...]:
        """See the base: timm's feature_info names, without those that name several layers."""
        if not hasattr(self.plain, "forward_intermediates"):
            return ()
        names = self._tap_names
        return tuple(name for name in names if names.count(name) == 1)

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: the stages, then what its features are pooled from, where that is none of them."""
        return tuple(dict.fromkeys([*self.stages, *([self.last_tap] if self.last_tap else [])]))

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """See the base: all modules; those of the head run too late."""
        return tuple(name for name, _ in self.plain.named_modules() if name and name not in self.taps)

    @functools.cached_property
    def last_tap(self) -> str:
        """See the base: what timm's ``forward_features`` gives."""
        if not self.stages:
            return ""
        place = len(self._tap_names) - 1
        with looking(self) as image:
            last, found = self._run_stages(image, {place})
            stage = found[self._tap_names[place]]
            try:
                final = _final_map(self.plain, last, stage)
            except UsageError:
                return ""
        if self._tap_names[place] in self.stages and nearly_equal(final, stage):
            return self._tap_names[place]
        return NORM if isinstance(getattr(self.plain, NORM, None), nn.Module) else _FINAL

    @property
    def _tap_names(self) -> list[str]:
        plain: Any = self.plain
        return [str(entry["module"]) for entry in getattr(plain, "feature_info", None) or ()]


def _final_map(plain: Any, last: Any, stage: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b C H W"]:
    """What timm's ``forward_features`` gave, as a map.

    Args:
        plain: timm's network.
        last: tokens [b, n, C] of which those of the places come last, or a map in timm's or the other order of axes.
        stage: the map of its last stage, whose grid is that of the tokens.

    Raises:
        UsageError: it has no places.
    """
    height, width = stage.shape[2:]
    if isinstance(last, Tensor) and last.ndim == 4:
        channels = getattr(plain, "num_features", None)
        behind = last.shape[3] == channels and (
            last.shape[1] != channels or getattr(plain, "output_fmt", "") == "NHWC"
        )
        return last.permute(0, 3, 1, 2) if behind else last
    if isinstance(last, Tensor) and last.ndim == 3:
        others = last.shape[1] - height * width
        if others == getattr(plain, "num_prefix_tokens", 0):
            return last[:, others:].transpose(1, 2).reshape(len(last), -1, height, width)
    raise UsageError(
        "what its features are pooled from is no map of places", "Choose one of its stages: maps:TAP."
    )


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _averaged(values: Float[Tensor, "b c *_"]) -> Float[Tensor, "b c"]:
    """The mean over all places and frames."""
    return values.mean(dim=tuple(range(2, values.ndim))) if values.ndim > 2 else values


def _are_tokens(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 3


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
        last = last or [name for name, module in plain.named_modules() if isinstance(module, _CONVOLUTIONS)]
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
        return head.out_channels if isinstance(head, _CONVOLUTIONS) else super().num_classes

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        taps = [name.removeprefix(MAPS) for name in names if name.startswith(MAPS)]
        caught: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            with outputs_of(self.plain, taps) as maps:
                found = {"logits": self.plain(images)}
        finally:
            handle.remove()
        features = caught[-1]
        found["features"] = _averaged(features)
        found |= {MAPS + tap: as_map(tap, each, images, self._class_tokens) for tap, each in maps.items()}
        return {name: found[name] for name in names}

    @property
    def pooling(self) -> str:
        """See the base."""
        tap = self.last_tap
        if not tap:
            return ""
        with looking(self) as image:
            given = self.outputs(image, ("features", MAPS + tap))
        if nearly_equal(given["features"], _averaged(given[MAPS + tap])):
            return "average"
        return _POOLING["token"] if self._class_tokens is not None else ""

    @property
    def stages(self) -> tuple[str, ...]:
        """See the base: names of submodules, of which those with outputs [b, C, H, W] (or tokens) give maps."""
        return tuple(name for name, _ in self.plain.named_modules() if name)

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: the stages, the one that its features are pooled from last."""
        rest = tuple(name for name in self.stages if name != self.last_tap)
        return (*rest, self.last_tap) if self.last_tap else rest

    @functools.cached_property
    def last_tap(self) -> str:
        """See the base: the outermost module that gives what its last pooling gets, or else what averages to its
        features, or their class token."""
        names, pooled = self.stages, list[Tensor]()
        pools = [each for each in self.plain.modules() if isinstance(each, _POOLS)]
        pools = (
            [] if isinstance(self.head, _CONVOLUTIONS) else pools
        )  # there it is the classes' maps that are pooled
        handles = [
            pool.register_forward_pre_hook(lambda _module, inputs: pooled.append(inputs[0])) for pool in pools
        ]
        try:
            with looking(self) as image, outputs_of(self.plain, names) as caught:
                features = self.outputs(image, ("features",))["features"]
        finally:
            for handle in handles:
                handle.remove()
        found: list[tuple[int, int, int, str]] = []
        for order, name in enumerate(names):
            try:
                each = as_map(name, caught[name], image, self._class_tokens)
            except UsageError:
                continue
            own = each if pooled else _averaged(each)
            wanted = pooled[-1] if pooled else features
            tokens = caught[name][0]
            if nearly_equal(own, wanted) or (_are_tokens(tokens) and nearly_equal(tokens[:, 0], features)):
                found.append((-each[0, 0].numel(), name.count("."), order, name))
        return min(found)[-1] if found else ""

    @property
    def _class_tokens(self) -> int | None:
        """Of a vision transformer, whose tokens begin with that of the class; None of other networks."""
        return 1 if isinstance(getattr(self.plain, "patch_size", None), int) else None
