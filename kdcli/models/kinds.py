"""kd's own kinds of models: how their strings are read and written. Importing this needs no torch.

resnet50, resnet50.a1_in1k     timm architecture, with or without a pretrained tag
hf-hub:ORG/NAME[@REV]          timm model on the Hugging Face hub
local-dir:PATH                 folder with config.json and model.safetensors (what kd exports)
torchvision/NAME               torchvision classification model
transformers/DIR-or-ID[@REV]   vision model of transformers in a folder or on the hub, as a teacher only
frames:MODEL                   a model of images, shown the frames of clips one by one
ARCH@FILE.safetensors          weights of a timm or torchvision/NAME architecture from a file
onnx:FILE                      ONNX graph, as a teacher only; onnxruntime runs it
kd-fused:DIR[#HEAD]            joint teacher of kd fuse-teachers, as a teacher only
pkg.mod:OBJECT                 Python callable, as a teacher only; see python_models.py
"""

import re
from collections.abc import Callable
from pathlib import Path

from kdcli.errors import NotFoundError, UsageError, nearest
from kdcli.files import beside
from kdcli.models.grammar import TORCHVISION, TRANSFORMERS, Location, ModelKind, ModelSpec, forms

_CONVERT = (
    "Convert it once, from a source you trust: "
    'safetensors.torch.save_file(torch.load("FILE", weights_only=True), "FILE.safetensors").'
)

_SHOWN = 6  # tags in a hint


def unknown_architecture(name: str, where: str) -> NotFoundError:
    """The error for an architecture that timm does not have, naming the nearest.

    Args:
        name: what was asked for.
        where: the model string it is from.
    """
    from timm import list_models

    if _expanded(where).is_dir():
        return _a_folder(where)
    context = "" if name == where else f" in '{where}'"
    return NotFoundError(f"unknown model '{name}'{context}.{nearest(name, list_models())}", forms())


def _known_architecture(name: str, text: str) -> str:
    if name.startswith(TORCHVISION):
        return known_torchvision(name, text)
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
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        raise NotFoundError(
            f"'{architecture}' has no weights tagged '{tag}'.{nearest(name, known)}",
            f"Tags: {', '.join(known[:_SHOWN]) or 'none'}{more}.",
        ) from error
    return name


def known_torchvision(name: str, text: str) -> str:
    """The name of an architecture of torchvision, with its prefix, which is in the model string ``text``.

    Raises:
        NotFoundError: there is none of that name; the nearest is told.
    """
    from torchvision import models

    list_models: Callable[..., list[str]] = models.list_models
    known = [*list_models(module=models), *list_models(module=models.video)]
    short = name.removeprefix(TORCHVISION)
    if short in known:
        return name
    suggestion = nearest(name, [TORCHVISION + each for each in known])
    context = "" if name == text else f" in '{text}'"
    raise NotFoundError(f"unknown torchvision model '{short}'{context}.{suggestion}", forms())


def _a_folder(text: str) -> NotFoundError:
    return NotFoundError(f"'{text}' is a folder, not a model name", f"Write local-dir:{text}.")


def _not_a_name(name: str, text: str) -> NotFoundError | UsageError:
    if not text:
        return UsageError("the model string is empty", forms())
    if _expanded(text).is_dir():
        return _a_folder(text)
    if name.endswith(".onnx"):
        return NotFoundError(f"'{text}' is a file, not a model name", f"Write onnx:{text}.")
    if name.endswith(".safetensors"):
        return NotFoundError(
            f"'{text}' is a file, not a model name", f"Write ARCH@{text} with its architecture."
        )
    if ":" not in name and name.count("/") == 1:
        return NotFoundError(
            f"'{text}' is no model name: it needs its source.{beside(_expanded(text))}",
            f"Write hf-hub:{text} for the hub, or local-dir:{text} for a folder.",
        )
    return NotFoundError(f"unknown model '{text}'", forms())


def _weights_file(file: str, text: str) -> Path:
    if not file:
        raise UsageError(f"model '{text}' names no file after '@'", forms())
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


def _hub(rest: str, text: str) -> Location:
    owner, slash, name = rest.partition("/")
    if not (owner and slash and name) or rest.count("@") > 1:
        raise UsageError(f"model '{text}' is not hf-hub:ORG/NAME[@REV]", "E.g. hf-hub:timm/resnet18.a1_in1k.")
    return rest, None


def _place(rest: str, text: str) -> Location:
    return "", _expanded(rest).absolute()


def _fused(rest: str, text: str) -> Location:
    # A folder may have a # in its name: then it is there.
    whole = "#" not in rest or _expanded(rest).is_dir()
    place, _, head = (rest, "", "") if whole else rest.rpartition("#")
    return head, _expanded(place).absolute()


def _transformers(rest: str, text: str) -> Location:
    if not rest:
        raise UsageError(f"model '{text}' names nothing after '{TRANSFORMERS}'", forms())
    place = _expanded(rest)
    if rest.startswith((".", "/", "~")) or place.is_dir():
        return "", place.absolute()
    if not _HUB_NAME.fullmatch(rest):
        raise NotFoundError(
            f"'{text}': there is no folder '{rest}', and the hub's names are ORG/NAME",
            "Write transformers/DIR, or transformers/ORG/NAME[@REV].",
        )
    return rest, None


def _file(rest: str, text: str) -> Location:
    architecture, _, file = text.partition("@")
    return _known_architecture(architecture, text), _weights_file(file, text)


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[^@\s]+)?")

TIMM = ModelKind(
    "a timm name",
    lambda rest, text: (_known_architecture(rest, text), None),
    "kdcli.models.timm_models:TimmArchitecture",
    write=lambda spec: spec.name,
    init="random",
)
HF_HUB = ModelKind("hf-hub:ORG/NAME", _hub, "kdcli.models.timm_models:TimmArchitecture", prefix=True)
LOCAL_DIR = ModelKind("local-dir:PATH", _place, "kdcli.models.folder_models:open_folder", prefix=True)
TORCHVISION_NAME = ModelKind(
    "torchvision/NAME",
    lambda rest, text: (known_torchvision(rest, text), None),
    "kdcli.models.torchvision_models:TorchvisionArchitecture",
    write=lambda spec: spec.name,
    init="random",
)
TRANSFORMERS_NAME = ModelKind(
    "transformers/DIR-or-ID",
    _transformers,
    "kdcli.models.transformers_models:TransformersArchitecture",
    write=lambda spec: f"{TRANSFORMERS}{spec.file or spec.name}",
    teacher_only=True,
)
FRAMES = ModelKind(
    "frames:MODEL",
    lambda rest, _: (str(ModelSpec.parse(rest)), None),
    "kdcli.models.frames:open_frames",
    prefix=True,
)
FILE = ModelKind(
    "ARCH@FILE.safetensors",
    _file,
    "kdcli.models.file_models:FileArchitecture",
    write=lambda spec: f"{spec.name}@{spec.file}",
)
ONNX = ModelKind(
    "onnx:FILE", _place, "kdcli.models.onnx_models:OnnxArchitecture", prefix=True, teacher_only=True
)
FUSED = ModelKind(
    "kd-fused:DIR",
    _fused,
    "kdcli.models.fused_network:FusedArchitecture",
    write=lambda spec: f"kd-fused:{spec.file}" + (f"#{spec.name}" if spec.name else ""),
    prefix=True,
    teacher_only=True,
)
PYTHON = ModelKind(
    "pkg.mod:OBJECT",
    lambda rest, _: (rest, None),
    "kdcli.models.python_models:PythonArchitecture",
    write=lambda spec: spec.name,
    teacher_only=True,
)
