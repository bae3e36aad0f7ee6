"""Model strings, and what a kind of models is. Importing this needs no torch; kd's own kinds are in kinds.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

from kdcli.errors import UsageError
from kdcli.registry import MODELS, is_object_path

WeightsName = Literal["pretrained", "random"]
Location = tuple[str, Path | None]
"""Name and file of a model, see :class:`ModelSpec`."""

TORCHVISION: Final = "torchvision/"
TRANSFORMERS: Final = "transformers/"


@final
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model comes from. ``str`` gives the canonical text, valid in any working directory.

    Attributes:
        kind: of :data:`~kdcli.registry.MODELS`.
        name: architecture (``torchvision/NAME`` for torchvision), the hub's ORG/NAME[@REV], or pkg.mod:OBJECT;
            empty for a folder, whose config.json says it, and for an ONNX file; of kd-fused the head.
        file: absolute path of the folder, weights file or ONNX file.
    """

    kind: str
    name: str
    file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read a model string.

        Args:
            text: of one of the kinds; a relative path is meant from the working directory.

        Returns:
            The spec; files are not touched, but architectures and tags are known to exist.

        Raises:
            UsageError: a form without its name, or a weights file that is not safetensors.
            NotFoundError: the form or the architecture is unknown.
        """
        text = text.strip()
        kind, rest = _kind_of(text)
        return cls(kind, *MODELS.find(kind).read(rest, text))

    def __str__(self) -> str:
        write = MODELS.find(self.kind).write
        return write(self) if write is not None else f"{self.kind}:{self.file or self.name}"


@final
@dataclass(frozen=True, slots=True)
class ModelKind:
    """One form of model string; kdcli/registry.py lists kd's own by name.

    Attributes:
        form: what is typed, for messages.
        read: from what is behind the prefix, and the whole text, to name and file; raises UsageError or NotFoundError.
        architecture: dotted path of the :class:`~kdcli.models.architectures.Architecture` that opens a spec.
        write: the canonical text of a spec; None: ``KIND:`` and its file or name.
        prefix: whether the form is ``KIND:...``.
        init: what a student starts from when nothing is said: bare names random, all that names weights, those.
        teacher_only: whether it runs as it is, and cannot be trained or exported.
    """

    form: str
    read: Callable[[str, str], Location]
    architecture: str
    write: Callable[[ModelSpec], str] | None = None
    prefix: bool = False
    init: WeightsName = "pretrained"
    teacher_only: bool = False


def _kind_of(text: str) -> tuple[str, str]:
    """The kind of a model string, and what it has to read."""
    if text.startswith(TRANSFORMERS):
        return "transformers", text.removeprefix(TRANSFORMERS)
    scheme, colon, rest = text.partition(":")
    for kind in (scheme, scheme.replace("_", "-")) if colon else ():
        if kind in MODELS and MODELS[kind].prefix:
            if not rest:
                raise UsageError(f"model '{text}' names nothing after '{kind}:'", forms())
            return kind, rest
    if is_object_path(text):
        return "python", text
    if "@" in text:
        return "file", text
    return "torchvision" if text.startswith(TORCHVISION) else "timm", text


def forms() -> str:
    """The hint that lists what a model string may look like."""
    return f"Known forms: {', '.join(kind.form for kind in MODELS.values())}."


def default_init(spec: ModelSpec) -> WeightsName:
    """What a student starts from when nothing is said."""
    init: WeightsName = MODELS.find(spec.kind).init
    return init


def is_teacher_only(spec: ModelSpec) -> bool:
    """Whether a model cannot be trained or exported."""
    return bool(MODELS.find(spec.kind).teacher_only)


def only_a_teacher(spec: ModelSpec | str) -> UsageError:
    """The error for a model that runs as it is and is to be trained, changed or exported."""
    return UsageError(
        f"'{spec}' can only be a teacher: it runs as it is, it cannot be trained or exported",
        "Choose a timm architecture for the student, e.g. --student resnet18.",
    )
