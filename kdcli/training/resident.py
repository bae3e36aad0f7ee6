"""Where a run reads its teachers from: the cache, a copy on this node, memory, or the training device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import final

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.needs import Needs
from kdcli.cache.resident import Table, copy_rows, hold, require_room, slots_of, tables_of
from kdcli.cache.staging import prewarm
from kdcli.console import console, size
from kdcli.errors import DeviceError, KdError
from kdcli.methods.batch import Batch, indexable
from kdcli.training.batches import Loader
from kdcli.training.config import StudentConfig
from kdcli.training.replay import Recording, ViewRule
from kdcli.training.samplers import Order


def bring_near(
    config: StudentConfig, recording: Recording, rule: ViewRule, epochs: int, device: torch.device
) -> "tuple[Recording, DeviceRows | None]":
    """Do what --prewarm and --resident say. None of it changes what a batch holds.

    Returns:
        What the workers read, and with ``--resident gpu`` the teachers' rows on the training device:
        then the workers read no teacher.

    Raises:
        DeviceError: there is no such device, or the rows do not fit.
    """
    views = sorted({rule.teacher(epoch) for epoch in range(epochs)})
    needs = Needs(recording.reads, recording.rows, tuple(views))
    if config.prewarm:
        prewarm(recording.cache, needs)
    if config.resident == "ram":
        hold(recording.cache, needs)
    if config.resident != "gpu":
        return recording, None
    if device.type == "cpu":
        raise DeviceError("--resident gpu, but the student trains on the cpu", "Use --resident ram.")
    return replace(recording, reads={}), DeviceRows(recording, needs, device)


@final
class DeviceRows:
    """Teachers' outputs on the training device, gathered there.

    Args:
        recording: the cache, the rows of the data in it, and the arrays that are read.
        needs: the views and rows; the samples' own arrays stay in the cache, for the workers.
        device: where to.

    Raises:
        DeviceError: they do not fit.
    """

    def __init__(self, recording: Recording, needs: Needs, device: torch.device) -> None:
        rows, self._reads, cache = np.unique(needs.rows), recording.reads, recording.cache
        tables = [
            table for table in tables_of(cache, needs) if table.array in self._reads.get(table.teacher, ())
        ]
        held = sum(len(rows) * table.spec.row_bytes for table in tables)
        if device.type == "cuda":
            require_room(held, torch.cuda.mem_get_info(device)[0], "device memory")
        slots = slots_of(int(cache.offsets[-1]), rows)[recording.rows]
        self._slots = torch.from_numpy(slots).to(device)
        self._specs = {(table.teacher, table.array): table.spec for table in tables}
        self._tables = {
            (table.teacher, table.array, table.view): _upload(cache, table, rows, device) for table in tables
        }
        console.note(f"resident: {size(held)} of {len(rows)} rows held on {device}")

    def outputs(self, positions: Int64[Tensor, " b"], view: int) -> dict[str, dict[str, Tensor]]:
        """What :meth:`Recording.outputs` gives, gathered on the device.

        Args:
            positions: of images in the data set.
            view: number of the view.
        """
        slots = self._slots[positions.to(self._slots.device, non_blocking=True)]
        return {
            teacher: {name: self._take(teacher, name, slots, view) for name in names}
            for teacher, names in self._reads.items()
        }

    def _take(self, teacher: str, array: str, slots: Int32[Tensor, " b"], view: int) -> Tensor:
        spec = self._specs[teacher, array]
        stored = self._tables[teacher, array, view if spec.per_view else None]
        dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
        values = indexable(stored.index_select(0, slots).view(dtype))
        return values.reshape(len(slots), *spec.row_shape)


def _upload(
    cache: CacheSet, table: Table, rows: Int64[np.ndarray, " n"], device: torch.device
) -> UInt8[Tensor, "n bytes"]:
    """The rows of a table as bytes: not every device indexes every type."""
    stored = torch.empty((len(rows), table.spec.row_bytes), dtype=torch.uint8, device=device)
    for start, values in copy_rows(cache, table, rows):
        piece = torch.from_numpy(values.reshape(len(values), -1).view(np.uint8))
        stored[start : start + len(values)] = piece.to(device)
    return stored


@final
class DeviceFed:
    """A loader whose batches get their teachers' outputs on the device.

    Args:
        loader: of batches without them.
        order: which epoch the loader is in.
        rule: which view the teachers saw in it.
        held: the outputs.
    """

    def __init__(self, loader: Loader, order: Order, rule: ViewRule, held: DeviceRows) -> None:
        self._loader, self._order, self._rule, self._held = loader, order, rule, held

    def __iter__(self) -> Iterator[Batch | KdError]:
        return map(self._fed, iter(self._loader))

    def _fed(self, batch: Batch | KdError) -> Batch | KdError:
        return batch if isinstance(batch, KdError) else replace(batch, teacher=self._outputs(batch))

    def _outputs(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        turns = batch.known.turn
        if turns is None:
            return self._held.outputs(batch.index, self._rule.teacher(self._order.epoch))
        first, *others = np.unique(turns).tolist()
        whole = self._held.outputs(batch.index, self._rule.teacher(first))
        for turn in others:
            rows = torch.from_numpy(np.flatnonzero(turns == turn))
            outputs = self._held.outputs(batch.index[rows], self._rule.teacher(turn))
            for teacher, arrays in whole.items():
                for name, values in arrays.items():
                    places = rows.to(values.device, non_blocking=True)
                    values.index_copy_(0, places, outputs[teacher][name])
        return whole
