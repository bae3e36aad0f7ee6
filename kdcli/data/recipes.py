"""How training views are made: named recipes, and recipes of one's own in YAML.

    kd cache-teachers DATA --views eval+train:8 --recipe autoaugment ...
    kd cache-teachers DATA --views eval+train:8 --recipe mine.yaml ...

with mine.yaml, where every key may be left out::

    scale: [0.35, 1.0]          # RandomResizedCrop; without it the whole image is resized
    ratio: 1.3333333333333333
    flip: 0.5
    jitter: {brightness: 0.4, contrast: 0.4, saturation: [0.8, 1.2], hue: 0.1}
    randaugment: {n: 2, m: 9}   # or autoaugment: imagenet
    erase: {probability: 0.25, scale: [0.02, 0.33], ratio: 3.3}
    fill: [0, 0, 0]             # of what is erased, sheared, shifted or rotated in
    cutmix: {alpha: 1.0}        # or mixup: {alpha: 0.2}

For glyphs, digits and other images whose mirror image or colour is another class: ``glyph`` and
``glyph-jitter`` never mirror, turn hues or cut deep.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, cast, final

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, with_config

from kdcli.data.mixing import CutMix, Mixing, MixUp
from kdcli.data.policies import AutoAugment, RandAugment
from kdcli.data.stages import STRICT, Erase, Fill, Jitter, Ratio, Share, Shares, Stage
from kdcli.errors import ConfigError, NotFoundError, UsageError, nearest
from kdcli.files import storage_errors
from kdcli.reading import read_text
from kdcli.reading_yaml import YAML_BYTES, parse_yaml

CUSTOM = "custom"
"""What a recipe that is none of :data:`RECIPES` is called where a name is needed."""

_RATIO = 4 / 3
_BLACK: Fill = (0, 0, 0)
_Channel = Annotated[int, Field(ge=0, le=255, strict=True)]


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Recipe:
    """How training views are drawn, in this order; what is None is left out.

    Attributes:
        scale: torchvision's RandomResizedCrop: least and largest share of the source area.
        ratio: its largest ratio of width to height; the smallest is its inverse.
        flip: probability of the mirror image.
        jitter: random brightness, contrast, saturation and hue.
        randaugment: random operations.
        autoaugment: random operations of a learned policy; the other one of the two.
        erase: a random box is filled.
        mixup: mixed with another image.
        cutmix: a box of another image; the other one of the two.
        fill: colour of what operations uncover and of what is erased.
    """

    scale: Shares | None = None
    ratio: Ratio = _RATIO
    flip: Share = 0.0
    jitter: Jitter | None = None
    randaugment: RandAugment | None = None
    autoaugment: Annotated[
        AutoAugment | None, BeforeValidator(lambda value: {"policy": value} if isinstance(value, str) else value)
    ] = None  # fmt: skip
    erase: Erase | None = None
    mixup: MixUp | None = None
    cutmix: CutMix | None = None
    fill: tuple[_Channel, _Channel, _Channel] = _BLACK

    def __post_init__(self) -> None:
        if self.scale is None and self.ratio != _RATIO:
            raise ValueError("ratio is of the crop, and there is no scale to crop to")
        if self.randaugment is not None and self.autoaugment is not None:
            raise ValueError("give either randaugment or autoaugment")
        if self.mixup is not None and self.cutmix is not None:
            raise ValueError("give either mixup or cutmix")

    @property
    def stages(self) -> tuple[tuple[str, Stage], ...]:
        """Name and definition of the steps after crop, resize and flip, in their order."""
        found = ((name, getattr(self, name)) for name in ("jitter", "randaugment", "autoaugment", "erase"))
        return tuple((name, stage) for name, stage in found if stage is not None)

    @property
    def mixing(self) -> Mixing | None:
        """How a view is mixed with another image's, if it is."""
        return self.mixup if self.mixup is not None else self.cutmix

    def document(self) -> dict[str, Any]:
        """The definition as JSON, without what is left out."""
        document = cast(dict[str, Any], _plain(asdict(self)))
        if self.scale is None:
            del document["ratio"]
        if self.fill == _BLACK:
            del document["fill"]
        return document

    def digest(self) -> str:
        """Names the random streams of this definition."""
        text = json.dumps(self.document(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def name(self) -> str:
        """Its name in :data:`RECIPES`, or ``custom``."""
        return next((name for name, known in RECIPES.items() if known == self), CUSTOM)

    def __str__(self) -> str:
        """A text that :func:`find_recipe` turns into this recipe: its name, else its definition as JSON."""
        return json.dumps(self.document()) if self.name == CUSTOM else self.name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


RECIPES = {
    "imagenet": Recipe(scale=(0.08, 1.0), flip=0.5),
    "mild": Recipe(scale=(0.35, 1.0), flip=0.5),
    "glyph": Recipe(scale=(0.6, 1.0), flip=0.0),
    "glyph-jitter": Recipe(
        scale=(0.6, 1.0),
        flip=0.0,
        jitter=Jitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4)),
        erase=Erase(probability=0.25, scale=(0.01, 0.06), ratio=2.0),
    ),
    "jitter": Recipe(
        scale=(0.08, 1.0),
        flip=0.5,
        jitter=Jitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1)),
    ),
    "randaugment": Recipe(scale=(0.08, 1.0), flip=0.5, randaugment=RandAugment(n=2, m=(9, 9))),
    "autoaugment": Recipe(flip=0.0, autoaugment=AutoAugment("imagenet")),
    "fixmatch": Recipe(
        scale=(0.35, 1.0),
        flip=0.5,
        randaugment=RandAugment(n=2, m=(0, 30)),
        erase=Erase(probability=1.0, scale=(0.01, 0.25), ratio=1.0),
        fill=(127, 127, 127),
    ),
    "mixup": Recipe(scale=(0.08, 1.0), flip=0.5, mixup=MixUp(alpha=0.2)),
    "cutmix": Recipe(scale=(0.08, 1.0), flip=0.5, cutmix=CutMix(alpha=1.0)),
}
"""Named recipes. ``autoaugment`` is P4's: no crop, no flip. ``fixmatch`` is FixMatch's strong view."""

_ADAPTER = TypeAdapter(Recipe)


@lru_cache(maxsize=64)
def digest_of(recipe: Recipe) -> str:
    """:meth:`Recipe.digest`, computed once."""
    return recipe.digest()


def find_recipe(text: str) -> Recipe:
    """The recipe that a user means.

    Args:
        text: a name in :data:`RECIPES`, the path of a YAML file, or a definition ``{...}`` itself.

    Raises:
        UsageError: an unknown name.
        NotFoundError: there is no such file.
        StorageError: the file cannot be read.
        ConfigError: it is no regular file of YAML, or not a definition: all errors are named.
    """
    if text in RECIPES:
        return RECIPES[text]
    if text.lstrip().startswith("{"):
        return recipe_from(parse_yaml(text, "the recipe"), "the recipe")
    if not text.endswith((".yaml", ".yml")):
        raise UsageError(
            f"unknown view recipe '{text}'.{nearest(text, RECIPES)}",
            f"Recipes are {', '.join(RECIPES)}, or a file of your own: --recipe mine.yaml.",
        )
    with storage_errors(text):
        try:
            content = read_text(Path(text), YAML_BYTES, ConfigError, "Correct the file.")
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no recipe file {text}", "Check --recipe.") from error
    return recipe_from(parse_yaml(content, text), text)


def recipe_from(document: Any, where: str) -> Recipe:
    """Read a definition; undoes :meth:`Recipe.document`.

    Raises:
        ConfigError: naming every unknown key, with the nearest known one, and every value out of range.
    """
    if not isinstance(document, Mapping) or not document:
        raise ConfigError(f"{where} does not hold keys and values", "Write lines such as: flip: 0.5")
    try:
        return _ADAPTER.validate_python(dict(document))
    except ValidationError as error:
        problems = "; ".join(_explain(item) for item in error.errors())
        keys = ", ".join(field.name for field in fields(Recipe))
        raise ConfigError(f"{where}: {problems}", f"A recipe's keys are {keys}.") from error


def _explain(item: Any) -> str:
    """One validation error in the user's terms."""
    path = [str(part) for part in item["loc"]]
    name = ".".join(path) or "recipe"
    if item["type"] == "unexpected_keyword_argument":
        part = _PARTS.get(path[0], Recipe) if len(path) > 1 else Recipe
        return f"{name}: unknown key.{nearest(path[-1], [field.name for field in fields(part)])}"
    message = str(_MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, ")))
    return (f"{name} {item['input']}: " if path else "") + message[0].lower() + message[1:]


_MESSAGES = {
    "tuple_type": "must be a list of numbers, such as [0.5, 1.0]",
    "dataclass_type": "must hold keys and values, such as {probability: 0.5}",
    "missing": "there are too few numbers",
    "too_long": "there are too many numbers",
}


_PARTS: dict[str, Any] = {
    "jitter": Jitter,
    "randaugment": RandAugment,
    "autoaugment": AutoAugment,
    "erase": Erase,
    "mixup": MixUp,
    "cutmix": CutMix,
}
