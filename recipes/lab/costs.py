"""What a recipe takes: GPU hours by counting, bytes of caches by ``kd cache plan``. Needs no data and no weights."""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import timm
import torch
from torchvision.models import get_model

from kdcli.console import console, size
from kdcli.errors import raised_elsewhere
from lab.calls import kd_here
from lab.steps import Lab, StandIn, Step


@final
@dataclass(slots=True)
class Cost:
    """Of all steps of a kind."""

    steps: int = 0
    images: float = 0
    hours: float = 0
    bytes: int = 0


def costs(lab: Lab, steps: Sequence[Step]) -> dict[str, Cost]:
    """By kind of step.

    A step takes as long as its images take to be decoded, or its arithmetic, whichever is longer.
    """
    found: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = _Weights(Path(folder))
        for step in steps:
            cost = found.setdefault(step.kind, Cost())
            decode = step.images / lab.settings["cost.decoded"]
            compute = 2e9 * step.gmacs / (1e12 * lab.settings["cost.tflops"])
            cost.steps, cost.images = cost.steps + 1, cost.images + step.images
            cost.hours += max(decode, compute) / 3600
            if step.stand_ins:
                print(f"kd cache plan of {step.name}", file=sys.stderr, flush=True)
                cost.bytes += _planned(step, weights)
    return found


def show_costs(found: Mapping[str, Cost], lab: Lab, as_json: bool) -> None:
    """Print them, with their sum."""
    total = Cost(*(sum(getattr(each, name) for each in found.values()) for name in Cost.__slots__))
    rows = {**found, "all": total}
    assumed = {name: lab.settings[f"cost.{name}"] for name in ("tflops", "decoded")}
    if as_json:
        console.document({"assumed": assumed, "costs": {kind: _fields(cost) for kind, cost in rows.items()}})
        return
    console.table(
        ["step", "commands", "images", "GPU hours", "cache"],
        [[kind, cost.steps, f"{cost.images:.2g}", f"{cost.hours:.1f}", size(cost.bytes) if cost.bytes else "-"]
         for kind, cost in rows.items()],
    )  # fmt: skip
    print(
        f"counted with {assumed['tflops']} TFLOP/s a GPU and {assumed['decoded']} images decoded a second a GPU"
    )


def _fields(cost: Cost) -> dict[str, float]:
    return {name: getattr(cost, name) for name in Cost.__slots__}


@final
class _Weights:
    """Files of random weights, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def spec(self, model: StandIn) -> str:
        """A model string that opens."""
        architecture, bracket, told = model.architecture.partition("[")
        path = self._folder / f"{architecture.replace('/', '-')}-{model.classes}.safetensors"
        if not path.exists():
            own = {} if model.classes is None else {"num_classes": model.classes}
            plain = architecture.removeprefix("frames:")
            name = plain.removeprefix("torchvision/")
            make: Any = timm.create_model if name == plain else get_model
            with torch.device("meta"), warnings.catch_warnings(action="ignore", category=FutureWarning):
                shapes = make(
                    name, **own
                ).state_dict()  # GoogLeNet's warns of an initialisation that none takes
            _write_zeros(shapes, path)
        return f"{architecture}@{path}{bracket}{told}"


_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


def _write_zeros(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file of zeros that takes no room on the disk: a header, and a hole."""
    header, end = {}, 0
    for name, each in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # each is aligned
        start, end = end, end + each.numel() * each.element_size()
        header[name] = {"dtype": _DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)


def _planned(step: Step, weights: _Weights) -> int:
    """Bytes that ``kd cache plan`` gives for a cache-teachers step."""
    specs = {name: weights.spec(model) for name, model in step.stand_ins.items()}
    words = ["cache", "plan", *step.words[1:], "--json", "--quiet", "--device", "cpu", "--workers", "0"]
    for place, word in enumerate(words):
        if word == "--teacher":
            name = words[place + 1].partition("=")[0]
            words[place + 1] = f"{name}={specs[name]}"
    with contextlib.redirect_stderr(io.StringIO()):
        _, told = kd_here(words)
    document = json.loads(told)
    if "bytes" not in document:  # a plan that the disk is too small for has them, beside the error
        raise raised_elsewhere(document)
    return int(document["bytes"])
