"""Characters of eight scripts, drawn on the fly in the fonts that matplotlib carries.

Class = character, domain = script, shift = style; each (character, font) has eight jittered variants. The
encoded bytes of a sample are a recipe that names the font file's checksum, so another font version is
another identity. Splits: train = sans-serif, test = serif styles; scripts without serif letters (Arabic,
Hebrew, Lao): train = regular and oblique, test = bold styles.
"""

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import ImageSource, Listing, SourceKind, pick_split, pick_task
from kdcli.data.philox import below, words
from kdcli.errors import BadDataError
from kdcli.reading import read_bytes

VARIANTS = 8
SIDE = 64  # pixels of an image

_SANS = ("DejaVuSans", "DejaVuSansMono")
_SERIF = ("DejaVuSerif",)
_FONTS = (
    *(f"{family}{style}" for family in _SANS for style in ("", "-Bold", "-BoldOblique", "-Oblique")),
    *(f"{family}{style}" for family in _SERIF for style in ("", "-Bold", "-BoldItalic", "-Italic")),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"),
)
_NO_CHARACTER = "\U0010ffff"  # every font draws its "missing" box for it


def _between(*bounds: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in bounds for code in range(first, last + 1))


SCRIPTS = {
    "latin": _between((0x41, 0x5A), (0x61, 0x7A)),
    "greek": _between((0x391, 0x3A9), (0x3B1, 0x3C9)),
    "cyrillic": _between((0x410, 0x44F)),
    "armenian": _between((0x531, 0x556), (0x561, 0x586)),
    "georgian": _between((0x10D0, 0x10F0)),
    "arabic": _between((0x621, 0x63A), (0x641, 0x64A)),  # without tatweel, which is a bar
    "hebrew": _between((0x5D0, 0x5EA)),
    "lao": _between((0xE81, 0xEAE)),
}
TASKS = ("character", "style")


@final
class GlyphSource(ImageSource):
    """One script; keys are ``train/U+0041/DejaVuSans-Bold/3``.

    Args:
        script: one of :data:`SCRIPTS`.
    """

    def __init__(self, script: str) -> None:
        self._script = script
        self._folder = _font_folder()

    @property
    def text(self) -> str:
        """``glyphs/greek``."""
        return f"glyphs/{self._script}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        task = pick_task(task, TASKS, self.text)
        wanted = pick_split(split, ("test", "train"), self.text) if split else None
        drawn = {font: set(drawable(str(self._folder), font, self._script)) for font in _FONTS}
        has_serif = any(drawn[font] for font in _FONTS if not font.startswith(_SANS))
        folders = {font: _split_of(font, has_serif) for font in _FONTS if drawn[font]}
        samples = sorted(
            (f"{folders[font]}/{_name(character)}/{font}/{variant}", _name(character), font)
            for font in folders
            if wanted in (None, folders[font])
            for character in drawn[font]
            for variant in range(VARIANTS)
        )
        if task == "character":
            classes = {_name(character) for font in folders for character in drawn[font]}
        else:
            classes = set(folders)
        names = tuple(sorted(classes))
        index = {name: number for number, name in enumerate(names)}
        labels = [index[character if task == "character" else font] for _, character, font in samples]
        return Listing(KeyTable.from_strings(key for key, _, _ in samples), np.array(labels, np.int64), names)

    def encoded(self, key: str) -> bytes:
        """What is drawn, and the checksum of the font that draws it."""
        _, character, font, variant = key.split("/")
        recipe = {"font_crc32": _font_crc(str(self._folder), font), **jitter(character, font, int(variant))}
        return json.dumps(recipe, sort_keys=True).encode()

    def size(self, key: str) -> int:
        """Size of the recipe."""
        return len(self.encoded(key))

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """Draw the recipe."""
        try:
            return draw_glyph(str(self._folder), json.loads(encoded))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BadDataError(
                f"{self.path(key)}: damaged recipe: {error}", "Make the cache again."
            ) from error


def _font_folder() -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf"


def _name(character: str) -> str:
    return f"U+{ord(character):04X}"


def _split_of(font: str, has_serif: bool) -> str:
    held_out = not font.startswith(_SANS) if has_serif else "Bold" in font
    return "test" if held_out else "train"


@lru_cache
def _font_crc(folder: str, font: str) -> int:
    return zlib.crc32(read_bytes(Path(folder) / f"{font}.ttf"))


@lru_cache(maxsize=256)
def _font(folder: str, font: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: the other one depends on what else is installed.
    return ImageFont.truetype(str(Path(folder) / f"{font}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache
def drawable(folder: str, font: str, script: str) -> str:
    """The characters of a script that a font really draws, not as its box for missing ones."""
    loaded = _font(folder, font, 24)

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = loaded.getmask(character, mode="L")
        return mask.size, bytes(mask)

    missing = drawn(_NO_CHARACTER)
    return "".join(character for character in SCRIPTS[script] if drawn(character) != missing)


def jitter(name: str, font: str, variant: int) -> dict[str, Any]:
    """How one variant of a character is drawn.

    Args:
        name: the character, as ``U+0041``.
        font: file name without extension.
        variant: 0 to :data:`VARIANTS` - 1.

    Returns:
        Pixels per em, tenths of degrees, pixels of offset, gray levels; the ink is darker than the paper.
    """
    random = [int(word) for word in words(6, "glyph", name, font, str(variant))]
    return {
        "character": name,
        "font": font,
        "em": 36 + below(random[0], 13),
        "rotation": below(random[1], 241) - 120,
        "offset": [below(random[2], 9) - 4, below(random[3], 9) - 4],
        "ink": below(random[4], 96),
        "paper": 160 + below(random[5], 96),
    }


def draw_glyph(folder: str, recipe: dict[str, Any]) -> Image.Image:
    """Draw what :func:`jitter` describes, with a font of ``folder``, as an RGB image of side :data:`SIDE`."""
    character = chr(int(recipe["character"].removeprefix("U+"), 16))
    font = _font(folder, recipe["font"], recipe["em"])
    mask = Image.new("L", (SIDE, SIDE), 0)
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
    shift_x, shift_y = recipe["offset"]
    centred = ((SIDE - left - right) / 2 + shift_x, (SIDE - top - bottom) / 2 + shift_y)
    draw.text(centred, character, fill=255, font=font)
    mask = mask.rotate(recipe["rotation"] / 10, resample=Image.Resampling.BICUBIC)
    ink, paper = (Image.new("L", mask.size, recipe[name]) for name in ("ink", "paper"))
    return Image.composite(ink, paper, mask).convert("RGB")


GLYPHS = SourceKind(
    "characters of eight scripts, drawn in matplotlib's fonts",
    lambda opening: GlyphSource(opening.rest),
    tuple(SCRIPTS),
)
