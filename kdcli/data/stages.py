"""Steps of a training view after crop, resize and flip: colour jitter and random erasing.

A stage turns raw random words into integers, which are recorded, and applies such integers to an image of
any size. Pillow computes the pixels; the formulas are those of torchvision's transforms on PIL images, to
the bit (tests compare them), so pixels are equal wherever Pillow is.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config

from kdcli.data.boxes import BOX_WORDS, UNIT, in_pixels, random_box
from kdcli.data.philox import WORD, below

Fill = tuple[int, int, int]
"""Red, green and blue of pixels that nothing covers, 0 to 255."""

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""How definitions are read from files: unknown keys are refused."""


class Stage(ABC):
    """One step of a recipe."""

    __slots__ = ()

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Its columns of view parameters."""

    @property
    @abstractmethod
    def neutral(self) -> tuple[int, ...]:
        """Parameters that leave an image as it is."""

    @property
    @abstractmethod
    def word_count(self) -> int:
        """Raw words that :meth:`sample` reads."""

    @abstractmethod
    def sample(self, random: Sequence[int]) -> tuple[int, ...]:
        """Parameters from :attr:`word_count` raw words."""

    @abstractmethod
    def apply(self, image: Image.Image, values: Sequence[int], fill: Fill) -> Image.Image:
        """The image (RGB, any size) with the parameters ``values``; ``image`` itself stays as it is."""


# --- ranges in definitions --------------------------------------------------------------------


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first bound is above the second")
    return bounds


def _around(centre: float, least: float) -> Callable[[Any], Any]:
    """A lone number s is short for the range from centre - s to centre + s, as in torchvision."""

    def widen(value: Any) -> Any:
        alone = isinstance(value, int | float) and not isinstance(value, bool)
        return (max(least, centre - value), centre + value) if alone else value

    return widen


Share = Annotated[float, Field(ge=0, le=1, strict=True)]
_Factor = Annotated[float, Field(ge=0, le=10, strict=True)]
_Turn = Annotated[float, Field(ge=-0.5, le=0.5, strict=True)]
_PositiveShare = Annotated[float, Field(gt=0, le=1, strict=True)]

Shares = Annotated[tuple[_PositiveShare, _PositiveShare], AfterValidator(_ordered)]
Ratio = Annotated[float, Field(ge=1, le=100, strict=True)]
Factors = Annotated[tuple[_Factor, _Factor], AfterValidator(_ordered), BeforeValidator(_around(1, 0))]
Turns = Annotated[tuple[_Turn, _Turn], AfterValidator(_ordered), BeforeValidator(_around(0, -1))]


def uniform(word: int, bounds: tuple[float, float]) -> int:
    """A fixed-point number between ``bounds``, in 1 / UNIT, both ends included."""
    first, last = (round(bound * UNIT) for bound in bounds)
    return first + below(word, last - first + 1)


# --- colour jitter ----------------------------------------------------------------------------


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Shift the hue of an RGB image by ``turn`` of a full circle, in [-0.5, 0.5], like torchvision."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turn * 255) % 256)  # hue is a circle: it may wrap
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


_ORDERS = tuple(itertools.permutations(range(4)))
_ADJUST: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    turn_hue,
)


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Jitter(Stage):
    """Torchvision's ColorJitter: four changes of colour in a random order.

    Attributes:
        brightness: range of the factor, 1 changes nothing; None leaves it out.
        contrast: likewise.
        saturation: likewise.
        hue: range of the shift, as part of a full circle, in [-0.5, 0.5].
    """

    brightness: Factors | None = None
    contrast: Factors | None = None
    saturation: Factors | None = None
    hue: Turns | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """``jitter_order`` numbers the orders of the four others, in the order of their indices."""
        return ("jitter_order", "brightness", "contrast", "saturation", "hue")

    @property
    def neutral(self) -> tuple[int, ...]:
        """Factors of 1, a shift of 0."""
        return (0, UNIT, UNIT, UNIT, 0)

    @property
    def word_count(self) -> int:
        """One for the order, one for each change."""
        return 5

    def sample(self, random: Sequence[int]) -> tuple[int, ...]:
        """See :class:`Stage`; a change without a range is neutral."""
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        changes = (
            unchanged if bounds is None else uniform(word, bounds)
            for word, bounds, unchanged in zip(random[1:], ranges, self.neutral[1:], strict=True)
        )
        return (below(random[0], len(_ORDERS)), *changes)

    def apply(self, image: Image.Image, values: Sequence[int], fill: Fill) -> Image.Image:
        """See :class:`Stage`; what is neutral is left out: not even rounded."""
        for which in _ORDERS[values[0]]:
            if values[1 + which] != self.neutral[1 + which]:
                image = _ADJUST[which](image, values[1 + which] / UNIT)
        return image


# --- random erasing ---------------------------------------------------------------------------


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Erase(Stage):
    """Torchvision's RandomErasing (Zhong et al. 2020), with the recipe's ``fill``.

    Attributes:
        probability: of erasing anything.
        scale: least and largest share of the image's area.
        ratio: largest ratio of the box's sides; the smallest is its inverse.
    """

    probability: Share = 0.5
    scale: Shares = (0.02, 0.33)
    ratio: Ratio = 3.3

    @property
    def names(self) -> tuple[str, ...]:
        """A box in 1 / UNIT of the image's sides."""
        return ("erase_left", "erase_top", "erase_width", "erase_height")

    @property
    def neutral(self) -> tuple[int, ...]:
        """No box."""
        return (0, 0, 0, 0)

    @property
    def word_count(self) -> int:
        """One for whether, the others for where."""
        return 1 + BOX_WORDS

    def sample(self, random: Sequence[int]) -> tuple[int, ...]:
        """See :class:`Stage`; nothing is erased where ten tries find no box that fits, as in torchvision."""
        if random[0] >= int(self.probability * WORD):
            return self.neutral
        return random_box(self.scale, self.ratio, random[1:], UNIT, UNIT) or self.neutral

    def apply(self, image: Image.Image, values: Sequence[int], fill: Fill) -> Image.Image:
        """See :class:`Stage`."""
        left, top, right, bottom = in_pixels(values, *image.size)
        if right > left and bottom > top:
            image = image.copy()
            image.paste(fill, (left, top, right, bottom))
        return image
