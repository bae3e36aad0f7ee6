"""Weights on their way into a network: safetensors files, strict loading, fresh heads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kdcli.errors import BadDataError, NotFoundError
from kdcli.files import storage_errors
from kdcli.models.network import Classifier
from kdcli.reading import require_regular

Value = TypeVar("Value")

_FREE = 2**20
"""Numbers that a network may have in any case."""
_SHOWN = 3
"""How many differing tensors an error names."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name of the network they wrap."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names, without those of wrappers, and shapes of the tensors in a safetensors file; the tensors are not read.

    Raises:
        NotFoundError: there is no such file.
        BadDataError: it is no regular file, truncated, or not safetensors.
        StorageError: it cannot be read.
    """
    if not path.exists():
        raise NotFoundError(f"there is no weights file '{path}'", "Check the path.")
    require_regular(path)
    try:
        with storage_errors(path), safe_open(path, framework="pt") as file:
            return _unwrapped({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise broken_file(path, error) from error


def _unwrapped(tensors: dict[str, Value]) -> dict[str, Value]:
    """Tensors under the names that the network itself gives them: wrappers prefix all of them, or none."""
    for prefix in _WRAPPERS * 2:  # either may wrap the other
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def broken_file(path: Path, error: Exception) -> BadDataError:
    """The error for a weights file whose bytes are no whole safetensors file."""
    return BadDataError(
        f"'{path}' is damaged, or no safetensors file: {error}",
        "Copy or download it again, or export it anew.",
    )


def load_strictly(network: nn.Module, path: Path) -> None:
    """Fill a network from a safetensors file that must hold exactly its tensors.

    Raises:
        NotFoundError: there is no such file.
        BadDataError: the file is damaged, or its names or shapes differ from the network's.
    """
    found = read_shapes(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    refuse_differences(wanted, found, path)
    network.load_state_dict(_unwrapped(load_file(path)), strict=True)


def refuse_differences(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path
) -> None:
    """Compare the tensors a network needs with those of a file.

    Raises:
        BadDataError: they differ; the message names the first few.
    """
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {_by(found[name])} instead of {_by(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    parts = [f"{len(names)} {what} ({_first(names)})" for what, names in problems.items() if names]
    if parts:
        raise BadDataError(
            f"the weights in '{path}' do not fit the architecture: tensors {', '.join(parts)}",
            "Give the architecture (and input size) that the file was saved from.",
        )


def require_no_larger(network: nn.Module, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse a network of a size that is out of proportion to the weights it is to be filled with.

    Args:
        network: on the meta device, where it takes no memory.
        found: shapes of the tensors in the file.
        path: the file.

    Raises:
        BadDataError: it has more than twice the file's numbers.
    """
    wanted = sum(tensor.numel() for tensor in network.state_dict().values())
    held = sum(math.prod(shape) for shape in found.values())
    if wanted > 2 * held + _FREE:
        raise BadDataError(
            f"the weights in '{path}' do not fit the architecture: it has {wanted} numbers, the file {held}",
            "Give the architecture that the file was saved from.",
        )


def with_body_of(source: Classifier, fresh: Classifier) -> Classifier:
    """A network with the last layers of ``fresh``, as they are as wide as its classes, and all else from ``source``.

    Fresh linear layers are drawn as torch draws them, from U(-1/sqrt(d), 1/sqrt(d)) for d inputs, as the heads of kd's
    methods are. timm takes 1/sqrt(c) for c classes with EfficientNets, to train them from random weights; trained ones
    with frozen BatchNorm statistics lose all features to such a classifier's first steps.

    Args:
        source: the weights to keep.
        fresh: of the same architecture with another number of classes.
    """
    own, wanted = source.plain.state_dict(), fresh.plain.state_dict()
    differs = {name for name, tensor in wanted.items() if name not in own or own[name].shape != tensor.shape}
    # A layer is fresh or kept, never half: of equal shape, but beside one that differs, is no weight of the source.
    layers = {name.rpartition(".")[0] for name in differs}
    fresh.plain.load_state_dict(
        {name: wanted[name] if name.rpartition(".")[0] in layers else own[name] for name in wanted},
        strict=True,
    )
    for layer in layers:
        if isinstance(module := fresh.plain.get_submodule(layer), nn.Linear):
            module.reset_parameters()
    return fresh


def classes_in(shapes: Mapping[str, tuple[int, ...]], classifier: Classifier) -> int:
    """How many classes the classifier in a file has; 0 where the file holds none.

    Args:
        shapes: of the tensors in the file.
        classifier: the architecture with classes of its own.
    """
    head = {id(parameter) for parameter in classifier.head.parameters()}
    names = [
        name
        for name, parameter in classifier.plain.named_parameters()
        if id(parameter) in head and parameter.ndim > 1 and len(parameter) == classifier.num_classes
    ]
    return shapes.get(names[-1], (0,))[0] if names else 0


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
