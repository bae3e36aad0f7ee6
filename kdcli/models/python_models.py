"""``pkg.mod:OBJECT``: any Python callable as a teacher, from normalised images [b, 3, h, w] to logits [b, c].

OBJECT is a torch module; or a function (or callable object) of one argument, the images; or a function or class that
takes none and gives one of these. It may say more about itself, by attributes (of OBJECT, or of what it gives):

version       anything with a text. Needed unless it is a module with weights, whose digest is who it is; where both are
              there, both count. Change it whenever the logits change.
preprocess    a mapping with fields of timm's pretrained_cfg; what is left out is as in timm's own default.
class_names   of the logits, in order.
num_classes   checked; found with two images in any case.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import BadDataError, KdError, UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.declared import DEFAULT, declared_preprocess
from kdcli.models.grammar import ModelSpec, only_a_teacher
from kdcli.models.network import Classifier, synthetic_image, weights_sha256
from kdcli.registry import load_object
from kdcli.types import Preprocess, Size

_PROTOCOL = "It must be a torch module or a function from images [b, 3, h, w] to logits [b, c]; see docs/extending.md."


@final
class PythonArchitecture(Architecture):
    """A callable with what it says about itself.

    Args:
        spec: of kind python.

    Raises:
        NotFoundError: there is no such object.
        UsageError: it is no such callable, or has no identity.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._object = load_object(spec.name)
        self._call = self._made()
        if self._declared("version") is None and not _has_weights(self._call):
            raise UsageError(
                f"'{spec}' has no identity: it is no torch module with weights, and has no version",
                f'Give it one, e.g. {spec.name.partition(":")[2]}.version = "1"; change it whenever its logits change.',
            )

    def _made(self) -> Callable[..., Any]:
        found: Callable[..., Any] = self._object
        if not isinstance(found, nn.Module) and callable(found) and _arguments(found) == 0:
            found = found()
        if not isinstance(found, nn.Module) and not (callable(found) and _arguments(found) == 1):
            raise UsageError(
                f"'{self._spec}' is a {type(found).__name__} that cannot be a teacher", _PROTOCOL
            )
        return found

    def _declared(self, name: str) -> Any:
        return getattr(self._call, name, getattr(self._object, name, None))

    @property
    def name(self) -> str:
        """See the base."""
        return self._spec.name

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base: it has no other weights than its own.

        Raises:
            UsageError: always.
        """
        raise only_a_teacher(self._spec)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base."""
        classifier = PythonClassifier(self._call, self._spec.name, self._declared("version"))
        classes = classifier.measure(self.preprocess(image_size).size)
        names = self.class_names()
        for what, count in (
            ("num_classes", self._declared("num_classes")),
            ("class_names", names and len(names)),
        ):
            if count not in (None, classes):
                raise BadDataError(
                    f"'{self._spec}' gives {classes} logits, and its {what} says {count}",
                    f"Correct its {what}.",
                )
        return classifier

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base."""
        declared = self._declared("preprocess") or {}
        if not isinstance(declared, Mapping):
            raise UsageError(
                f"preprocess of '{self._spec}' is a {type(declared).__name__}, not a mapping",
                f"For example {dict(DEFAULT)}",
            )
        return declared_preprocess({**DEFAULT, **declared}, f"preprocess of '{self._spec}'", image_size)

    def class_names(self) -> tuple[str, ...] | None:
        """See the base."""
        names: Sequence[str] | None = self._declared("class_names")
        return None if names is None else tuple(map(str, names))


def _arguments(found: Callable[..., Any]) -> int | None:
    """How many arguments it must be given by place; None where it does not say."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in by_place and each.default is inspect.Parameter.empty for each in parameters)


def _has_weights(found: Callable[..., Any]) -> bool:
    return isinstance(found, nn.Module) and bool(found.state_dict())


@final
class _Function(nn.Module):
    """A function as a module without weights."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, images: Tensor) -> Any:
        return self.call(images)


@final
class PythonClassifier(Classifier):
    """A callable that gives logits and nothing else.

    Args:
        call: from images to logits.
        name: what to call it in errors; part of its identity where it has no weights.
        version: that it declares.
    """

    def __init__(self, call: Callable[..., Any], name: str, version: object) -> None:
        super().__init__(call if isinstance(call, nn.Module) else _Function(call))
        self._name, self._said = name, version
        self._classes: int = 0

    @property
    def head(self) -> nn.Module:
        """See the base: whatever it ends in, it runs whole."""
        return nn.Identity()

    @property
    def num_classes(self) -> int:
        """See the base."""
        return self._classes

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """See the base.

        Raises:
            BadDataError: what it gives are no logits of these images.
        """
        logits = self.plain(images)
        if not (
            isinstance(logits, Tensor)
            and logits.is_floating_point()
            and logits.shape[:-1] == images.shape[:1]
        ):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise BadDataError(f"'{self._name}' gives {given} for {len(images)} images", _PROTOCOL)
        return logits

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base; logits only."""
        if other := [name for name in names if name != "logits"]:
            raise UsageError(f"'{self._name}' gives no {other[0]}", "Use --keep logits.")
        return {name: self(images) for name in names}

    def measure(self, size: Size) -> int:
        """The number of its logits, found with two synthetic images; sets eval mode.

        Raises:
            BadDataError: it fails on them, or gives no logits [2, c].
        """
        self.eval()
        with torch.inference_mode():
            try:
                self._classes = int(self(synthetic_image(size).repeat(2, 1, 1, 1)).shape[1])
            except KdError:
                raise
            except Exception as error:
                raise BadDataError(
                    f"'{self._name}' fails on images of {size[0]} x {size[1]} pixels: {type(error).__name__}: {error}",
                    _PROTOCOL,
                ) from error
        return self._classes

    def check(self, size: Size, name: str) -> int:
        """See the base: it has no features."""
        self.without = "a Python callable gives logits alone"
        return 0

    def digest(self) -> str:
        """See the base: of its weights, and of its version where it has one."""
        weights = weights_sha256(self.plain) if _has_weights(self.plain) else self._name
        return weights if self._said is None else sha256(f"{weights}\n{self._said}".encode()).hexdigest()
