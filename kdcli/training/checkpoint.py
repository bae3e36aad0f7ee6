"""Checkpoints: everything a run needs to go on as if it had never stopped. No pickle.

    OUT/state/step-00000120/tensors.safetensors    student, objective, optimiser, random numbers
    OUT/state/step-00000120/state.json             where the run is, and the scalars of the optimiser

A checkpoint folder is built under another name and renamed when it is whole; older ones go after that.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcli.documents import from_document
from kdcli.errors import BadDataError, KdError
from kdcli.files import atomic_write_text, fsync_folder, storage_errors, write_json
from kdcli.reading import read_json, require_regular
from kdcli.training.distributed import Ranks
from kdcli.training.progress import Progress


@final
@dataclass(frozen=True, slots=True)
class Stateful:
    """What a checkpoint captures besides progress: modules by name, one optimiser, one loss scaler.

    Random numbers are captured of every process in ``ranks``; the rest is equal in all of them, but for
    BatchNorm statistics, which a step begins by taking from the first process.
    """

    modules: Mapping[str, nn.Module]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None = None
    ranks: Ranks = field(default_factory=Ranks)


@final
@dataclass(frozen=True, slots=True)
class _State:
    """state.json."""

    progress: Progress
    optimizer: dict[str, dict[str, Any]]
    scaler: dict[str, Any]


_ANEW = "Restore the folder, or start the run anew: --overwrite."


def save_checkpoint(folder: Path, stateful: Stateful, progress: Progress) -> Path:
    """Write a checkpoint of this moment and remove older ones. All processes call it, the first one writes.

    Args:
        folder: OUT/state.
        stateful: what to capture.
        progress: where the run is.

    Raises:
        NoSpaceError: the disk is full. The last checkpoint is still there.
        StorageError: it cannot be written.
    """
    tensors, scalars = _capture(stateful)
    with stateful.ranks.one_fate():
        if stateful.ranks.first:
            _write(folder, tensors, {"progress": asdict(progress), **scalars})
    return folder / f"step-{progress.steps:08d}"


def _write(folder: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    steps = document["progress"]["steps"]
    final_place = folder / f"step-{steps:08d}"
    temporary = folder / f".step-{steps:08d}.{os.getpid()}.tmp"
    with storage_errors(folder):
        try:
            temporary.mkdir(parents=True)
            _save_tensors(tensors, temporary / "tensors.safetensors")
            write_json(temporary / "state.json", document)
            if final_place.exists():  # the same moment, saved twice: a stop right after an epoch's end
                shutil.rmtree(final_place)
            temporary.rename(final_place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_folder(folder)
        for old in folder.iterdir():
            if old != final_place:
                shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in OUT/state, if there is one."""
    return max(folder.glob(f"step-{'[0-9]' * 8}"), default=None) if folder.is_dir() else None


def load_checkpoint(place: Path, stateful: Stateful) -> Progress:
    """Put everything back as it was when ``place`` was written, random numbers included.

    Tensors keep the memory layout of what they replace: with another layout the same sums run in
    another order, and a resumed run would differ in its last bits.

    Raises:
        BadDataError: it is no checkpoint of this run, or damaged.
        StorageError: it cannot be read.
    """
    state = from_document(_State, read_json(place / "state.json"), place / "state.json", hint=_ANEW)
    file_name = place / "tensors.safetensors"
    require_regular(file_name)
    try:
        with storage_errors(file_name), safe_open(file_name, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name, module in stateful.modules.items():
            _require_alike(module.state_dict(), _under(tensors, f"{name}/"))
            module.load_state_dict(_under(tensors, f"{name}/"))
        _restore_optimizer(stateful.optimizer, _under(tensors, "optimizer/"), state.optimizer)
        if stateful.scaler is not None and state.scaler:
            stateful.scaler.load_state_dict(state.scaler)
        _restore_random(_under(tensors, _random_prefix(stateful.ranks.rank)))
    except KdError:
        raise
    # Whatever torch and safetensors raise about what a file holds: it is not what a run like this one saved.
    except (SafetensorError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadDataError(
            f"{place} is no checkpoint of this run, or damaged: {_first(error)}", _ANEW
        ) from error
    return state.progress


def _require_alike(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another shape or type: torch would convert, and repeat, what it can.

    Raises:
        ValueError: naming the first.
    """
    for name, tensor in own.items():
        if name in stored and (stored[name].shape, stored[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} is {stored[name].dtype} {tuple(stored[name].shape)}, not as in the student"
            )


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _capture(stateful: Stateful) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, module in stateful.modules.items():
        tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in stateful.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    for rank, states in enumerate(stateful.ranks.gather(_random_states())):
        tensors |= {f"{_random_prefix(rank)}{name}": state for name, state in states.items()}
    scaler = stateful.scaler.state_dict() if stateful.scaler is not None else {}
    return tensors, {"optimizer": scalars, "scaler": scaler}


def _random_prefix(rank: int) -> str:
    return f"random/rank{rank}/" if rank else "random/"


def _random_states() -> dict[str, Tensor]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{index}": state for index, state in enumerate(devices)}}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # cloned: safetensors refuses tensors that share memory or are not laid out plainly
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        like = parameters[int(index)]
        if value.shape == like.shape:
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    # Learning rates and the like follow from the configuration and the step: only what was learnt is loaded.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for name, state in states.items():
            if name.startswith("cuda") and int(name.removeprefix("cuda")) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Cut metrics.jsonl back to ``history``: epochs after the checkpoint did not happen."""
    atomic_write_text(path, "".join(json.dumps(document) + "\n" for document in history))


def append_metrics(path: Path, document: Mapping[str, Any]) -> None:
    """Add one epoch to metrics.jsonl, at once on disk."""
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(document) + "\n")
        file.flush()
        os.fsync(file.fileno())
