"""The grammar of model strings. Importing this needs no torch; names are checked against the libraries.

resnet50, resnet50.a1_in1k     timm architecture, with or without a pretrained tag
hf-hub:ORG/NAME[@REV]          timm model on the Hugging Face hub
local-dir:PATH                 folder with config.json and model.safetensors (what kd exports)
torchvision/NAME               torchvision classification model
ARCH@FILE.safetensors          weights of a timm or torchvision/NAME architecture from a file
onnx:FILE                      ONNX graph, as a teacher only; onnxruntime runs it
kd-fused:DIR[#HEAD]            joint teacher of kd fuse-teachers, as a teacher only
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from kdcli.errors import NotFoundError, UsageError, nearest

ModelKind = Literal["timm", "hf-hub", "local-dir", "torchvision", "file", "onnx", "kd-fused"]
WeightsName = Literal["pretrained", "random"]

TORCHVISION = "torchvision/"
ONNX = "onnx"
"""Both the form of the spec and what its architecture is called."""
_FORMS = (
    "Known forms: a timm name, hf-hub:ORG/NAME, local-dir:PATH, torchvision/NAME, ARCH@FILE.safetensors,"
    " onnx:FILE, kd-fused:DIR."
)
_CONVERT = (
    "Convert it once, from a source you trust: "
    'safetensors.torch.save_file(torch.load("FILE", weights_only=True), "FILE.safetensors").'
)


@final
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model comes from. ``str`` gives the canonical text, valid in any working directory.

    Attributes:
        kind: which of the forms.
        name: architecture (``torchvision/NAME`` for torchvision), or the hub's ORG/NAME[@REV];
            empty for a folder, whose config.json says it, and for an ONNX file; of kd-fused the head.
        file: absolute path of the folder, weights file or ONNX file.
    """

    kind: ModelKind
    name: str
    file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read a model string.

        Args:
            text: one of the forms above; a relative path is meant from the working directory.

        Returns:
            The spec; files are not touched, but architectures and tags are known to exist.

        Raises:
            UsageError: a form without its name, or a weights file that is not safetensors.
            NotFoundError: the form or the architecture is unknown.
        """
        text = text.strip()
        scheme, colon, rest = text.partition(":")
        if colon and (scheme := scheme.replace("_", "-")) in ("hf-hub", "local-dir", "onnx", "kd-fused"):
            return cls._located(text, scheme, rest)
        architecture, at, file = text.partition("@")
        if at:
            return cls("file", _known_architecture(architecture, text), _weights_file(file, text))
        name = _known_architecture(text, text)
        return cls("torchvision" if name.startswith(TORCHVISION) else "timm", name)

    @classmethod
    def _located(cls, text: str, scheme: str, rest: str) -> "ModelSpec":
        if not rest:
            raise UsageError(f"model '{text}' names nothing after '{scheme}:'", _FORMS)
        if scheme == "kd-fused":
            # A folder may have a # in its name: then it is there.
            place, _, head = (
                rest.rpartition("#") if "#" in rest and not _expanded(rest).is_dir() else (rest, "", "")
            )
            return cls("kd-fused", head, _expanded(place).absolute())
        if scheme != "hf-hub":
            kind: ModelKind = "onnx" if scheme == ONNX else "local-dir"
            return cls(kind, "", _expanded(rest).absolute())
        owner, slash, name = rest.partition("/")
        if not (owner and slash and name) or rest.count("@") > 1:
            raise UsageError(
                f"model '{text}' is not hf-hub:ORG/NAME[@REV]", "E.g. hf-hub:timm/resnet18.a1_in1k."
            )
        return cls("hf-hub", rest)

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.name}@{self.file}"
        if self.kind in ("local-dir", "onnx"):
            return f"{self.kind}:{self.file}"
        if self.kind == "kd-fused":
            return f"kd-fused:{self.file}" + (f"#{self.name}" if self.name else "")
        return f"hf-hub:{self.name}" if self.kind == "hf-hub" else self.name


def default_init(spec: ModelSpec) -> WeightsName:
    """What a student starts from when nothing is said: bare names random, all that names weights, those."""
    return "random" if spec.kind in ("timm", "torchvision") else "pretrained"


def only_a_teacher(spec: "ModelSpec | str") -> UsageError:
    """The error for an ONNX file, or a joint teacher, that is to be trained, changed or exported."""
    return UsageError(
        f"'{spec}' can only be a teacher: it runs as it is, it cannot be trained or exported",
        "Choose a timm architecture for the student, e.g. --student resnet18.",
    )


def unknown_architecture(name: str, where: str) -> NotFoundError:
    """The error for an architecture that timm does not have, naming the nearest.

    Args:
        name: what was asked for.
        where: the model string it is from.
    """
    from timm import list_models

    context = "" if name == where else f" in '{where}'"
    return NotFoundError(f"unknown model '{name}'{context}.{nearest(name, list_models())}", _FORMS)


def _known_architecture(name: str, text: str) -> str:
    if name.startswith(TORCHVISION):
        return _known_torchvision(name, text)
    if not name or name.endswith(".onnx") or any(character in name for character in "/\\: "):
        raise _not_a_name(name, text)
    from timm.models import (
        get_deprecated_models,
        get_pretrained_cfg,
        is_model,
        list_pretrained,
        split_model_name_tag,
    )

    name = get_deprecated_models().get(name) or name
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        raise unknown_architecture(architecture, text)
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        known = list_pretrained(f"{architecture}.*")
        raise NotFoundError(
            f"'{architecture}' has no weights tagged '{tag}'.{nearest(name, known)}",
            f"Tags: {', '.join(known) or 'none'}.",
        ) from error
    return name


def _known_torchvision(name: str, text: str) -> str:
    from torchvision import models

    list_models: Callable[..., list[str]] = models.list_models
    known = list_models(module=models)
    short = name.removeprefix(TORCHVISION)
    if short in known:
        return name
    suggestion = nearest(name, [TORCHVISION + each for each in known])
    context = "" if name == text else f" in '{text}'"
    raise NotFoundError(f"unknown torchvision model '{short}'{context}.{suggestion}", _FORMS)


def _not_a_name(name: str, text: str) -> NotFoundError | UsageError:
    if not text:
        return UsageError("the model string is empty", _FORMS)
    if _expanded(text).is_dir():
        return NotFoundError(f"'{text}' is a folder, not a model name", f"Write local-dir:{text}.")
    if name.endswith(".onnx"):
        return NotFoundError(f"'{text}' is a file, not a model name", f"Write onnx:{text}.")
    if name.endswith(".safetensors"):
        return NotFoundError(
            f"'{text}' is a file, not a model name", f"Write ARCH@{text} with its architecture."
        )
    if ":" not in name and name.count("/") == 1:
        return NotFoundError(
            f"'{text}' is no model name: it needs its source",
            f"Write hf-hub:{text} for the hub, or local-dir:{text} for a folder.",
        )
    return NotFoundError(f"unknown model '{text}'", _FORMS)


def _weights_file(file: str, text: str) -> Path:
    if not file:
        raise UsageError(f"model '{text}' names no file after '@'", _FORMS)
    path = _expanded(file).absolute()
    if path.suffix != ".safetensors":
        raise UsageError(f"'{file}' is not a .safetensors file; kd loads no pickled weights", _CONVERT)
    return path


def _expanded(text: str) -> Path:
    """A path with ``~`` filled in; ``~NAME`` of a user who is not there is a name like any other."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
