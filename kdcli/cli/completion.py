"""Words for values on the command line: what pressing Tab offers. Nothing heavy is imported, nothing raised."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Given = Mapping[str, Any]


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
    from typing import get_args

    from kdcli.training.config import MethodName

    return get_args(MethodName)


def _teachers(given: Given) -> Iterable[str]:
    """Names in the caches that the line names, from their records."""
    caches = [given.get(name) for name in ("cache", "caches", "test")]
    names: dict[str, None] = {}
    for folder in caches:
        for cache in folder if isinstance(folder, list | tuple) else [folder]:
            with suppress(OSError, TypeError):
                records = sorted((Path(cache) / "teachers").glob("*/teacher.json"))
                names |= dict.fromkeys(record.parent.name for record in records)
    return names


def _models(_given: Given) -> Iterable[str]:
    """The ways to name a model, and timm's names: read from its files, as importing it takes seconds."""
    found = find_spec("timm")
    folder = Path(found.origin).parent / "models" if found is not None and found.origin else Path()
    names: list[str] = []
    for file in sorted(folder.glob("*.py")) if found is not None else ():
        with suppress(OSError):
            names += re.findall(
                r"^@register_model\s+def (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE
            )
    return ("local-dir:", "hf-hub:", "torchvision/", "onnx:", "kd-fused:", *names)


def _recipes(_given: Given) -> Iterable[str]:
    from kdcli.data.recipes import RECIPES

    return RECIPES


_WORDS: Mapping[str, Callable[[Given], Iterable[str]]] = {
    "device": _devices,
    "method": _methods,
    "model": _models,
    "output": lambda _: ("logits", "features", "topk:", "maps:"),
    "recipe": _recipes,
    "shard": lambda _: ("array", "srun", "torchrun"),
    "teacher": _teachers,
}
