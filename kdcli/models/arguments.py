"""Arguments of an architecture: what ``--model-arg`` and a config.json may say of how a network is built."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from kdcli.errors import BadDataError, ConfigError, UsageError, nearest
from kdcli.reading_yaml import parse_yaml

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
    | {"weights", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "model_name"}
)
_MOST: Final = {"num_classes": 10**7, "img_size": 2**14, "image_size": 2**14, "input_size": 2**14}
_WIDEST, _TIMES = 4096, 100
"""Largest number that a file may give for an argument: this, or so many times its default."""
_PARTS: Final = 1024
"""Most values of one argument."""
_TEXT: Final = 256
"""Longest text of an argument."""


def parse_arguments(texts: Iterable[str], option: str = "--model-arg") -> dict[str, Argument]:
    """``KEY=VALUE`` texts; values are YAML's numbers, true, false, and texts.

    Args:
        texts: as they were typed.
        option: what messages call who told them.

    Raises:
        UsageError: a text has no ``=``, a key comes twice, or a value is none of these.
    """
    found: dict[str, Argument] = {}
    for text in texts:
        key, equals, written = text.partition("=")
        if not (equals and key.strip().isidentifier()) or key.strip() in found:
            again = " comes twice" if key.strip() in found else " is not KEY=VALUE"
            raise UsageError(f"{option} {text}{again}", "E.g. drop_path_rate=0.2, once a key.")
        try:
            value = parse_yaml(written, option)
        except ConfigError:
            value = None
        if not isinstance(value, bool | int | float | str) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise UsageError(
                f"{option} {text}: the value must be a number, true, false or a text",
                "E.g. drop_path_rate=0.2.",
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
    return {name: default for name, default in defaults.items() if not is_reserved(name)}


def is_reserved(name: str) -> bool:
    """Whether an argument is one that no file and no user gives: it loads weights, or changes what a network gives."""
    return name in _NEVER or name.startswith("pretrained")


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
        if is_reserved(name):
            raise UsageError(
                f"--model-arg {name} is for kd to decide",
                "Weights come from --init, shapes from the model spec.",
            )
        if name not in free:
            raise UsageError(
                f"--model-arg {name}: a {architecture} has no such argument.{nearest(name, free)}",
                f"Its arguments: {', '.join(sorted(free))}.",
            )
        if is_share(name) and isinstance(value, int | float) and not 0 <= value < 1:
            raise UsageError(
                f"--model-arg {name}={value}: the value must be a share, from 0 to below 1",
                f"E.g. --model-arg {name}=0.1.",
            )
        if (default := known[name]) is not None and not _of_a_kind(value, default):
            raise UsageError(
                f"--model-arg {name}={value}: the value must be of the kind of its default, {default}",
                f"E.g. --model-arg {name}={str(default).lower() if isinstance(default, bool) else default}.",
            )


def require_recorded(
    given: Mapping[str, object], known: Mapping[str, object], where: str, architecture: str
) -> None:
    """Refuse what a model folder says of how its network is built, unless that is known, of its kind and bounded.

    Args:
        given: ``model_args`` of its config.json.
        known: see :func:`known_arguments`.
        where: the file, for the message.
        architecture: likewise.

    Raises:
        BadDataError: naming the file and the argument.
    """
    for name, value in given.items():
        if name not in known:
            raise BadDataError(
                f"{where}: model_args.{name}: a {architecture} does not know it, or it could load other weights",
                f"Its arguments: {', '.join(sorted(known))}.",
            )
        default = known[name]
        numbers = [each for each in _leaves(default) if isinstance(each, int | float)]
        most = _MOST.get(name, max([_WIDEST, *(_TIMES * abs(number) for number in numbers)]))
        reason = _no_share(value) if is_share(name) else _unlike(value, default, most)
        if reason:
            raise BadDataError(f"{where}: model_args.{name}: {reason}", "Export the model anew.")


def _unlike(value: object, default: object, most: float) -> str:
    """Why a value cannot stand for a default; empty where it can."""
    leaves = list(_leaves(value))
    if len(leaves) > _PARTS:
        return f"it holds {len(leaves)} values, more than {_PARTS}"
    for leaf in leaves:
        if isinstance(leaf, str) and len(leaf) > _TEXT:
            return f"a text of {len(leaf)} characters"
        if isinstance(leaf, int | float) and not abs(leaf) <= most:
            return f"{leaf:.4g} is out of range, which is up to {most:g}"
    if isinstance(value, bool | int | float | str):
        return "" if default is None or _of_a_kind(value, default) else f"{value!r} is not like {default!r}"
    if value is None or default is None or not isinstance(default, bool | str | int | float):
        return ""
    if not isinstance(default, bool | str) and isinstance(value, list | tuple):  # a number an axis
        return ""
    return f"{str(value)[:40]} is not like {default!r}"


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.keys()
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    else:
        yield value


def telling(given: Mapping[str, Any], defaults: Mapping[str, object]) -> dict[str, Any]:
    """Of the arguments of a network those that say how it computes its outputs, which its weights do not tell.

    Left out are defaults, sizes (they are in the preprocessing), and what counts in training only.
    """
    return {
        name: value
        for name, value in given.items()
        if name not in _DECIDED and not is_share(name) and value != defaults.get(name)
    }


def is_share(name: str) -> bool:
    """Whether an argument is a rate of dropout or of stochastic depth."""
    return "drop" in name and (name.endswith(("rate", "dropout")) or name == "drop")


def _no_share(value: object) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return "" if value is None or known else f"{str(value)[:40]} is no share, from 0 to 1"


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
