"""Pixels of one image: its box of a training view, and what a model's evaluation shows of it."""

from io import BytesIO
from typing import Final

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from kdcli.data.boxes import Box
from kdcli.data.clips import Clip, shown_moments
from kdcli.data.photos import Photo, Picture, Still
from kdcli.geometry import Render
from kdcli.types import Interpolation

Params = Int32[np.ndarray, " w"]
"""Parameters of a view, the first columns :data:`PARAM_NAMES`."""
PARAM_NAMES = ("left", "top", "width", "height", "flip", "source_width", "source_height")
"""First columns of view parameters: the box in source pixels, 0 or 1, the size of the upright source image.
View 0 has no box of its own (0, 0, 0, 0): every model sees its evaluation geometry there."""
NO_BOX: Final = (0, 0, 0, 0)
_LARGEST = 1 << 24
"""Pixels that a resized image may have before it is cropped."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def render(
    image: Still, params: Params, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw what every training view begins with: crop its box, resize that with antialiasing, then mirror it.

    Args:
        image: the upright RGB source image that ``params`` were made for.
        params: at least :data:`PARAM_NAMES`; more columns do not matter.
        size: (height, width) in pixels of the result.
        interpolation: resampling filter.
    """
    left, top, width, height, flip = (int(value) for value in params[:5])
    pixels = np.asarray(
        _resized(image, (left, top, width, height), (size[1], size[0]), _RESAMPLING[interpolation])
    )
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else np.array(pixels)


def _resized(image: Still, box: Box, size: tuple[int, int], kind: Image.Resampling) -> Image.Image:
    """A box of an image, resized to ``size`` (width, height)."""
    # Cropped first, as torchvision does: resize(box=...) alone would let the filter see pixels outside the box.
    if isinstance(image, Photo):
        cut, place = image.cut(box, size)
        return cut.resize(size, kind, place)
    return _cropped(image, box).resize(size, kind)


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    left, top, width, height = box
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def has_box(params: Params) -> bool:
    """Whether a view has a box of its own: all but view 0 have."""
    return bool(params[2])


def show(image: Picture, target: Render) -> UInt8[np.ndarray, "*t h w 3"]:
    """Draw view 0: an image as a model's evaluation shows it, bit by bit as timm does: resized, then cropped.

    Args:
        image: the upright RGB source image; of a clip, frames from its whole length are drawn so.
        target: the model's.
    """
    if isinstance(image, Clip):
        frames = image.at(shown_moments(image.frames, target.frames, target.clips))
        return np.stack([show(frame, target) for frame in frames])
    (height, width), fit = target.sides, target.fit(*image.size)
    (left, top), (wide, tall) = fit.window, fit.resized
    kind = _RESAMPLING[target.interpolation]
    seen = (max(left, 0), max(top, 0), min(left + width, wide), min(top + height, tall))
    if wide * tall > _LARGEST:
        whole = image.at(1) if isinstance(image, Photo) else image
        found = _in_strips(_cropped(whole, fit.box), (wide, tall), seen, kind)
    else:
        found = _resized(image, fit.box, (wide, tall), kind).crop(seen)
    if found.size != (width, height):
        canvas = Image.new("RGB", (width, height), target.fill)
        canvas.paste(found, (max(-left, 0), max(-top, 0)))
        found = canvas
    return np.array(found)


def _in_strips(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    kind: Image.Resampling,
) -> Image.Image:
    """Resize and crop an image whose one side is many times the other, never holding the whole result.

    Columns, then rows, as Pillow does where it enlarges; an own order elsewhere changes roundings only.
    """
    (wide, tall), (left, top, right, bottom) = size, box
    columns = image.resize((wide, image.height), kind).crop((left, 0, right, image.height))
    found = Image.new("RGB", (right - left, bottom - top))
    step = max(1, _LARGEST // tall)
    for start in range(0, right - left, step):
        strip = columns.crop((start, 0, min(start + step, right - left), columns.height))
        found.paste(strip.resize((strip.width, tall), kind).crop((0, top, strip.width, bottom)), (start, 0))
    return found


def fixed_images() -> list[Image.Image]:
    """Two images, wide and tall, that are the same everywhere."""
    images = []
    for number, (width, height) in enumerate(((97, 61), (40, 56))):
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pattern = np.stack([x * 5 + y, x * y // 3, (x // 4 + y // 4) % 2 * 200 + number], axis=-1) % 256
        images.append(Image.fromarray(pattern.astype(np.uint8)))
    return images


def fixed_photo() -> Photo:
    """The first of them as a JPEG, to be decoded at any scale."""
    file, (image, _) = BytesIO(), fixed_images()
    image.save(file, "JPEG", quality=90)
    return Photo(file.getvalue(), "a fixed image", image.size, orientation=1)


def fingerprint(target: Render) -> UInt8[np.ndarray, " k"]:
    """What this installation draws of two fixed images: tells when a library changes pixels.

    Returns:
        An 8 x 8 grid of pixels of a training view and of view 0 of each image, flattened.
    """
    parts = []
    for number, image in enumerate(fixed_images()):
        width, height = image.size
        box = np.array([1, 2, width - 3, height - 4, number, width, height], np.int32)
        rows = np.linspace(0, target.sides[0] - 1, 8).astype(int)
        columns = np.linspace(0, target.sides[1] - 1, 8).astype(int)
        for pixels in (render(image, box, target.sides, target.interpolation), show(image, target)):
            parts.append(pixels[np.ix_(rows, columns)].ravel())
    return np.concatenate(parts)
