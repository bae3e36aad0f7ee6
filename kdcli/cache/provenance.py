"""Who a cached teacher is: identity by weights, outputs and preprocessing, compared field by field."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict

from kdcli.errors import IdentityError
from kdcli.types import Difference, Preprocess, differences

REPAIR_HINT = "Remove the damaged file and run the kd cache-teachers command that made the cache again."
PIXEL_TOLERANCE = 2
"""Largest difference, in steps of 1/255, that another version of a library may make to a pixel."""


def canonical_sha256(document: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON form of ``document``."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@final
@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a part: its row shape and type. On disk it is [rows, views, *row_shape]."""

    row_shape: tuple[int, ...]
    dtype: str
    per_view: bool = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one view."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def fill(self) -> float | int:
        """What stands where nothing was written: NaN for floats, the largest value for integers."""
        kind = np.dtype(self.dtype)
        return float("nan") if kind.kind == "f" else int(np.iinfo(kind).max)


@final
class TeacherRecord(BaseModel):
    """What a cache knows of a teacher; stored as the attributes of its Zarr group.

    ``weights``, ``architecture``, ``keep``, ``dtype``, ``amp`` and ``preprocess`` are its identity;
    ``spec`` is where it was found; ``compute`` is how it ran, reused by a resume; ``pixels`` are a few
    rendered pixels that show when another library version draws differently.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    spec: str
    architecture: str
    weights: str
    keep: tuple[str, ...]
    dtype: str
    amp: str
    declared_preprocess: dict[str, Any]
    num_classes: int
    num_features: int
    class_names: tuple[str, ...] | None
    temperatures: tuple[float, ...]
    arrays: dict[str, dict[str, Any]]
    pixels: tuple[int, ...]
    compute: dict[str, Any]

    @property
    def id(self) -> str:
        """sha256 over the whole gate: weights, architecture, outputs, types and preprocessing.

        Preprocessing is in it because the same weights at another input size are another teacher to a
        ranking or a student that pins the id.
        """
        return canonical_sha256(self.gate())

    @property
    def preprocess(self) -> Preprocess:
        """The declared preprocessing as a value."""
        declared = self.declared_preprocess
        return Preprocess(
            size=tuple(declared["size"]),
            interpolation=declared["interpolation"],
            mean=tuple(declared["mean"]),
            std=tuple(declared["std"]),
            crop_fraction=declared["crop_fraction"],
        )

    def gate(self) -> dict[str, Any]:
        """The fields that make it this teacher."""
        declared = {k: v for k, v in self.declared_preprocess.items() if k != "crop_fraction"}
        return {
            "architecture": self.architecture,
            "weights": self.weights,
            "keep": list(self.keep),
            "dtype": self.dtype,
            "amp": self.amp,
            "temperatures": list(self.temperatures),
            "class_names": None
            if self.class_names is None
            else canonical_sha256({"names": list(self.class_names)}),
            "preprocess": declared,
        }

    def array_specs(self) -> dict[str, ArraySpec]:
        """The arrays it keeps."""
        return {
            name: ArraySpec(tuple(spec["row_shape"]), spec["dtype"]) for name, spec in self.arrays.items()
        }

    def require_same(self, other: "TeacherRecord", where: str) -> None:
        """Refuse ``other`` (asked for now) where it is not this teacher (recorded).

        Raises:
            IdentityError: naming every differing field with its old and new value.
        """
        found = differences(self.gate(), other.gate())
        drift = pixel_drift(self.pixels, other.pixels)
        if drift > PIXEL_TOLERANCE:
            found.append(Difference("preprocess.pixels", "recorded pixels", f"up to {drift}/255 apart"))
        if found:
            raise IdentityError(
                f"{where} holds another teacher '{self.name}'",
                f"Give it another name (--teacher OTHER=SPEC) or use the recorded one: {self.spec}",
                found,
            )


def pixel_drift(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """Largest difference between two pixel fingerprints, in steps of 1/255; 255 for unequal sizes."""
    if len(old) != len(new):
        return 255
    if not old:
        return 0
    return int(np.abs(np.asarray(old, np.int16) - np.asarray(new, np.int16)).max())


def as_pixels(fingerprint: UInt8[np.ndarray, " k"]) -> tuple[int, ...]:
    """A pixel fingerprint as JSON integers."""
    return tuple(int(value) for value in fingerprint)
