"""Replayable views: which box of the source image a model sees, and whether it is mirrored.

A view set has view 0, one centre square per sample, and views 1..K, random resized crops. View v of a
sample is a pure function of (recipe, key, v): it is the same alone, in any order and on any platform.
Models only resize the box to their own input size, so teachers and students see the same source pixels.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from kdcli.data.philox import WORD, below, words
from kdcli.errors import BadDataError, IdentityError, UsageError, nearest
from kdcli.types import Interpolation, differences

PARAM_NAMES = ("left", "top", "width", "height", "flip", "source_width", "source_height")
"""Columns of view parameters: the box in source pixels, 0 or 1, the size of the upright source image."""

Params = Int32[np.ndarray, " 7"]

_TRIES = 10
_WORDS = 1 + 4 * _TRIES
_FRACTION_BITS = 32
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How training views are drawn: torchvision's RandomResizedCrop, then a mirror image.

    Attributes:
        scale: least and largest share of the source area.
        ratio: largest ratio of width to height; the smallest is its inverse.
        flip: probability of the mirror image.
    """

    scale: tuple[float, float]
    ratio: float
    flip: float

    def document(self) -> dict[str, Any]:
        """The definition as JSON."""
        return {"scale": list(self.scale), "ratio": self.ratio, "flip": self.flip}

    def digest(self) -> str:
        """Names the random streams of this definition."""
        text = json.dumps(self.document(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


RECIPES = {
    "imagenet": Recipe(scale=(0.08, 1.0), ratio=4 / 3, flip=0.5),
    "mild": Recipe(scale=(0.35, 1.0), ratio=4 / 3, flip=0.5),
    "glyph": Recipe(scale=(0.6, 1.0), ratio=4 / 3, flip=0.0),
}
_DIGESTS = {name: recipe.digest() for name, recipe in RECIPES.items()}


@final
@dataclass(frozen=True, slots=True)
class ViewSet:
    """The views of a cache or a training run.

    Attributes:
        train_views: K, the number of training views; views above K are defined all the same.
        crop_fraction: share of the shorter source side that view 0 keeps, in (0, 1].
        recipe: of the training views, one of :data:`RECIPES`.
    """

    train_views: int
    crop_fraction: float
    recipe: str

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UsageError(
                f"unknown view recipe '{self.recipe}'.{nearest(self.recipe, RECIPES)}",
                f"Recipes are {', '.join(RECIPES)}.",
            )
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(
                f"crop fraction {self.crop_fraction} is not in (0, 1]", "Use --eval-crop 0.875, or 1."
            )

    @classmethod
    def parse(cls, text: str, *, crop_fraction: float, recipe: str) -> "ViewSet":
        """Read ``eval`` or ``eval+train:K``.

        Raises:
            UsageError: neither, or an unknown recipe.
        """
        match = re.fullmatch(r"eval(?:\+train:([1-9][0-9]{0,5}))?", text, re.ASCII)
        if not match:
            raise UsageError(
                f"views '{text}' are neither eval nor eval+train:K with K of at least 1",
                "Use --views eval, or --views eval+train:8 for 8 replayable training views.",
            )
        return cls(int(match[1] or 0), crop_fraction, recipe)

    def __str__(self) -> str:
        return f"eval+train:{self.train_views}" if self.train_views else "eval"

    @property
    def count(self) -> int:
        """1 + K."""
        return 1 + self.train_views

    def params(self, key: str, view: int, width: int, height: int) -> Params:
        """Parameters of one view of one sample, see :data:`PARAM_NAMES`.

        Args:
            key: the sample's key.
            view: 0 for the centre square; any v >= 1 for a training view, also above K.
            width: of the upright source image, pixels.
            height: likewise.
        """
        if view == 0:
            box = _centre_square(width, height, self.crop_fraction)
            return np.array([*box, 0, width, height], np.int32)
        random = [int(word) for word in words(_WORDS, "view", _DIGESTS[self.recipe], key, str(view))]
        recipe = RECIPES[self.recipe]
        flip = random[0] < int(recipe.flip * WORD)
        box = _random_box(recipe, random[1:], width, height)
        return np.array([*box, flip, width, height], np.int32)

    def document(self) -> dict[str, Any]:
        """The view set as JSON, with the recipe's definition."""
        return {
            "train_views": self.train_views,
            "crop_fraction": self.crop_fraction,
            "recipe": {"name": self.recipe, **RECIPES[self.recipe].document()},
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "ViewSet":
        """Undo :meth:`document`.

        Raises:
            BadDataError: it is not such a document.
            IdentityError: this version of kd defines the recipe differently.
        """
        try:
            found = cls(document["train_views"], document["crop_fraction"], document["recipe"]["name"])
        except (KeyError, TypeError) as error:
            raise BadDataError(f"not a description of views: {document}", "Make the cache again.") from error
        changed = differences(document, found.document())
        if changed:
            raise IdentityError(
                "the recipe of the views is defined differently", "Make a new cache.", changed
            )
        return found


def _centre_square(width: int, height: int, fraction: float) -> tuple[int, int, int, int]:
    side = max(1, math.floor(fraction * min(width, height) + 0.5))
    return (width - side) // 2, (height - side) // 2, side, side


def _random_box(recipe: Recipe, random: list[int], width: int, height: int) -> tuple[int, int, int, int]:
    """Torchvision's RandomResizedCrop (after Szegedy et al. 2015): ten tries, then a centre crop.

    The area's share is uniform, the ratio of the sides log-uniform. Sides are computed in integers from
    fixed-point numbers, so that the last bit of a platform's exp() does not matter.

    Args:
        recipe: ranges of share and ratio.
        random: four raw words for each try.
        width: of the source, pixels.
        height: likewise.

    Returns:
        left, top, width, height of a box inside the source.
    """
    one = 1 << _FRACTION_BITS
    least, largest = (round(bound * one) for bound in recipe.scale)
    for start in range(0, 4 * _TRIES, 4):
        share_word, ratio_word, left_word, top_word = random[start : start + 4]
        share = least + below(share_word, largest - least + 1)
        ratio = round(recipe.ratio ** (2 * (ratio_word >> 12) / (1 << 52) - 1) * one)
        area = width * height * share
        box_width = _rounded_root(area * ratio, one * one)
        box_height = _rounded_root(area, ratio)
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = below(left_word, width - box_width + 1), below(top_word, height - box_height + 1)
            return left, top, box_width, box_height
    box_width = min(width, math.floor(height * recipe.ratio + 0.5))
    box_height = min(height, math.floor(width * recipe.ratio + 0.5))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def _rounded_root(numerator: int, denominator: int) -> int:
    """round(sqrt(numerator / denominator)), exactly."""
    return (math.isqrt(4 * numerator // denominator) + 1) // 2


def render(
    image: Image.Image, params: Params, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one view: crop its box, resize that with antialiasing, then mirror it.

    Args:
        image: the upright RGB source image that ``params`` were made for.
        params: see :data:`PARAM_NAMES`.
        size: (height, width) in pixels of the result.
        interpolation: resampling filter.
    """
    left, top, width, height, flip = (int(value) for value in params[:5])
    box = (left, top, left + width, top + height)
    # Cropped first, as torchvision does: resize(box=...) would let the filter see pixels outside the box.
    pixels = np.asarray(image.crop(box).resize((size[1], size[0]), _RESAMPLING[interpolation]))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else np.array(pixels)


def fingerprint(size: tuple[int, int], interpolation: Interpolation) -> UInt8[np.ndarray, " k"]:
    """What this installation draws of two fixed images: tells when a library changes pixels.

    Returns:
        An 8 x 8 grid of pixels of each image, flattened.
    """
    parts = []
    for number, (width, height) in enumerate(((97, 61), (40, 56))):
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pattern = np.stack([x * 5 + y, x * y // 3, (x // 4 + y // 4) % 2 * 200 + number], axis=-1) % 256
        box = np.array([1, 2, width - 3, height - 4, number, width, height], np.int32)
        pixels = render(Image.fromarray(pattern.astype(np.uint8)), box, size, interpolation)
        rows = np.linspace(0, size[0] - 1, 8).astype(int)
        columns = np.linspace(0, size[1] - 1, 8).astype(int)
        parts.append(pixels[np.ix_(rows, columns)].ravel())
    return np.concatenate(parts)
