"""Words for values on the command line: what pressing Tab offers. Nothing heavy is imported, nothing raised."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Given = Mapping[str, Any]
_REGISTERED = re.compile(r"^@register_model\s+def (\w+)", re.MULTILINE)


def complete(what: str, given: Given) -> Iterable[str]:
    """The words of a kind of value.

    Args:
        what: the mark ``complete`` of the option.
        given: what the line has so far, by field.
    """
    return _WORDS[what](given)


def _devices(_given: Given) -> Iterable[str]:
    return ("auto", "cpu", "cuda", "cuda:0")


def _methods(_given: Given) -> Iterable[str]:
    from kdcli.registry import METHODS

    return METHODS


def _metrics(_given: Given) -> Iterable[str]:
    from kdcli.registry import METRICS

    return (*METRICS, "all")


def _teachers(given: Given) -> Iterable[str]:
    """Names in the caches that the line names, from their records."""
    caches = given.get("cache") or ()
    names: dict[str, None] = {}
    for cache in caches if isinstance(caches, list | tuple) else (caches,):
        with suppress(OSError):
            records = sorted(Path(cache).glob("teachers/*/teacher.json"))
            names |= dict.fromkeys(
                record.parent.name for record in records if record.parent.name.isprintable()
            )
    return names


def _models(_given: Given) -> Iterable[str]:
    """The ways to name a model, and timm's names: read from its files, as importing it takes seconds."""
    found = find_spec("timm")
    names: list[str] = []
    if found is not None and found.origin is not None:
        for file in sorted(Path(found.origin).parent.glob("models/*.py")):
            with suppress(OSError):
                names += _REGISTERED.findall(file.read_text(encoding="utf-8"))
    return ("local-dir:", "hf-hub:", "torchvision/", "onnx:", "kd-fused:", *names)


def _recipes(_given: Given) -> Iterable[str]:
    from kdcli.data.recipes import RECIPES

    return RECIPES


_WORDS: Mapping[str, Callable[[Given], Iterable[str]]] = {
    "device": _devices,
    "method": _methods,
    "metric": _metrics,
    "model": _models,
    "output": lambda _: ("logits", "features", "topk:", "maps:", "pixels@eval"),
    "geometry": lambda _: ("own", "shared", "shared:", "whole", "clips:", "whole+clips:"),
    "recipe": _recipes,
    "student": _models,
    "shard": lambda _: ("array", "srun", "torchrun"),
    "teacher": _teachers,
}
