"""Frozen values that several layers share. No torch, no numpy, no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

OutputKind = Literal["logits", "features", "logp_label", "logp_max"]
"""What objectives and rankings read of a teacher: raw logits before softmax, pooled features, and the exact
log-probabilities of the label and of the most probable class (kept beside logits)."""

FloatName = Literal["float16", "float32"]
AmpName = Literal["off", "tf32", "bf16", "fp16"]
"""A precision that networks run at, as it is recorded; see :mod:`kdcli.precision`."""
AmpChoice = Literal["auto", AmpName]
"""What ``--amp`` takes."""
Sides = tuple[int, int]
"""Height and width in pixels."""
Size = Sides | tuple[int, int, int]
"""Of an input: height and width in pixels; of a clip's, the number of frames before them."""
DecodeMode = Literal["exact", "scaled"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]
"""timm's three ways to fit an image to an input: cut the middle out, squeeze it, or pad it."""
EvalMode = Literal[CropMode, "center-down", "shared"]
"""And two that timm has not: the middle as transformers cuts it out, offsets rounded down; and one box for all models
(the centred square, squeezed to each input), which no model declares."""


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which two records disagree."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} was {_short(self.old)}, is {_short(self.new)}"


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """All leaf fields in which two JSON-like records disagree, in a stable order."""
    found: list[Difference] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(Difference(f"{prefix}{key}", before, after))
    return found


@final
@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a model wants its pixels.

    Attributes:
        size: (height, width) in pixels of the model's input, of one that takes clips (frames, height, width).
        interpolation: resampling filter.
        mean: per channel, in units of [0, 1] pixels.
        std: per channel, in units of [0, 1] pixels.
        crop_fraction: timm's crop_pct, 0.05 to 2: the input's side is this share of what an image is resized to;
            of ``shared``, the square's share of the image's shorter side.
        crop_mode: how an image is fitted to the input. Training views have boxes of their own.
        crop_width: of ``squash``, the share of the width where it is another than that of the height.
        clips: how many of a sample view 0 shows; what the model gives of them is averaged.
    """

    size: Size
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_fraction: float
    crop_mode: EvalMode
    crop_width: float | None = None
    clips: int = 1

    @property
    def sides(self) -> Sides:
        """Height and width of the input, in pixels."""
        return self.size[-2], self.size[-1]

    @property
    def frames(self) -> int:
        """Of a clip; 0 where it takes images."""
        return self.size[0] if len(self.size) == 3 else 0

    @property
    def shown(self) -> Size:
        """The size of view 0: the frames of all clips that it shows, one clip after the other."""
        return (self.clips * self.frames, *self.sides) if self.clips > 1 else self.size

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "size": list(self.size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_fraction": self.crop_fraction,
            "crop_mode": self.crop_mode,
            **({} if self.crop_width is None else {"crop_width": self.crop_width}),
            **({} if self.clips == 1 else {"clips": self.clips}),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Preprocess":
        """Undo :meth:`document`."""
        size, mean, std = document["size"], document["mean"], document["std"]
        *_, height, width = size
        return cls(
            (height, width) if len(size) == 2 else (size[0], height, width),
            document["interpolation"],
            (mean[0], mean[1], mean[2]),
            (std[0], std[1], std[2]),
            document["crop_fraction"],
            document["crop_mode"],
            document.get("crop_width"),
            document.get("clips", 1),
        )


@final
@dataclass(frozen=True, slots=True)
class RankedSource:
    """One source (teacher) in a ranking. ``id`` is null for sources that are no cached teachers."""

    name: str
    id: str | None
    score: float
    weight: float


@final
@dataclass(frozen=True, slots=True)
class Ranking:
    """What ``kd rank-sources`` prints and ``kd train-student --ranking`` reads.

    ``probe`` has the size and seed of the probe set and, of cached images, ``images``: their fingerprints, packed
    (:mod:`kdcli.cache.fingerprints`). ``weighting`` says how the weights were made where that is not P2's default
    (Eq. 5 with p = 12).
    """

    cache_id: str | None
    metric: str
    on: str
    probe: dict[str, Any]
    sources: tuple[RankedSource, ...]
    weighting: dict[str, Any] = field(default_factory=dict)
