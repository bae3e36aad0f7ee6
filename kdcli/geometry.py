"""Evaluation geometry: which part of an image a model is shown, and how it is fitted to the model's input.

Sizes and offsets are those of ``timm.data.create_transform(..., is_training=False)``, rounding included. Whole
numbers only; :func:`kdcli.data.views.show` draws what is decided here.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, final, get_args

from kdcli.errors import UsageError
from kdcli.types import CropMode, EvalMode, Interpolation, Preprocess, Sides, Size

LEAST_CROP: Final = 0.05
"""The least share of an image that is shown; timm's models say 0.875 to 1.15. An image is resized to 1 / share."""
MOST_CLIPS: Final = 100
"""Of a video in view 0."""
USAGE: Final = (
    f"Use own (each model its own), shared or shared:CROP with CROP from {LEAST_CROP} to 1, or whole; of "
    "several clips of each video +clips:N behind it, or clips:N alone, N up to 100."
)


@final
@dataclass(frozen=True, slots=True)
class Fit:
    """How an image of one size is fitted to an input: a box of it is resized, and a window of that is seen.

    Attributes:
        box: left, top, width, height in source pixels of what is resized.
        resized: its width and height after that.
        window: left and top of the input in it; below 0 where the input is larger and its border is filled.
    """

    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    window: tuple[int, int]

    def span(self, axis: int, side: int, source: int) -> tuple[float, float]:
        """Where the input begins along an axis, and how long it is, as shares of the source.

        Args:
            axis: 0 for width, 1 for height.
            side: of the input, pixels.
            source: of the image, pixels.
        """
        scale = self.box[2 + axis] / self.resized[axis] / source
        return self.box[axis] / source + self.window[axis] * scale, side * scale


@final
@dataclass(frozen=True, slots=True)
class Render:
    """What a view is drawn as: models that share it share their pixels.

    Attributes:
        size: (height, width) in pixels of the input; of clips (frames, height, width).
        interpolation: resampling filter.
        mode: how view 0 fits an image to it; of no matter to training views, which have boxes of their own.
        crop: share that view 0 keeps, see :class:`~kdcli.types.Preprocess`.
        fill: colour of what view 0 shows beside the image.
        crop_width: see :class:`~kdcli.types.Preprocess`.
        clips: how many view 0 shows, one after the other.
    """

    size: Size
    interpolation: Interpolation
    mode: EvalMode = "center"
    crop: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    crop_width: float | None = None
    clips: int = 1

    @classmethod
    def of(cls, preprocess: Preprocess) -> "Render":
        """What a model is shown."""
        red, green, blue = (round(255 * value) for value in preprocess.mean)
        return cls(
            preprocess.size,
            preprocess.interpolation,
            preprocess.crop_mode,
            preprocess.crop_fraction,
            (red, green, blue) if preprocess.crop_mode == "border" else (0, 0, 0),
            preprocess.crop_width,
            preprocess.clips,
        )

    @property
    def single(self) -> "Render":
        """The same with one clip in view 0: what a student is trained on."""
        return replace(self, clips=1)

    @property
    def unplaced(self) -> "Render":
        """The same without what only view 0 goes by."""
        return Render(self.size, self.interpolation)

    def drawn(self, evaluated: bool) -> Size:
        """The size of what is drawn: of view 0 the frames of all clips, one clip after the other."""
        return (self.clips * self.frames, *self.sides) if evaluated and self.clips > 1 else self.size

    @property
    def sides(self) -> Sides:
        """Height and width of the input, in pixels."""
        return self.size[-2], self.size[-1]

    @property
    def frames(self) -> int:
        """Of a clip; 0 of an image."""
        return self.size[0] if len(self.size) == 3 else 0

    def resize_side(self, side: int) -> int:
        """To how many pixels a side of the input's length is resized before the crop."""
        return math.floor(side / self.crop)

    def fit(self, width: int, height: int) -> Fit:
        """How view 0 fits an image of a size in pixels to the input."""
        input_height, input_width = self.sides
        if self.mode == "shared":
            return Fit(centre_square(width, height, self.crop), (input_width, input_height), (0, 0))
        resized = self._resized(width, height)
        sides = zip(resized, (input_width, input_height), strict=True)
        offset = _offset_down if self.mode == "center-down" else _offset
        left, top = (offset(own, side) for own, side in sides)
        return Fit((0, 0, width, height), resized, (left, top))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        tall, wide = (self.resize_side(side) for side in self.sides)
        if self.mode == "squash":
            return wide if self.crop_width is None else math.floor(self.sides[1] / self.crop_width), tall
        if self.mode in ("center", "center-down") and tall == wide:  # torchvision's Resize(side)
            longer = int(tall * max(width, height) / min(width, height))
            return (tall, longer) if width <= height else (longer, tall)
        ratios = (height / tall, width / wide)  # timm's ResizeKeepRatio
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        # timm has no picture where a side comes to nothing; one pixel is.
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def __str__(self) -> str:
        height, width = self.sides
        tall, wide = (self.resize_side(side) for side in self.sides)
        wide = wide if self.crop_width is None else math.floor(width / self.crop_width)
        side = f"{tall}-pixel" if tall == wide else f"{tall} x {wide}"
        crop = f"crop_pct {self.crop:g}"
        how = {
            "center": f"of a {side} resize, centre ({crop})",
            "center-down": f"of a {side} resize, centre as in transformers ({crop})",
            "squash": "of the whole image, squeezed"
            if self.crop == 1
            else f"of a {side} squeeze, centre ({crop})",
            "border": f"of a {side} resize of the longer side, bordered ({crop})",
            "shared": f"of the centred square of {self.crop:g} of the shorter side, squeezed",
        }[self.mode]
        clips = f"{self.clips} clips of " if self.clips > 1 else ""
        clips += f"{self.frames} frames of " if self.frames else ""
        return f"{clips}{height} x {width} {how}, {self.interpolation}"


def _offset(resized: int, side: int) -> int:
    """Where an input begins in a resized image: torchvision's center_crop, which pads before it crops."""
    return -((side - resized) // 2) if side > resized else round((resized - side) / 2.0)


def _offset_down(resized: int, side: int) -> int:
    """The same of transformers' image processors, which kd reads only where nothing is padded."""
    return (resized - side) // 2


def centre_square(width: int, height: int, fraction: float) -> tuple[int, int, int, int]:
    """left, top, width, height of the middle square of ``fraction`` of the shorter side, at least 1 pixel."""
    side = max(1, math.floor(fraction * min(width, height) + 0.5))
    return (width - side) // 2, (height - side) // 2, side, side


def largest_offset(
    one: Render, other: Render, sizes: Iterable[tuple[int, int]]
) -> tuple[float, tuple[int, int]]:
    """How far apart the same relative place of two inputs lies in an image: 0 where cells of maps correspond.

    Args:
        one: whose input is the measure.
        other: another model's.
        sizes: width and height of images.

    Returns:
        The largest distance over the images, as a share of the side of ``one``'s input, and the image's size.
    """
    found = (0.0, (0, 0))
    for size in sizes:
        fits = [(render.fit(*size), render.sides[::-1]) for render in (one, other)]
        for axis in (0, 1):
            (start, length), (begin, extent) = (fit.span(axis, side[axis], size[axis]) for fit, side in fits)
            apart = max(abs(start - begin), abs(start + length - begin - extent)) / length
            found = max(found, (apart, size))
    return found


@final
@dataclass(frozen=True, slots=True)
class EvalGeometry:
    """How view 0 fits images to an input, whatever the input's size.

    Attributes:
        mode: as in :class:`~kdcli.types.Preprocess`; None: every model its own.
        crop: likewise; None: the model's own, or what the caller says.
        clips: how many of a sample are shown; what a model gives of them is averaged.
    """

    mode: EvalMode | None = None
    crop: float | None = None
    clips: int = 1

    @classmethod
    def parse(cls, text: str) -> "EvalGeometry":
        """Read ``own``, ``shared``, ``shared:CROP`` (one box for all models) or ``whole`` (the image squeezed), with
        ``+clips:N`` behind it, or ``clips:N`` alone.

        Raises:
            UsageError: it is none of these, CROP is not from :data:`LEAST_CROP` to 1, or N not from 2 to 100.
        """
        if match := re.fullmatch(r"(?:(.+)\+)?clips:([1-9][0-9]?|100)", text, re.ASCII):
            return replace(cls.parse(match[1] or "own"), clips=int(match[2]))
        word, colon, number = text.partition(":")
        if text in ("own", "whole", "shared"):
            return {"own": cls(), "whole": WHOLE, "shared": cls("shared")}[text]
        try:
            crop = float(number) if word == "shared" and colon else 0.0
        except ValueError:
            crop = 0.0
        if not LEAST_CROP <= crop <= 1:
            raise UsageError(f"'{text}' is no evaluation geometry", USAGE)
        return cls("shared", crop)

    @classmethod
    def of(cls, preprocess: Preprocess) -> "EvalGeometry":
        """A model's."""
        return cls(preprocess.crop_mode, preprocess.crop_fraction, preprocess.clips)

    @property
    def asked(self) -> str | None:
        """What ``--eval-geometry`` calls it; None for what only a model's own can be."""
        if replace(self, clips=1) == WHOLE or self.mode in (None, "shared"):
            return str(self)
        return str(EvalGeometry(clips=self.clips)) if self.clips > 1 else None

    def applied(self, own: Preprocess, crop: float | None = None) -> Preprocess:
        """A model's preprocessing under this geometry.

        Args:
            own: what the model declares.
            crop: where this names none; default: the model's own.
        """
        if self.clips > 1 and not own.frames:
            raise UsageError(
                f"{self}: of an image there are no clips", f"Leave clips:{self.clips} out of --eval-geometry."
            )
        own = replace(own, clips=self.clips)
        if self.mode is None:
            return own
        found = replace(own, crop_mode=self.mode, crop_fraction=self.crop or crop or own.crop_fraction)
        same = (found.crop_mode, found.crop_fraction) == (own.crop_mode, own.crop_fraction)
        return found if same else replace(found, crop_width=None)

    def declared(self, own: Preprocess) -> Preprocess:
        """The same for a model that is exported: timm's nearest to what it has not is a centre crop of that share."""
        found = self.applied(own)
        return found if found.crop_mode in get_args(CropMode) else replace(found, crop_mode="center")

    def __str__(self) -> str:
        if self.clips > 1:
            placed = "" if self.mode is None else f"{replace(self, clips=1)}+"
            return f"{placed}clips:{self.clips}"
        if self == WHOLE:
            return "whole"
        return (self.mode or "own") + ("" if self.crop is None else f":{self.crop!r}")


WHOLE: Final = EvalGeometry("squash", 1.0)
"""The whole image squeezed: places of any two inputs correspond, whatever the image's ratio of sides."""

OWN: Final = EvalGeometry()
"""Every model its own."""
