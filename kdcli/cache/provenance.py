"""Who a cached teacher is: identity by weights, outputs and preprocessing, compared field by field."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, final

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

from kdcli.cache.owned import read_own_json, repair_hint
from kdcli.cache.pixels import PIXEL_TOLERANCE, pixel_drift
from kdcli.console import console
from kdcli.documents import from_document, shaped
from kdcli.errors import Advice, CorruptError, IdentityError, NotFoundError, nearest
from kdcli.geometry import LEAST_CROP, MOST_CLIPS
from kdcli.outputs import PIXELS, STATS, Output
from kdcli.types import AmpName, Difference, FloatName, Preprocess, differences

Record = TypeVar("Record")
NAME_LETTERS: Final = 200
"""Names of teachers and taps become names of files."""
_NAME = rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{NAME_LETTERS - 1}}}"
Text = Annotated[str, Field(max_length=2**16)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
AXIS: Final = 2**24
"""Most values along an axis of a row: classes, features, a map's side."""
ROW_BYTES: Final = 2**28
"""Most bytes of one row and view of an array: a map of 1024 x 256 x 256 in fp32."""


def canonical_sha256(document: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON form of ``document``."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the digest of everything else in it, so that any change of a byte shows."""
    return {**document, "sha256": canonical_sha256(document)}


def unseal(document: Any, source: object, hint: str | Advice = "") -> dict[str, Any]:
    """Undo :func:`seal`.

    Args:
        document: parsed JSON.
        source: the file, for messages.
        hint: what to do about a damage; default: to repair the cache that the file is in.

    Raises:
        CorruptError: it is no sealed document, or was changed after it was sealed.
    """
    if not isinstance(document, dict) or "sha256" not in document:
        raise CorruptError(f"{source} is not a record that kd wrote", hint or repair_hint(source))
    content = {key: value for key, value in document.items() if key != "sha256"}
    try:
        now = canonical_sha256(content)
    except ValueError:  # NaN is no JSON, but Python reads it
        now = ""
    if now != document["sha256"]:
        raise CorruptError(f"{source} was changed after it was written", hint or repair_hint(source))
    return content


def read_record(kind: type[Record], path: Path, hint: Advice) -> Record:
    """The sealed record in a file.

    Args:
        kind: what it is of.
        path: the file.
        hint: what to do about a damage.

    Raises:
        CorruptError: it is none of this kind, or was changed after it was written.
        StorageError: it cannot be read.
    """
    content = unseal(read_own_json(path, hint), path, hint)
    return from_document(kind, content, path, CorruptError, hint)


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
        return float("nan") if "f" in self.dtype else int(np.iinfo(self.dtype).max)


class _StoredArray(BaseModel, extra="forbid"):
    row_shape: tuple[Annotated[int, Field(ge=1, le=AXIS)], ...] = Field(max_length=4)
    dtype: Literal["<f2", "<f4", "|u1", "<u2", "<u4"]


_FLOATS, _EXACT, _IDS = ("<f2", "<f4"), ("<f4",), ("<u2", "<u4")
_AT_WILL: Final = {"logp_max", "logp_label"}


def arrays_of(kind: str, place: str = "") -> dict[str, tuple[int, tuple[str, ...]]]:
    """The arrays of a kind of output: number of axes of a row, and types.

    Args:
        kind: which.
        place: of maps: the tap, and how they are pooled (``layer4@pool7``).
    """
    arrays: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
        "logits": {"logits": (1, _FLOATS)},
        "topk": {"topk_values": (1, _FLOATS), "topk_ids": (1, _IDS)},
        "stats": {"lse": (1, _EXACT), "logp_max": (0, _EXACT), "logp_label": (0, _EXACT)},
        "features": {"features": (1, _FLOATS)},
        "maps": {f"maps/{place}": (3, _FLOATS)},
        "pixels": {"pixels": (3, ("|u1",))},
    }
    return arrays[kind]


@final
class OutputRecord(BaseModel):
    """One kind of output of a teacher in a cache: which arrays, of which views.

    Attributes:
        kind: logits, topk, stats, features, maps or pixels.
        top_k: K of top-k, else 0.
        tap: layer of maps, else empty.
        eval_only: kept of view 0 only.
        pool: side of the grid that maps were averaged over, else 0.
        pool_time: of clips, over how many parts of the time they were averaged, too, else 0.
        arrays: row shape and storage type of each array.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["logits", "topk", "features", "maps", "pixels", "stats"]
    top_k: int = Field(0, ge=0, le=AXIS)
    tap: Annotated[str, Field(pattern=f"^({_NAME})?$")] = ""
    eval_only: bool = False
    pool: int = Field(0, ge=0, le=AXIS)
    pool_time: int = Field(0, ge=0, le=AXIS)
    arrays: dict[str, Annotated[dict[str, Any], shaped(_StoredArray)]]

    @model_validator(mode="after")
    def _require_own_arrays(self) -> Self:
        """Refuse arrays that are not those of the kind: their names become paths, their shapes sizes."""
        if bool(self.tap) != (self.kind == "maps") or bool(self.top_k) != (self.kind == "topk"):
            raise ValueError("kind: maps have a tap and topk a top_k, and no other kind has")
        if (self.pool and self.kind != "maps") or (self.pool_time and not self.pool):
            raise ValueError("pool: only maps are pooled, in time only where they are in space")
        if self.kind == PIXELS and not self.eval_only:
            raise ValueError("eval_only: pixels are kept of view 0 only")
        declared = arrays_of(self.kind, self.output.place)
        if not declared.keys() - _AT_WILL <= self.arrays.keys() <= declared.keys():
            raise ValueError(f"arrays: {self.kind} keeps {', '.join(declared)}, not {', '.join(self.arrays)}")
        for name, array in self.arrays.items():
            (axes, types), shape = declared[name], list(array["row_shape"])
            grid = [self.pool_time] * bool(self.pool_time) + [self.pool] * 2
            axes += bool(self.pool_time)
            wrong = (self.top_k and shape != [self.top_k]) or (self.pool and shape[-len(grid) :] != grid)
            fits = len(shape) == axes or (axes == 3 and len(shape) == 4)  # of clips there is one of frames
            if array["dtype"] not in types or not fits or wrong:
                raise ValueError(f"arrays.{name}: {array['dtype']} {shape} is not what {self.name} keeps")
            if math.prod(shape) * np.dtype(array["dtype"]).itemsize > ROW_BYTES:
                raise ValueError(f"arrays.{name}: a row of {shape} has more than {ROW_BYTES} bytes")
        return self

    @property
    def output(self) -> Output:
        """What ``--keep`` calls it."""
        return Output(self.kind, self.top_k, self.tap, self.eval_only, self.pool, self.pool_time)

    @model_serializer(mode="wrap")
    def _without_no_pool(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Of a map as it is the record says nothing of pooling, as kd always wrote it."""
        document = handler(self)
        return {name: each for name, each in document.items() if each or name not in ("pool", "pool_time")}

    @property
    def name(self) -> str:
        """Its name within the teacher."""
        return self.output.name

    def array_specs(self) -> dict[str, ArraySpec]:
        """Its arrays."""
        return {
            name: ArraySpec(tuple(spec["row_shape"]), spec["dtype"]) for name, spec in self.arrays.items()
        }

    def views(self, count: int) -> int:
        """How many of a cache's ``count`` views it holds."""
        return 1 if self.eval_only else count


def is_name(text: str) -> bool:
    """Whether a teacher or a tap can have this name."""
    return re.fullmatch(_NAME, text) is not None


def _no_part(name: str) -> str:
    if name == "samples":  # as kdcli.cache.layout calls it
        raise ValueError("'samples' is the name of a part that every cache has")
    return name


def _drawable(document: dict[str, Any]) -> dict[str, Any]:
    """Refuse a preprocessing that no pixels can be drawn by."""
    found = Preprocess.from_document(document)
    if not all(1 <= side <= 2**14 for side in found.size) or min(found.std) <= 0:
        raise ValueError("size: sides of 1 to 16384 pixels, and std above 0, are possible")
    if not 1 <= found.clips <= (MOST_CLIPS if found.frames else 1):
        raise ValueError(f"clips: {found.clips} of a sample are not shown")
    shares = (found.crop_fraction, 1 if found.crop_width is None else found.crop_width)
    if not all(LEAST_CROP <= share < 2 for share in shares):  # timm's VOLO have 1.15
        raise ValueError(f"crop_fraction: {shares[0]} is no share of an image")
    return document


class _Compute(BaseModel, extra="allow"):
    batch_size: int = Field(ge=1, le=2**24)
    device: str = Field(max_length=64)
    threads: int = Field(1, ge=1, le=2**16)
    parents: dict[str, Text] = {}


@final
class TeacherRecord(BaseModel):
    """What a cache knows of a teacher.

    Its identity is :meth:`gate`; ``spec`` is where it was found; ``pooling`` is how its features come of its last
    map, where that is known; ``compute`` is how it ran, reused by a resume; ``pixels`` are a few rendered pixels that
    show when another library version draws differently; ``outputs``, what is kept, may grow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{_NAME}$"), AfterValidator(_no_part)]
    spec: Text
    architecture: Text
    weights: Text
    dtype: FloatName
    amp: AmpName
    declared_preprocess: Annotated[dict[str, Any], shaped(Preprocess), AfterValidator(_drawable)]
    num_classes: int = Field(ge=0, le=AXIS)
    num_features: int = Field(ge=0, le=AXIS)
    pooling: Annotated[str, Field(max_length=64)] | None = None
    class_names: tuple[Text, ...] | None
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(max_length=1024)
    pixels: tuple[Annotated[int, Field(ge=0, le=255)], ...]
    compute: Annotated[dict[str, Any], shaped(_Compute)]
    outputs: dict[str, OutputRecord] = {}

    @model_validator(mode="after")
    def _require_sound(self) -> Self:
        return self._require_own_outputs()

    @model_serializer(mode="wrap")
    def _without_unknown_pooling(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        found = handler(self)
        return found if self.pooling else {name: each for name, each in found.items() if name != "pooling"}

    def _require_own_outputs(self) -> Self:
        """Refuse outputs under another name, or of other classes, features or temperatures than the teacher's."""
        sizes = {
            "logits": self.num_classes,
            "features": self.num_features,
            "lse": len(self.temperatures),
        }
        for kind, output in self.outputs.items():
            if kind != output.name:
                raise ValueError(f"outputs.{kind}: it is the record of {output.name}")
            for array, spec in output.array_specs().items():
                if array == PIXELS and spec.row_shape != (*self.preprocess.shown, 3):
                    raise ValueError(f"outputs.{kind}: images of {spec.row_shape} are not what it is shown")
                if array in sizes and spec.row_shape != (sizes[array],):
                    raise ValueError(
                        f"outputs.{kind}: rows of {array} have {spec.row_shape[0]} values, not {sizes[array]}"
                    )
            if output.top_k > self.num_classes:
                raise ValueError(f"outputs.{kind}: {output.top_k} of {self.num_classes} classes")
        return self

    def keeping(self, outputs: Mapping[str, OutputRecord]) -> "TeacherRecord":
        """The same teacher with these outputs.

        Raises:
            ValueError: they are not its own.
        """
        return self.model_copy(update={"outputs": dict(outputs)})._require_own_outputs()

    @property
    def id(self) -> str:
        """sha256 over the whole gate: weights, architecture, types and preprocessing.

        Preprocessing is in it because the same weights at another input size are another teacher to a
        ranking or a student that pins the id. What is kept is not: adding a tap makes no other teacher.
        """
        return canonical_sha256(self.gate())

    @property
    def keep(self) -> tuple[str, ...]:
        """Names of the kinds it keeps, as they were asked for: without the statistics that come with them."""
        return tuple(name for name in self.outputs if name != STATS)

    @property
    def preprocess(self) -> Preprocess:
        """The declared preprocessing as a value."""
        return Preprocess.from_document(self.declared_preprocess)

    def gate(self) -> dict[str, Any]:
        """The fields that make it this teacher."""
        return {
            "architecture": self.architecture,
            "weights": self.weights,
            "dtype": self.dtype,
            "amp": self.amp,
            "temperatures": list(self.temperatures),
            "class_names": None
            if self.class_names is None
            else canonical_sha256({"names": list(self.class_names)}),
            "preprocess": self.declared_preprocess,
        }

    def document(self) -> dict[str, Any]:
        """The record as JSON, without its outputs: they have files of their own."""
        return self.model_dump(mode="json", exclude={"outputs"})

    def array_specs(self, of_all_views: bool = False) -> dict[str, ArraySpec]:
        """The arrays it keeps; or only those that it keeps of every view."""
        outputs = [each for each in self.outputs.values() if not (of_all_views and each.eval_only)]
        return {name: spec for output in outputs for name, spec in output.array_specs().items()}

    def output_of(self, array: str) -> OutputRecord | None:
        """The kind that an array belongs to; None when it is not kept."""
        return next((output for output in self.outputs.values() if array in output.arrays), None)

    def beside(self, other: "TeacherRecord") -> "TeacherRecord":
        """Keep of this record only the statistics that ``other`` has, too.

        Where data have other classes than the teacher, there is no log-probability of their labels.
        """
        own, its = self.outputs.get(STATS), other.outputs.get(STATS)
        if own is None or its is None:
            return self
        arrays = {name: spec for name, spec in own.arrays.items() if name in its.arrays}
        outputs = {**self.outputs, STATS: own.model_copy(update={"arrays": arrays})}
        return self.model_copy(update={"outputs": outputs})

    def require_same(self, other: "TeacherRecord", where: str) -> None:
        """Refuse ``other`` (asked for now) where it is not this teacher (recorded).

        Kinds that both name must be kept alike; a kind that only one names is none of this check's business.

        Raises:
            IdentityError: naming every differing field with its old and new value.
        """
        found = differences(self.gate(), other.gate())
        for kind in self.outputs.keys() & other.outputs.keys():
            old, new = (each.outputs[kind].model_dump(mode="json") for each in (self, other))
            found += differences(old, new, f"keep.{kind}.")
        alike = self.declared_preprocess == other.declared_preprocess
        drift = pixel_drift(self.pixels, other.pixels) if alike else 0
        if drift > PIXEL_TOLERANCE:
            found.append(Difference("preprocess.pixels", "recorded pixels", f"up to {drift}/255 apart"))
        if found:
            raise IdentityError(
                f"{where} holds another teacher '{self.name}'",
                Advice("another-teacher", spec=self.spec),
                found,
            )
        if drift:
            apart = f"this installation draws pixels up to {drift}/255 apart from the recorded ones"
            console.warn(f"teacher '{self.name}': {apart}")


def require_known(names: Iterable[str], known: Collection[str], where: object) -> None:
    """Refuse names of teachers that are not there.

    Raises:
        NotFoundError: naming the first one and the nearest that is there.
    """
    for name in names:
        if name not in known:
            raise NotFoundError(
                f"no teacher '{name}' in {where}.{nearest(name, known)}",
                f"Cached teachers: {', '.join(known) or 'none yet'}.",
            )
