"""Arguments of an architecture: what ``--model-arg`` and a config.json may say of how a network is built."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Final

import yaml

from kdcli.errors import UsageError, nearest

Argument = bool | int | float | str

_SIZE = "The input size is --image-size."
_DECIDED: Final = {
    "num_classes": "The classes are those of the data.",
    "in_chans": "kd's images have 3 channels.",
    "img_size": _SIZE,
    "image_size": _SIZE,
    "input_size": _SIZE,
    "cfg": "Choose another architecture.",
}
"""What an architecture can be told and kd tells it, with the hint for who tries."""
_NEVER: Final = frozenset(
    {
        "self",
        "aux_logits",
        "transform_input",
        "init_weights",
        "features_only",
        "out_indices",
        "device",
        "dtype",
    }
    | {"weights", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"}
)
"""What no file and no user says: it loads weights, or changes what a network gives."""


def parse_arguments(texts: Iterable[str]) -> dict[str, Argument]:
    """``KEY=VALUE`` texts; values are YAML's numbers, true, false, and texts.

    Raises:
        UsageError: a text has no ``=``, a key comes twice, or a value is none of these.
    """
    found: dict[str, Argument] = {}
    for text in texts:
        key, equals, written = text.partition("=")
        if not (equals and key.strip().isidentifier()) or key.strip() in found:
            again = " comes twice" if key.strip() in found else " is not KEY=VALUE"
            raise UsageError(f"--model-arg {text}{again}", "E.g. --model-arg drop_path_rate=0.2, once a key.")
        try:
            value = yaml.safe_load(written)
        except (yaml.YAMLError, ValueError):
            value = None
        if not isinstance(value, bool | int | float | str) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise UsageError(
                f"--model-arg {text}: the value must be a number, true, false or a text",
                "E.g. --model-arg drop_path_rate=0.2.",
            )
        found[key.strip()] = value
    return found


def known_arguments(network: type) -> dict[str, object]:
    """What can be said of how a network of this class is built, the fields of its configuration included.

    Returns:
        The default of each argument by its name; None where there is none.

    A whitelist: the library's functions that load or fetch weights take more, and none of that is among these.
    """
    defaults: dict[str, object] = {}
    for kind in network.__mro__:
        if "__init__" not in vars(kind) or kind.__module__.startswith("torch.nn."):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        for each in parameters:
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
                defaults = {
                    each.name: None if each.default is each.empty else each.default,
                    **_fields_of(each.annotation),
                    **defaults,  # those of the class itself come before its bases'
                }
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return {
        name: default
        for name, default in defaults.items()
        if name not in _NEVER and not name.startswith("pretrained")
    }


def require_arguments(given: Mapping[str, Argument], known: Mapping[str, object], architecture: str) -> None:
    """Refuse arguments of a user that the architecture does not know, or that kd decides.

    Args:
        given: their values by name.
        known: see :func:`known_arguments`.
        architecture: for the message.

    Raises:
        UsageError: naming the nearest known ones.
    """
    free = [name for name in known if name not in _DECIDED]
    for name, value in given.items():
        if name in _DECIDED:
            raise UsageError(f"--model-arg {name} is for kd to decide", _DECIDED[name])
        if name in _NEVER or name.startswith("pretrained"):
            raise UsageError(
                f"--model-arg {name} is for kd to decide",
                "Weights come from --init, shapes from the model spec.",
            )
        if name not in free:
            raise UsageError(
                f"--model-arg {name}: a {architecture} has no such argument.{nearest(name, free)}",
                f"Its arguments: {', '.join(sorted(free))}.",
            )
        if _is_share(name) and isinstance(value, int | float) and not 0 <= value < 1:
            raise UsageError(
                f"--model-arg {name}={value}: the value must be a share, from 0 to below 1",
                f"E.g. --model-arg {name}=0.1.",
            )
        if (default := known[name]) is not None and not _of_a_kind(value, default):
            raise UsageError(
                f"--model-arg {name}={value}: the value must be of the kind of its default, {default}",
                f"E.g. --model-arg {name}={str(default).lower() if isinstance(default, bool) else default}.",
            )


def _is_share(name: str) -> bool:
    return "drop" in name and (name.endswith(("rate", "dropout")) or name == "drop")


def refused_arguments(given: Mapping[str, Argument], where: str, error: Exception) -> UsageError:
    """The error for arguments that the library knows and does not take."""
    told = " ".join(f"--model-arg {name}={value}" for name, value in given.items())
    return UsageError(
        f"'{where}' cannot be built with {told}: {error}", "Give values of the argument's kind."
    )


def _of_a_kind(value: Argument, default: object) -> bool:
    """Whether a value may stand for a default; what the default is no number or text of is for the library to judge."""
    for kind in (bool, int | float, str):
        if isinstance(default, kind) or (isinstance(value, bool) and kind is bool):
            return isinstance(value, kind) and isinstance(default, kind)
    return True


def _fields_of(annotation: object) -> dict[str, object]:
    kinds = [annotation, *typing.get_args(annotation)]
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for kind in kinds
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
    }
