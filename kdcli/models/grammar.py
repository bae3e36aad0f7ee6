"""Model strings, and what a kind of models is. Importing this needs no torch; kd's own kinds are in kinds.py."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, final

from kdcli.errors import UsageError
from kdcli.models.arguments import Argument, parse_arguments
from kdcli.registry import MODELS, is_object_path, recorded
from kdcli.types import Size

WeightsName = Literal["pretrained", "random"]
Location = tuple[str, Path | None]
"""Name and file of a model, see :class:`ModelSpec`."""

TORCHVISION: Final = "torchvision/"
TRANSFORMERS: Final = "transformers/"
FRAMES: Final = "frames"


@final
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model comes from. ``str`` gives the canonical text, valid in any working directory.

    Attributes:
        kind: of :data:`~kdcli.registry.MODELS`.
        name: architecture (``torchvision/NAME`` for torchvision), the hub's ORG/NAME[@REV], or pkg.mod:OBJECT;
            empty for a folder, whose config.json says it, and for an ONNX file; of kd-fused the head.
        file: absolute path of the folder, weights file or ONNX file.
        size: of its input, where that is not its own.
        arguments: of its library's constructor, in the order of their names.
    """

    kind: str
    name: str
    file: Path | None = None
    size: Size | None = None
    arguments: tuple[tuple[str, Argument], ...] = ()

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
        text, told = _split(text.strip())
        kind, rest = _kind_of(text)
        size, arguments = parse_told(told, text)
        name, file = MODELS.find(kind).read(rest, text)
        return cls(kind, name, file, size, arguments)

    @property
    def bare(self) -> "ModelSpec":
        """The same model as its library opens it when nothing is told."""
        return replace(self, size=None, arguments=())

    def telling(self, size: Size | None, arguments: Mapping[str, Argument]) -> "ModelSpec":
        """The same model at another size, or built with more arguments.

        Raises:
            UsageError: it is told one of them already.
        """
        again = [name for name, _ in self.arguments if name in arguments]
        again += ["size"] if size and self.size else []
        for name, value in arguments.items():
            if re.search(r"[,\[\]]", _written(value)) or parse_arguments([f"{name}={_written(value)}"]) != {
                name: value
            }:
                raise UsageError(
                    f"'{self}': {name} cannot be told {value!r}", "Give a plain number, text, true or false."
                )
        if again:
            raise UsageError(f"'{self}' is told its {again[0]} already", "Tell it once.")
        both = sorted({**dict(self.arguments), **arguments}.items())
        return replace(self, size=size or self.size, arguments=tuple(both))

    def __str__(self) -> str:
        write = MODELS.find(self.kind).write
        text = write(self) if write is not None else f"{self.kind}:{self.file or self.name}"
        told = [f"size={size_text(self.size)}"] if self.size else []
        told += [f"{name}={_written(value)}" for name, value in self.arguments]
        return f"{text}[{','.join(told)}]" if told else text


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


_TOLD = re.compile(r"(.+)\[([^\[\]=]+=[^\[\]]*)\]", re.DOTALL)
_SIZE = re.compile(r"(?:([1-9]\d{0,3})x(?=\d+x))?([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?")
_LARGEST: Final = 2**14


def _split(text: str) -> tuple[str, str]:
    """A model string without what its end tells in brackets, and that; the name of a folder may end so, too."""
    found = _TOLD.fullmatch(text)
    if found is None or Path(text.partition(":")[2] or text).exists():
        return text, ""
    return found[1], found[2]


def parse_told(told: str, what: str) -> tuple[Size | None, tuple[tuple[str, Argument], ...]]:
    """What a model string tells in brackets: ``size=224`` or ``size=224x168``, and arguments ``KEY=VALUE``.

    Args:
        told: split by commas.
        what: the model, for messages.

    Raises:
        UsageError: it is none of these, or comes twice.
    """
    words = [word.strip() for word in told.split(",")] if told else []
    sizes = [word.removeprefix("size=") for word in words if word.startswith("size=")]
    if len(sizes) > 1:
        raise UsageError(f"'{what}' is told two sizes: {told}", "Tell it once.")
    arguments = parse_arguments((word for word in words if not word.startswith("size=")), f"'{what}':")
    return (parse_size(sizes[0]) if sizes else None), tuple(sorted(arguments.items()))


def parse_size(text: str) -> Size:
    """``224``, or ``HEIGHTxWIDTH``; of clips ``FRAMESxHEIGHTxWIDTH``.

    Raises:
        UsageError: it is neither, or a side has more than 16384 pixels.
    """
    found = _SIZE.fullmatch(text)
    sides = (int(found[2]), int(found[3] or found[2])) if found else (0, 0)
    if not 0 < max(sides) <= _LARGEST:
        raise UsageError(
            f"'{text}' is no size in pixels",
            f"Give a side, as 224, or HEIGHTxWIDTH; of clips FRAMESxHEIGHTxWIDTH; up to {_LARGEST}.",
        )
    return (int(found[1]), *sides) if found and found[1] else sides


def size_text(size: Size) -> str:
    """What :func:`parse_size` reads."""
    return str(size[0]) if len(set(size)) == 1 and len(size) == 2 else "x".join(map(str, size))


def _written(value: Argument) -> str:
    """An argument as it is read again; a text as it is, see :func:`~kdcli.models.arguments.parse_arguments`."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


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


def recorded_model(text: str) -> str:
    """A model as a cache or a model folder names it, see :func:`~kdcli.registry.recorded`.

    Raises:
        UsageError: opening it, or what ``frames:`` shows frames to, would run Python code that only a file names.
    """
    inner = text
    while inner.startswith(f"{FRAMES}:"):
        inner = inner.removeprefix(f"{FRAMES}:").strip()
    recorded(inner)
    return text


def default_init(spec: ModelSpec) -> WeightsName:
    """What a student starts from when nothing is said."""
    if spec.kind == FRAMES:
        return default_init(ModelSpec.parse(spec.name))
    init: WeightsName = MODELS.find(spec.kind).init
    return init


def is_teacher_only(spec: ModelSpec) -> bool:
    """Whether a model cannot be trained or exported."""
    if spec.kind == FRAMES:
        return is_teacher_only(ModelSpec.parse(spec.name))
    return bool(MODELS.find(spec.kind).teacher_only)


def only_a_teacher(spec: ModelSpec | str) -> UsageError:
    """The error for a model that runs as it is and is to be trained, changed or exported."""
    return UsageError(
        f"'{spec}' can only be a teacher: it runs as it is, it cannot be trained or exported",
        "Choose a timm architecture for the student, e.g. --student resnet18.",
    )
