"""From a model string to an open network: :func:`open_model`. The kinds of models are in kinds.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from kdcli.errors import UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.arguments import Argument
from kdcli.models.grammar import (
    ModelSpec,
    WeightsName,
    default_init,
    is_teacher_only,
    only_a_teacher,
    size_text,
)
from kdcli.models.network import Classifier, weights_sha256
from kdcli.models.weights import with_body_of
from kdcli.registry import MODELS, load_object
from kdcli.types import Preprocess, Size

__all__ = ["Model", "ModelSpec", "architecture_name", "default_init", "open_model", "weights_sha256"]


@final
@dataclass(frozen=True, slots=True)
class Model:
    """A network that is open, checked, and in eval mode on the CPU.

    Attributes:
        network: the network.
        spec: canonical model string that opens the same again.
        architecture: timm's name without tag, or what its kind calls it.
        preprocess: how it wants its pixels.
        num_classes: width of its logits; 0 when it gives features only.
        num_features: width of its features; 0 when they cannot be had.
        class_names: of the logits, in order, where known.
    """

    network: Classifier
    spec: str
    architecture: str
    preprocess: Preprocess
    num_classes: int
    num_features: int
    class_names: tuple[str, ...] | None


def open_model(
    spec: str | ModelSpec,
    *,
    weights: WeightsName = "pretrained",
    num_classes: int | None = None,
    image_size: int | Size | None = None,
    arguments: Mapping[str, Argument] = MappingProxyType({}),
) -> Model:
    """Open a model; what is random in it (seeded by torch's generator) is only what was asked to be.

    Args:
        spec: the model, see kinds.py.
        weights: ``pretrained`` loads every tensor or fails; ``random`` loads none.
        num_classes: width of the classifier; one that differs from the weights' own is a fresh random
            head on the loaded rest, an equal one keeps the head. 0 drops it.
        image_size: side of the input in pixels, or (height, width), of clips (frames, height, width) or these sides of
            as many frames as the spec tells; default: what the spec tells, or the model's own.
        arguments: of its library's constructor, e.g. ``drop_path_rate``, besides those that the spec tells.

    Returns:
        The model, in eval mode.

    Raises:
        NotFoundError: the model is unknown, or its weights cannot be had.
        BadDataError: its weights or configuration are damaged, or do not fit it.
        UsageError: it takes no images of that size, gives neither logits nor features, does not know an argument,
            or is an ONNX file that something else than a teacher is asked of.
        MissingExtraError: an ONNX file, without the packages that run it.
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    size = (image_size, image_size) if isinstance(image_size, int) else image_size or spec.size
    if size is not None and len(size) == 2 and spec.size is not None and len(spec.size) == 3:
        size = (spec.size[0], *size)
    with _told_by(spec):
        architecture = _architecture(spec)
        architecture.configure({**dict(spec.arguments), **arguments})
        if size is not None and len(size) == 3 and not architecture.preprocess(None).frames:
            raise UsageError(
                f"'{spec.bare}' takes images, and {size_text(size)} is a size of clips",
                f"Show it the frames of clips: frames:{spec.bare}[size={size_text(size)}]",
            )
        preprocess = architecture.preprocess(size)
        if weights == "random":
            classifier = architecture.random(num_classes, size)
            own_classes = None
        else:
            classifier = architecture.pretrained(size)
            own_classes = classifier.num_classes
            if num_classes not in (None, own_classes):
                classifier = with_body_of(classifier, architecture.random(num_classes, size))
        num_features = classifier.check(preprocess.size, str(spec.bare))
    return Model(
        network=classifier,
        spec=str(spec),
        architecture=architecture.name,
        preprocess=preprocess,
        num_classes=classifier.num_classes,
        num_features=num_features,
        class_names=architecture.class_names() if classifier.num_classes == own_classes else None,
    )


def require_known_arguments(spec: ModelSpec, arguments: Mapping[str, Argument]) -> None:
    """Refuse arguments that an architecture does not know; no weights are read.

    Raises:
        UsageError: naming the nearest known ones.
    """
    if arguments:
        _architecture(spec).configure(arguments)


def architecture_name(spec: ModelSpec) -> str:
    """The architecture of a spec that is to be trained, from its configuration alone; no weights are read.

    Raises:
        UsageError: an ONNX file, which can only be a teacher.
        NotFoundError: a folder, or a model of the hub, that is not there.
    """
    if is_teacher_only(spec):
        raise only_a_teacher(spec)
    return _architecture(spec).name


def class_names_of(spec: ModelSpec) -> tuple[str, ...] | None:
    """Names of a model's classes, from its configuration alone, where that knows them.

    Raises:
        NotFoundError: a folder, or a model of the hub, that is not there.
    """
    return _architecture(spec).class_names()


def _architecture(spec: ModelSpec) -> Architecture:
    architecture: Architecture = load_object(MODELS.find(spec.kind).architecture)(spec.bare)
    return architecture


@contextmanager
def _told_by(spec: ModelSpec) -> Iterator[None]:
    """Messages that call what a spec tells by a teacher's options, not by a student's."""
    try:
        yield
    except UsageError as error:
        if spec == spec.bare:
            raise
        message, hint = (
            text.replace("--model-arg", "--teacher-arg").replace("--image-size", "--teacher-size")
            for text in (error.message, error.hint)
        )
        raise UsageError(message, hint) from error
