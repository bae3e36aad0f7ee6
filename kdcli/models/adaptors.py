"""Layers that predict a teacher's features or map from a student's, and the files that a run keeps them in.

    adaptors.json           what each predicts: teacher, level, shapes
    adaptors.safetensors    TEACHER/LEVEL/LAYER.weight and .bias; TEACHER/classifier.weight and .bias where known

What they predict is what the teacher itself gives: no standardisation is left to be undone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from kdcli.documents import from_document
from kdcli.errors import BadDataError
from kdcli.files import atomic_write_bytes, storage_errors, write_json
from kdcli.reading import read_json, require_regular

RECORDS: Final = "adaptors.json"
TENSORS: Final = "adaptors.safetensors"
CLASSIFIER: Final = "classifier"
_ANEW = "Restore it, or train the run again."
_VERSION = 1
Side = Annotated[int, Field(ge=1, le=2**24)]
Grid = tuple[int, int] | tuple[int, int, int]
"""Height and width of a map; of clips the frames before them."""


@final
class CellRows(nn.Module):
    """Vectors as one row an image; a map as a row a cell, averaged over the cells of a grid.

    Where sides do not divide, a cell is the mean over all that it touches (as torch's adaptive pooling). Two matrix
    products: unlike torch's, their gradient is the same in every run on a card.

    Args:
        shape: of what is given: [C], or [C, H, W], or of clips [C, T, H, W].
        grid: height and width to average a map to, at most its own, of clips the frames before them; None of vectors.
    """

    def __init__(self, shape: Sequence[int], grid: Grid | None) -> None:
        super().__init__()
        self._flat, self._pools = grid is None, grid is not None and grid != tuple(shape[1:])
        self._clips = len(shape) == 4
        names = ("through", "down", "across")[-len(shape[1:]) :]
        for name, side, cells in zip(names, shape[1:], grid or (), strict=False):
            self.register_buffer(name, _pooling(side, cells), persistent=False)  # follows from the shapes

    def forward(self, values: Float[Tensor, "b c"] | Float[Tensor, "b c *t h w"]) -> Float[Tensor, "b n c"]:
        """Rows, in fp32."""
        values = values.float()
        if self._flat:
            return values[:, None]
        if self._pools and self._clips:
            values = (values.movedim(2, -1) @ self.get_buffer("through").T).movedim(-1, 2)
        if self._pools:
            values = self.get_buffer("down") @ values @ self.get_buffer("across").T
        return values.flatten(2).transpose(1, 2)


def _pooling(size: int, cells: int) -> Float[Tensor, "cells size"]:
    matrix = np.zeros((cells, size), np.float32)
    for cell in range(cells):
        start, stop = cell * size // cells, -(-(cell + 1) * size // cells)
        matrix[cell, start:stop] = 1 / (stop - start)
    return torch.from_numpy(matrix)


@final
class FeatureAdaptor(nn.Module):
    """LayerNorm, then one linear layer, or two with GELU between them; of each row by itself.

    Of rows that are cells of a map the linear layers are 1x1 convolutions.

    Args:
        own: width of what it is given.
        wanted: width of what it predicts.
        hidden: width between two layers; 0: one layer.
    """

    def __init__(self, own: int, wanted: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(own)
        self.hidden = nn.Linear(own, hidden) if hidden else None
        self.out = nn.Linear(hidden or own, wanted)

    def forward(self, rows: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        """Predictions of rows."""
        rows = self.norm(rows)
        if self.hidden is not None:
            rows = functional.gelu(self.hidden(rows))
        predicted: Tensor = self.out(rows)
        return predicted


@final
@dataclass(frozen=True, slots=True)
class AdaptorRecord:
    """What an adaptor predicts.

    Attributes:
        teacher: its name.
        id: its identity in the cache.
        level: the array: ``features``, or ``maps/TAP``.
        tap: the student's layer that it is given; None: the pooled features.
        student_shape: of what it is given: [D], or [C, H, W], of clips [C, T, H, W].
        teacher_shape: of the teacher's array.
        grid: height and width that maps are averaged to, of clips the frames before them; None of features.
        hidden: width between its two layers; 0: it has one.
        standardise: how targets were standardised in training.
        phi: root of the mean variance of the teacher's channels in training, in the teacher's units.
        statistics: SHA-256 of the mean, and of the matrix, that standardised them.
        class_names: of the teacher's classifier, where known.
    """

    teacher: str
    id: str
    level: str
    tap: str | None
    student_shape: tuple[Side, ...]
    teacher_shape: tuple[Side, ...]
    grid: tuple[Side, Side] | tuple[Side, Side, Side] | None
    hidden: Annotated[int, Field(ge=0, le=2**24)]
    standardise: str
    phi: float
    statistics: str
    class_names: tuple[str, ...] | None = None


@final
@dataclass(frozen=True, slots=True)
class _Document:
    """adaptors.json."""

    version: int
    adaptors: tuple[AdaptorRecord, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class KeptAdaptor:
    """An adaptor as a run keeps it.

    Attributes:
        record: what it predicts.
        layers: the module, on the CPU; its last layer gives the teacher's units.
        classifier: weight [c, d] and bias [c] of the teacher's own classifier of its features, where they are known.
    """

    record: AdaptorRecord
    layers: FeatureAdaptor
    classifier: tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None = None

    @torch.no_grad()  # of inference mode nobody's own classifier could take them: they could not be trained on
    def predict(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """What the teacher would give, in its own units: features [b, C], or a map [b, C, h, w] of the record's grid.

        Args:
            values: the student's pooled features [b, D], or its map at the tap [b, C, H, W].
        """
        rows: Tensor = self.layers(CellRows(values.shape[1:], self.record.grid)(values))
        if self.record.grid is None:
            return rows[:, 0]
        return rows.transpose(1, 2).reshape(len(rows), -1, *self.record.grid)


def write_adaptors(folder: Path, kept: Sequence[KeptAdaptor]) -> None:
    """Write both files; the tensors first.

    Raises:
        StorageError, NoSpaceError: that failed.
    """
    tensors: dict[str, Tensor] = {}
    for each in kept:
        teacher, level = each.record.teacher, each.record.level
        for name, value in each.layers.state_dict().items():
            tensors[f"{teacher}/{level}/{name}"] = value
        if each.classifier is not None:
            weight, bias = each.classifier
            tensors |= {f"{teacher}/{CLASSIFIER}.weight": weight, f"{teacher}/{CLASSIFIER}.bias": bias}
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    atomic_write_bytes(folder / TENSORS, save(own))
    write_json(folder / RECORDS, asdict(_Document(_VERSION, tuple(each.record for each in kept))))


def read_adaptors(folder: Path) -> tuple[KeptAdaptor, ...]:
    """The adaptors of a run; none where it keeps none.

    Raises:
        BadDataError: a file is damaged, or does not fit the other one.
        StorageError: one cannot be read.
    """
    place, tensors = folder / RECORDS, folder / TENSORS
    if not place.is_file():
        return ()
    document = from_document(_Document, read_json(place), place, hint=_ANEW)
    if document.version != _VERSION:
        raise BadDataError(f"{place} is of version {document.version}, and this kd reads {_VERSION}", _ANEW)
    require_regular(tensors)
    try:
        with storage_errors(tensors):
            values = load_file(tensors)
    except (SafetensorError, ValueError) as error:
        raise BadDataError(f"{tensors} is damaged: {error}", _ANEW) from error
    return tuple(_kept(record, values, tensors) for record in document.adaptors)


def _kept(record: AdaptorRecord, values: Mapping[str, Tensor], place: Path) -> KeptAdaptor:
    own = f"{record.teacher}/{record.level}/"
    found = {name.removeprefix(own): value for name, value in values.items() if name.startswith(own)}
    with torch.device("meta"):
        layers = FeatureAdaptor(record.student_shape[0], record.teacher_shape[0], record.hidden)
    wanted = {name: tuple(value.shape) for name, value in layers.state_dict().items()}
    if {name: tuple(value.shape) for name, value in found.items()} != wanted or not _sound(found):
        raise BadDataError(
            f"{place}: {own.rstrip('/')} is not the adaptor that {RECORDS} says, or not finite", _ANEW
        )
    layers.load_state_dict(found, assign=True)
    layers.requires_grad_(False)
    pair = [values.get(f"{record.teacher}/{CLASSIFIER}.{name}") for name in ("weight", "bias")]
    if record.level != "features" or pair[0] is None or pair[1] is None:
        return KeptAdaptor(record, layers)
    weight, bias = pair[0], pair[1]
    if (
        weight.shape != (len(bias), *record.teacher_shape)
        or bias.ndim != 1
        or not _sound({"w": weight, "b": bias})
    ):
        raise BadDataError(f"{place}: the classifier of '{record.teacher}' does not fit its features", _ANEW)
    return KeptAdaptor(record, layers, (weight, bias))


def _sound(values: Mapping[str, Tensor]) -> bool:
    return all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in values.values())
