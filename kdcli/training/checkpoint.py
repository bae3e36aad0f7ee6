"""Checkpoints: everything a run needs to go on as if it had never stopped. No pickle.

    OUT/state/step-00000120/tensors.safetensors    student, objective, optimiser, random numbers
    OUT/state/step-00000120/state.json             where the run is, and the scalars of the optimiser

A checkpoint folder is built under another name and renamed when it is whole; older ones go after that.
"""

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcli.documents import from_document
from kdcli.errors import BadDataError, KdError
from kdcli.files import atomic_write_text, fsync_folder, storage_errors, write_json
from kdcli.methods.base import Objective
from kdcli.reading import read_json, require_regular
from kdcli.training.distributed import Ranks
from kdcli.training.plan import Plan
from kdcli.training.progress import Progress


@final
@dataclass(frozen=True, slots=True)
class Stateful:
    """What a checkpoint captures besides progress: modules by name, one optimiser, one loss scaler.

    Random numbers are captured of every process in ``ranks``; the rest is equal in all of them, but for
    BatchNorm statistics: the first process's are captured, which are those that are kept in the end.
    """

    modules: Mapping[str, nn.Module]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def device(self) -> torch.device:
        """Where it trains, which has random numbers of its own."""
        found = (each for module in self.modules.values() for each in module.parameters())
        return next((each.device for each in found), torch.device("cpu"))


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
    with CheckpointWriter() as writer:
        writer.save(folder, stateful, progress)
    return folder / f"step-{progress.steps:08d}"


@final
class CheckpointWriter:
    """Writes checkpoints beside what goes on: their tensors are copied at once, the files are a thread's.

    One at a time: who saves again waits for the last one, and learns what became of it. Leaving its block waits, too.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ranks = Ranks()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self.wait()
            return
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error.add_note(f"and the checkpoint could not be written: {self._error}")

    def save(self, folder: Path, stateful: Stateful, progress: Progress) -> None:
        """Begin to write a checkpoint of this moment; see :func:`save_checkpoint`.

        Raises:
            StorageError: the last one could not be written.
        """
        self._ranks = stateful.ranks
        self.wait()
        tensors, scalars = _capture(stateful)
        document = {"progress": asdict(progress), **scalars}
        module = torch.get_device_module(stateful.device)
        copied = module.Event()
        copied.record(module.current_stream(stateful.device))

        def write() -> None:
            try:
                copied.synchronize()
                _write(folder, tensors, document)
            except BaseException as error:
                self._error = error

        if stateful.ranks.first:
            self._thread = threading.Thread(target=write, name="checkpoint")
            self._thread.start()

    def check(self) -> None:
        """Raise what kept the last checkpoint from being written, if that is known; for a lone process."""
        if self._ranks.world == 1 and self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written. All processes call it.

        Raises:
            NoSpaceError, StorageError: it is not.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        with self._ranks.one_fate():
            if error is not None:
                raise error


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


def settle(plan: Plan, objective: Objective) -> None:
    """Let the objective of a run compute what it keeps from before its first step on; a checkpoint has it already."""
    if plan.config.overwrite or latest_checkpoint(plan.config.out / "state") is None:
        objective.settle()


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
        _restore_random(_under(tensors, _random_prefix(stateful.ranks.rank)), stateful.device)
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
        tensors |= {f"{name}/{key}": _copied(value) for key, value in module.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in stateful.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = _copied(value)
            else:
                scalars.setdefault(str(index), {})[key] = value
    for rank, states in enumerate(stateful.ranks.gather(_random_states(stateful.device))):
        tensors |= {f"{_random_prefix(rank)}{name}": state for name, state in states.items()}
    scaler = stateful.scaler.state_dict() if stateful.scaler is not None else {}
    return tensors, {"optimizer": scalars, "scaler": scaler}


def _random_prefix(rank: int) -> str:
    return f"random/rank{rank}/" if rank else "random/"


def _copied(tensor: Tensor) -> Tensor:
    """On the host, apart from what goes on; there once the device has come so far."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of the CPU and of the device, whatever its number: a run may go on at another one."""
    own = {} if device.type == "cpu" else {"device": torch.get_device_module(device).get_rng_state(device)}
    return {"cpu": torch.get_rng_state(), **own}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # contiguous: safetensors refuses tensors that are not laid out plainly
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
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


def _restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Cut metrics.jsonl back to ``history``: epochs after the checkpoint did not happen."""
    atomic_write_text(path, "".join(json.dumps(document) + "\n" for document in history))


def append_metrics(path: Path, document: Mapping[str, Any]) -> None:
    """Add one epoch to metrics.jsonl, at once on disk."""
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(document) + "\n")
        file.flush()
        os.fsync(file.fileno())
