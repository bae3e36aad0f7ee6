"""Replayable views: what of the source image a model sees, mirrored, recoloured or mixed how.

A view set has view 0, one centre square per sample, and views 1..K, made by a recipe
(:mod:`kdcli.data.recipes`). View v of a sample is a pure function of (recipe, key, v) and, where images are
mixed, of the rows that partners come from: it is the same alone, in any order and on any platform. It is
recorded as integers, places as shares of the image, so teachers and students of any input size see the
same view. Order: crop box, resize to the model's size, mirror, colours, operations, erase, mix.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from PIL import Image

from kdcli.data.boxes import BOX_WORDS, UNIT, Box, centre_box, centre_square, random_box
from kdcli.data.joined import Images
from kdcli.data.mixing import NO_PARTNER, Pixels
from kdcli.data.philox import WORD, words
from kdcli.data.recipes import CUSTOM, RECIPES, Recipe, digest_of, find_recipe, recipe_from
from kdcli.data.stages import Stage
from kdcli.errors import BadDataError, ConfigError, IdentityError, UsageError
from kdcli.types import Interpolation, differences

__all__ = ["PARAM_NAMES", "RECIPES", "Recipe", "Render", "ViewSet", "fingerprint", "render"]

PARAM_NAMES = ("left", "top", "width", "height", "flip", "source_width", "source_height")
"""First columns of view parameters: the box in source pixels, 0 or 1, the size of the upright source image."""

Params = Int32[np.ndarray, " w"]
Render = tuple[tuple[int, int], Interpolation]
"""Input size (height, width) and interpolation: models that share both share their pixels."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_find = lru_cache(maxsize=64)(find_recipe)


@lru_cache(maxsize=64)
def _stages(recipe: str) -> tuple[tuple[str, Stage], ...]:
    return tuple(_find(recipe).stages)


@final
@dataclass(frozen=True, slots=True)
class ViewSet:
    """The views of a cache or a training run.

    Attributes:
        train_views: K, the number of training views; views above K are defined all the same.
        crop_fraction: share of the shorter source side that view 0 keeps, in (0, 1].
        recipe: of the training views: a name, a YAML file or a definition (see
            :func:`~kdcli.data.recipes.find_recipe`). Kept as its name, or the definition as JSON: never a path.
    """

    train_views: int
    crop_fraction: float
    recipe: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", str(find_recipe(self.recipe)))
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(
                f"crop fraction {self.crop_fraction} is not in (0, 1]", "Use --eval-crop 0.875, or 1."
            )

    @classmethod
    def parse(cls, text: str, *, crop_fraction: float, recipe: str) -> "ViewSet":
        """Read ``eval`` or ``eval+train:K``.

        Raises:
            UsageError: neither, or an unknown recipe.
            NotFoundError, ConfigError: see :func:`~kdcli.data.recipes.find_recipe`.
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

    @property
    def rule(self) -> Recipe:
        """The recipe's definition."""
        return _find(self.recipe)

    @property
    def mixes(self) -> bool:
        """Whether training views are mixed with other images."""
        return self.rule.mixing is not None

    # --- parameters ------------------------------------------------------------------------------

    @property
    def param_names(self) -> tuple[str, ...]:
        """Columns of view parameters: :data:`PARAM_NAMES`, then those of the recipe."""
        own = [name for _, stage in self.rule.stages for name in stage.names]
        mixing = self.rule.mixing
        return (*PARAM_NAMES, *own, *(() if mixing is None else mixing.names))

    def params(self, key: str, view: int, width: int, height: int, pool: range | None = None) -> Params:
        """Parameters of one view of one sample, see :attr:`param_names`.

        Args:
            key: the sample's key.
            view: 0 for the centre square; any v >= 1 for a training view, also above K.
            width: of the upright source image, pixels.
            height: likewise.
            pool: rows that a partner may come from; needed where the recipe mixes.
        """
        rule, size = self.rule, (width, height)
        if view == 0:
            values = [*centre_square(*size, self.crop_fraction), 0, *size]
            values += [value for _, stage in rule.stages for value in stage.neutral]
            return np.array([*values, *(() if rule.mixing is None else rule.mixing.neutral)], np.int32)

        def random(name: str, count: int) -> list[int]:
            return [int(word) for word in words(count, name, digest_of(rule), key, str(view))]

        flip, *box = random("view", 1 + BOX_WORDS)
        values = [*_crop(rule, box, width, height), flip < int(rule.flip * WORD), *size]
        for name, stage in rule.stages:
            values += stage.sample(random(name, stage.word_count))
        if rule.mixing is not None:
            if pool is None:
                raise ValueError("a recipe that mixes needs the rows that partners come from")
            values += rule.mixing.sample(random("mix", rule.mixing.word_count), pool)
        return np.array(values, np.int32)

    def partners(self, params: Int32[np.ndarray, "*b w"]) -> Int64[np.ndarray, "*b"]:
        """Row that each view is mixed with; -1 for none."""
        if not self.mixes:
            return np.full(params.shape[:-1], NO_PARTNER, np.int64)
        return params[..., self.param_names.index("partner")].astype(np.int64)

    def own_share(self, params: Int32[np.ndarray, "*b w"]) -> Float32[np.ndarray, "*b"]:
        """Share of each view that is the sample's own, from 0 to 1; 1 where it is not mixed."""
        if not self.mixes:
            return np.ones(params.shape[:-1], np.float32)
        return (params[..., self.param_names.index("lam")] / UNIT).astype(np.float32)

    # --- pixels ----------------------------------------------------------------------------------

    def draw(
        self,
        image: Image.Image,
        params: Params,
        size: tuple[int, int],
        interpolation: Interpolation,
        partner: tuple[Image.Image, Params] | None = None,
    ) -> Pixels:
        """Draw one view.

        Args:
            image: the upright RGB source image that ``params`` were made for.
            params: see :attr:`param_names`.
            size: (height, width) in pixels of the result.
            interpolation: resampling filter of the resize.
            partner: image and parameters (of the same view) of the row that :meth:`partners` names, if any.
        """
        own = self._unmixed(image, params, size, interpolation)
        if partner is None or self.rule.mixing is None:
            return own
        other = self._unmixed(*partner, size, interpolation)
        values = [int(value) for value in params[-len(self.rule.mixing.names) :]]
        return self.rule.mixing.blend(own, other, values)

    def _unmixed(
        self, image: Image.Image, params: Params, size: tuple[int, int], interpolation: Interpolation
    ) -> Pixels:
        pixels, stages = render(image, params, size, interpolation), _stages(self.recipe)
        if not stages:
            return pixels
        picture, place, fill = Image.fromarray(pixels), len(PARAM_NAMES), self.rule.fill
        for _, stage in stages:
            values = [int(value) for value in params[place : place + len(stage.names)]]
            picture, place = stage.apply(picture, values, fill), place + len(stage.names)
        return np.array(picture)

    def pixels(self) -> UInt8[np.ndarray, " k"]:
        """What this installation draws of two fixed images by this recipe: tells when a library changes pixels.

        Returns:
            A 4 x 4 grid of pixels of 8 training views of each image, flattened.
        """
        images, parts = _fixed_images(), []
        for view in range(1, 9):
            params = [
                self.params(f"fixed/{number}", view, *image.size, range(len(images)))
                for number, image in enumerate(images)
            ]
            for image, own in zip(images, params, strict=True):
                other = int(self.partners(own))
                partner = None if other == NO_PARTNER else (images[other], params[other])
                drawn = self.draw(image, own, (32, 32), "bilinear", partner)
                parts.append(drawn[4::8, 4::8].ravel())
        return np.concatenate(parts)

    # --- documents -------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """The view set as JSON, with the recipe's definition; its name is ``custom`` if it has none."""
        return {
            "train_views": self.train_views,
            "crop_fraction": self.crop_fraction,
            "recipe": {"name": self.rule.name, **self.rule.document()},
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "ViewSet":
        """Undo :meth:`document`; no recipe file is needed.

        Raises:
            BadDataError: it is not such a document.
            IdentityError: this version of kd has no such recipe, or defines it differently.
        """
        try:
            recipe = _recorded(document["recipe"])
            found = cls(document["train_views"], document["crop_fraction"], recipe)
        except (KeyError, TypeError, ConfigError) as error:
            raise BadDataError(f"not a description of views: {document}", "Make the cache again.") from error
        changed = differences(document, found.document())
        if changed:
            raise IdentityError(
                "the recipe of the views is defined differently", "Make a new cache.", changed
            )
        return found


def _recorded(recipe: Mapping[str, Any]) -> str:
    """The text of a recorded recipe."""
    name = recipe["name"]
    if name == CUSTOM:
        return str(recipe_from({key: value for key, value in recipe.items() if key != "name"}, CUSTOM))
    if name not in RECIPES:
        raise IdentityError(
            f"this version of kd has no view recipe '{name}'",
            "Use the version that made the cache, or make a new one.",
        )
    return str(name)


def _crop(rule: Recipe, random: list[int], width: int, height: int) -> Box:
    if rule.scale is None:
        return 0, 0, width, height
    return random_box(rule.scale, rule.ratio, random, width, height) or centre_box(rule.ratio, width, height)


def render(
    image: Image.Image, params: Params, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw what every view begins with: crop its box, resize that with antialiasing, then mirror it.

    Args:
        image: the upright RGB source image that ``params`` were made for.
        params: at least :data:`PARAM_NAMES`; more columns do not matter.
        size: (height, width) in pixels of the result.
        interpolation: resampling filter.
    """
    left, top, width, height, flip = (int(value) for value in params[:5])
    box = (left, top, left + width, top + height)
    # Cropped first, as torchvision does: resize(box=...) would let the filter see pixels outside the box.
    pixels = np.asarray(image.crop(box).resize((size[1], size[0]), _RESAMPLING[interpolation]))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else np.array(pixels)


def _fixed_images() -> list[Image.Image]:
    images = []
    for number, (width, height) in enumerate(((97, 61), (40, 56))):
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pattern = np.stack([x * 5 + y, x * y // 3, (x // 4 + y // 4) % 2 * 200 + number], axis=-1) % 256
        images.append(Image.fromarray(pattern.astype(np.uint8)))
    return images


def fingerprint(size: tuple[int, int], interpolation: Interpolation) -> UInt8[np.ndarray, " k"]:
    """What this installation draws of two fixed images: tells when a library changes pixels.

    Returns:
        An 8 x 8 grid of pixels of each image, flattened.
    """
    parts = []
    for number, image in enumerate(_fixed_images()):
        width, height = image.size
        box = np.array([1, 2, width - 3, height - 4, number, width, height], np.int32)
        pixels = render(image, box, size, interpolation)
        rows = np.linspace(0, size[0] - 1, 8).astype(int)
        columns = np.linspace(0, size[1] - 1, 8).astype(int)
        parts.append(pixels[np.ix_(rows, columns)].ravel())
    return np.concatenate(parts)


# --- drawing a data set's images ---------------------------------------------------------------

Partner = tuple[Image.Image, Params]
"""The image that a view is mixed with, and the parameters of that image's own view of the same number."""

Drawn = dict[Render, Pixels]
"""One view at every size and interpolation."""


@final
class Drawer:
    """Draws views at the input sizes of several models. Picklable.

    Args:
        data: the images.
        views: what their views are.
        renders: sizes and interpolations to draw.
        pool: rows that partners may come from.
        places: position in ``data`` of each row, -1 where it is not there; None: rows are positions.
    """

    def __init__(
        self,
        data: Images,
        views: ViewSet,
        renders: Sequence[Render],
        pool: range,
        places: Int64[np.ndarray, " n"] | None = None,
    ) -> None:
        self._data, self._views, self._renders = data, views, tuple(renders)
        self._pool, self._places = pool, places

    def params(self, position: int, image: Image.Image, view: int) -> Params:
        """Parameters of one view of the image at a position, without drawing it."""
        return self._views.params(self._data.keys[position], view, *image.size, self._pool)

    def draw(self, position: int, image: Image.Image, view: int) -> tuple[Params, Drawn]:
        """One view of the image at a position; a partner is decoded as well.

        Args:
            position: in the data.
            image: its upright RGB image.
            view: 0 or a training view.

        Returns:
            The parameters to record, and the pixels per size and interpolation.

        Raises:
            BadDataError: the partner cannot be decoded, or is not in the data.
        """
        params = self.params(position, image, view)
        row = int(self._views.partners(params))
        partner = None if row == NO_PARTNER else self._partner(position, row, view)
        return params, self.replay(image, params, partner)

    def replay(self, image: Image.Image, params: Params, partner: Partner | None) -> Drawn:
        """The view that ``params`` describe; ``partner`` where :meth:`ViewSet.partners` names one."""
        return {
            (size, interpolation): self._views.draw(image, params, size, interpolation, partner)
            for size, interpolation in self._renders
        }

    def _partner(self, position: int, row: int, view: int) -> Partner:
        place = row if self._places is None else int(self._places[row])
        if place < 0:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with row {row}, which is not in the data",
                "Use the whole data set that partners come from, or a recipe that does not mix.",
            )
        try:
            image = self._data.image(place)
        except BadDataError as error:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with a bad image: {error.message}", error.hint
            ) from error
        return image, self.params(place, image, view)
