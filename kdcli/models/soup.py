"""The average of several students' weights (P3 section 4.3; uniform soup: Wortsman et al. 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import IdentityError
from kdcli.models.export import model_arguments
from kdcli.models.spec import Model
from kdcli.types import Difference, differences

_SHOWN = 3


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """``sum_i w_i theta_i / sum_i w_i`` of every floating tensor, BatchNorm's running statistics included.

    Summed in float64 and rounded once, to the type of the tensor: of equal students it is that student, bit for
    bit. Integers (``num_batches_tracked``) are counts, not weights; they are the first student's.

    Args:
        states: of students of one architecture: equal names and shapes.
        weights: one a student, >= 0, some > 0.

    Returns:
        The averaged state, in the first one's types.

    Raises:
        IdentityError: names, shapes or types differ.
    """
    first, total = states[0], sum(weights)
    for other in states[1:]:
        _require_same_tensors(first, other)
    averaged = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            averaged[name] = tensor.clone()
            continue
        summed = torch.zeros(tensor.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            summed += state[name].double() * weight
        averaged[name] = (summed / total).to(tensor.dtype)
    return averaged


def _require_same_tensors(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    old, new = ({name: _kind(tensor) for name, tensor in state.items()} for state in (first, other))
    found = differences(old, new)
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise IdentityError(
            f"students of other tensors cannot be averaged{more}",
            "Give students of one architecture, input size and number of classes.",
            found[:_SHOWN],
        )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def require_same_kind(first: Model, other: Model) -> None:
    """Refuse a model of another architecture, of other classes or with another preprocessing.

    Raises:
        IdentityError: naming what differs.
    """
    found = differences(_described(first), _described(other))
    old, new = first.class_names, other.class_names
    if (
        old is not None and new is not None and not found
    ):  # one that does not name its classes may have the same
        pairs = enumerate(zip(old, new, strict=True))
        found = [Difference(f"class {index}", one, theirs) for index, (one, theirs) in pairs if one != theirs]
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise IdentityError(
            f"{other.spec} cannot be averaged with {first.spec}{more}",
            "Give students of one architecture, of the same classes in one order, with one preprocessing.",
            found[:_SHOWN],
        )


def _described(model: Model) -> dict[str, Any]:
    return {
        "architecture": model.architecture,
        "classes": model.num_classes,
        "features": model.num_features,
        "preprocess": model.preprocess.document(),
        "model_args": model_arguments(model),
    }


def batchnorms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers of a network that keep running statistics."""
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
