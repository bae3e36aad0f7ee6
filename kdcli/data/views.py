"""Replayable views: what of the source image a model sees, mirrored, recoloured or mixed how.

A view set has view 0, an image as each model's evaluation shows it (:mod:`kdcli.geometry`), and views 1..K,
made by a recipe (:mod:`kdcli.data.recipes`). View v of a sample is a pure function of (recipe, key, v) and,
where images are mixed, of the rows that partners come from: it is the same alone, in any order and on any
platform. It is recorded as integers, places as shares of the image, so teachers and students of any input size
see the same training view. Order: crop box, resize to the model's size, mirror, colours, operations, erase, mix.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final, get_args

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from PIL import Image

from kdcli.data.boxes import BOX_WORDS, UNIT, Box, centre_box, random_box
from kdcli.data.clips import TIME_NAMES, TIME_WORDS, Clip, moments, random_span
from kdcli.data.drawing import NO_BOX, PARAM_NAMES, Params, fixed_images, fixed_photo, has_box, render, show
from kdcli.data.joined import Images
from kdcli.data.mixing import NO_PARTNER, Pixels
from kdcli.data.philox import WORD, words
from kdcli.data.photos import SCALES, Picture, Still
from kdcli.data.recipes import CUSTOM, RECIPES, Recipe, digest_of, find_recipe, recipe_from
from kdcli.data.stages import Stage
from kdcli.errors import BadDataError, ConfigError, IdentityError, UsageError
from kdcli.geometry import Render
from kdcli.types import DecodeMode, differences

__all__ = ["PARAM_NAMES", "RECIPES", "Params", "Recipe", "Render", "ViewSet"]

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
        recipe: of the training views: a name, a YAML file or a definition (see
            :func:`~kdcli.data.recipes.find_recipe`). Kept as its name, or the definition as JSON: never a path.
        decode: what views are drawn of: ``exact``, the whole image; ``scaled``, see :mod:`kdcli.data.photos`.
        clips: whether they are views of clips: these have a place in time, too.
    """

    train_views: int
    recipe: str
    decode: DecodeMode = "exact"
    clips: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", str(find_recipe(self.recipe)))

    @classmethod
    def parse(cls, text: str, *, recipe: str, decode: DecodeMode = "exact") -> "ViewSet":
        """Read ``eval`` or ``eval+train:K``.

        Raises:
            UsageError: neither, or an unknown recipe.
            NotFoundError, ConfigError: see :func:`~kdcli.data.recipes.find_recipe`.
        """
        match = re.fullmatch(r"eval(?:\+train:([1-9][0-9]{0,5}))?", text, re.ASCII)
        if not match:
            clips = re.match(r"eval:(\d+)", text, re.ASCII)
            hint = "Use --views eval, or --views eval+train:8 for 8 replayable training views."
            if clips:
                hint = f"Several clips of a video are shown in view 0 by --eval-geometry clips:{clips[1]}."
            raise UsageError(f"views '{text}' are neither eval nor eval+train:K with K of at least 1", hint)
        return cls(int(match[1] or 0), recipe, decode)

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
        """Columns of view parameters: :data:`PARAM_NAMES`, of clips :data:`TIME_NAMES`, then those of the recipe."""
        own = [name for _, stage in self.rule.stages for name in stage.names]
        mixing = self.rule.mixing
        time = TIME_NAMES if self.clips else ()
        return (*PARAM_NAMES, *time, *own, *(() if mixing is None else mixing.names))

    def params(self, key: str, view: int, width: int, height: int, pool: range | None = None) -> Params:
        """Parameters of one view of one sample, see :attr:`param_names`; of a clip all but those of time.

        Args:
            key: the sample's key.
            view: 0 for the evaluation view; any v >= 1 for a training view, also above K.
            width: of the upright source image, pixels.
            height: likewise.
            pool: rows that a partner may come from; needed where the recipe mixes.
        """
        rule, size = self.rule, (width, height)
        if view == 0:
            values = [*NO_BOX, 0, *size]
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

    def params_of(self, key: str, view: int, picture: Picture, pool: range | None = None) -> Params:
        """Parameters of one view of one sample, see :attr:`param_names`.

        Args:
            key: the sample's key.
            view: 0 for the evaluation view; any v >= 1 for a training view, also above K.
            picture: the sample.
            pool: see :meth:`params`.
        """
        params = self.params(key, view, *picture.size, pool)
        if not isinstance(picture, Clip):
            return params
        random = [int(word) for word in words(TIME_WORDS, "time", digest_of(self.rule), key, str(view))]
        start, span = random_span(random, picture.frames) if view else (0, picture.frames)
        return np.insert(params, len(PARAM_NAMES), np.array(picture.times(start, span), np.int32))

    def partners(self, params: Int32[np.ndarray, "*b w"]) -> Int64[np.ndarray, "*b"]:
        """Row that each view is mixed with; -1 for none."""
        if not self.mixes:
            return np.full(params.shape[:-1], NO_PARTNER, np.int64)
        return self._of_mixing(params, "partner").astype(np.int64)

    def own_share(self, params: Int32[np.ndarray, "*b w"]) -> Float32[np.ndarray, "*b"]:
        """Share of each view that is the sample's own, from 0 to 1; 1 where it is not mixed."""
        if not self.mixes:
            return np.ones(params.shape[:-1], np.float32)
        return (self._of_mixing(params, "lam") / UNIT).astype(np.float32)

    def _of_mixing(self, params: Int32[np.ndarray, "*b w"], name: str) -> Int32[np.ndarray, "*b"]:
        mixing = self.rule.mixing
        assert mixing is not None
        return params[..., mixing.names.index(name) - len(mixing.names)]

    # --- pixels ----------------------------------------------------------------------------------

    def draw(
        self,
        image: Picture,
        params: Params,
        target: Render,
        partner: "Partner | None" = None,
    ) -> Pixels:
        """Draw one view.

        Args:
            image: the upright RGB source image that ``params`` were made for; of a clip, each frame is drawn alike.
            params: see :attr:`param_names`.
            target: what it is drawn as.
            partner: image and parameters (of the same view) of the row that :meth:`partners` names, if any.
        """
        if not has_box(params):
            return show(image, target)
        if not isinstance(image, Clip):
            return self._drawn(image, params, target, partner)
        frames, own = _frames_of(image, params, target.frames)
        others: list[Partner | None] = [None] * len(frames)
        if partner is not None:
            clip, theirs = partner
            assert isinstance(clip, Clip)
            found, theirs = _frames_of(clip, theirs, target.frames)
            others = [(frame, theirs) for frame in found]
        drawn = [self._drawn(frame, own, target, other) for frame, other in zip(frames, others, strict=True)]
        return np.stack(drawn)

    def _drawn(self, image: Still, params: Params, target: Render, partner: "Partner | None") -> Pixels:
        own = self._unmixed(image, params, target)
        if partner is None or self.rule.mixing is None:
            return own
        theirs, other_params = partner
        assert not isinstance(theirs, Clip)
        other = self._unmixed(theirs, other_params, target)
        values = [int(value) for value in params[-len(self.rule.mixing.names) :]]
        return self.rule.mixing.blend(own, other, values)

    def _unmixed(self, image: Still, params: Params, target: Render) -> Pixels:
        pixels, stages = render(image, params, target.sides, target.interpolation), _stages(self.recipe)
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
        images, parts = fixed_images(), []
        for view in range(1, 9):
            params = [
                self.params(f"fixed/{number}", view, *image.size, range(len(images)))
                for number, image in enumerate(images)
            ]
            for image, own in zip(images, params, strict=True):
                other = int(self.partners(own))
                partner = None if other == NO_PARTNER else (images[other], params[other])
                drawn = self.draw(image, own, Render((32, 32), "bilinear"), partner)
                parts.append(drawn[4::8, 4::8].ravel())
        if self.decode == "scaled":
            parts += [np.asarray(fixed_photo().at(scale))[::5, ::5].ravel() for scale in SCALES]
        return np.concatenate(parts)

    # --- documents -------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """The view set as JSON, with the recipe's definition; its name is ``custom`` if it has none."""
        document = {
            "train_views": self.train_views,
            "recipe": {"name": self.rule.name, **self.rule.document()},
        }
        if self.decode != "exact":
            document["decode"] = self.decode
        return {**document, "clips": True} if self.clips else document

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "ViewSet":
        """Undo :meth:`document`; no recipe file is needed.

        Raises:
            BadDataError: it is not such a document.
            IdentityError: this version of kd has no such recipe, or defines it differently.
        """
        try:
            recipe = _recorded(document["recipe"])
            found = cls(document["train_views"], recipe, decode_of(document), document.get("clips", False))
        except (KeyError, TypeError, ConfigError) as error:
            raise BadDataError(f"not a description of views: {document}", "Make the cache again.") from error
        changed = differences(document, found.document())
        if changed:
            raise IdentityError(
                "the recipe of the views is defined differently", "Make a new cache.", changed
            )
        return found


def decode_of(document: Mapping[str, Any]) -> DecodeMode:
    """What views are drawn of, by the record of a view set.

    Raises:
        IdentityError: this version of kd knows no such way.
    """
    found: DecodeMode = document.get("decode", "exact")
    if found not in get_args(DecodeMode):
        raise IdentityError(
            f"this version of kd knows no decoding '{found}'",
            "Use the version that made the cache, or make a new one.",
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


def _frames_of(clip: Clip, params: Params, count: int) -> tuple[list[Image.Image], Params]:
    """The frames of a view's span, and the parameters by which each of them is drawn."""
    place = len(PARAM_NAMES)
    start, span = (int(value) for value in params[place : place + 2])
    return clip.at(moments(start, span, count)), np.delete(params, slice(place, place + len(TIME_NAMES)))


# --- drawing a data set's images ---------------------------------------------------------------

Partner = tuple[Picture, Params]
"""The image that a view is mixed with, and the parameters of that image's own view of the same number."""

Drawn = dict[Render, Pixels]
"""One view as every model is shown it."""


@final
class Drawer:
    """Draws views at the input sizes of several models. Picklable.

    Attributes:
        renders: what it draws them as.

    Args:
        data: the images.
        views: what their views are.
        renders: what to draw them as.
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
        self._data, self._views, self.renders = data, views, tuple(renders)
        self._pool, self._places = pool, places

    def params(self, position: int, image: Picture, view: int) -> Params:
        """Parameters of one view of the image at a position, without drawing it."""
        return self._views.params_of(self._data.keys[position], view, image, self._pool)

    def draw(self, position: int, image: Picture, view: int) -> tuple[Params, Drawn]:
        """One view of the image at a position; a partner is decoded as well.

        Args:
            position: in the data.
            image: its upright RGB image.
            view: 0 or a training view.

        Returns:
            The parameters to record, and the pixels by what they are drawn as.

        Raises:
            BadDataError: the partner cannot be decoded, or is not in the data.
        """
        params = self.params(position, image, view)
        row = int(self._views.partners(params))
        partner = None if row == NO_PARTNER else self._partner(position, row, view)
        return params, self.replay(image, params, partner)

    def replay(self, image: Picture, params: Params, partner: Partner | None) -> Drawn:
        """The view that ``params`` describe; ``partner`` where :meth:`ViewSet.partners` names one."""
        placed = not has_box(params)
        drawn: Drawn = {}
        for target in self.renders:  # a training view is drawn once for models that differ in view 0 only
            key = target if placed else target.unplaced
            if key not in drawn:
                drawn[key] = self._views.draw(image, params, key, partner)
        return {target: drawn[target if placed else target.unplaced] for target in self.renders}

    def _partner(self, position: int, row: int, view: int) -> Partner:
        place = row if self._places is None else int(self._places[row])
        if place < 0:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with row {row}, which is not in the data",
                "Use the whole data set that partners come from, or a recipe that does not mix.",
            )
        try:
            image = self._data.picture(place, self._data.encoded(place), self._views.decode)
            image.load()
        except BadDataError as error:
            raise BadDataError(
                f"{self._data.path(position)} is mixed with a bad image: {error.message}", error.hint
            ) from error
        return image, self.params(place, image, view)
