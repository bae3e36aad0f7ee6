"""Encoded bytes become an RGB image, or an error that names the sample; never a traceback, never a guess."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import final

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from kdcli.data import jxl
from kdcli.data.formats import EXTRA, HEAD_BYTES, JPEG_XL, format_of, lacks, make_known
from kdcli.errors import BadDataError

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each of EXIF's orientations; 1 needs nothing."""
_RAW = b"kd-raw"


def decode_image(encoded: bytes, where: str, scale: int = 1) -> Image.Image:
    """Decode an image file: EXIF orientation applied, transparency on white, 16-bit gray scaled to 8.

    Args:
        encoded: the bytes of the file.
        where: what a person calls the sample, for the message.
        scale: of a JPEG, 2, 4 or 8: that many pixels a side become one as it is decoded, from fewer DCT coefficients.

    Raises:
        BadDataError: Pillow cannot decode it (truncated, no image, floats without a range, a format whose package is
            not installed, or more pixels than twice PIL.Image.MAX_IMAGE_PIXELS: 178,956,970).
    """
    with unreadable(encoded, where):
        image = open_image(encoded)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return to_rgb(image)


@contextmanager
def unreadable(encoded: bytes, where: str) -> Iterator[None]:
    """Whatever Pillow raises of some bytes, as what is wrong with the sample; its warnings are no news to a user.

    Raises:
        BadDataError: see :func:`decode_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, merely large images
            yield
    except UnidentifiedImageError as error:
        kind = format_of(encoded[:HEAD_BYTES])
        if kind is not None and lacks(kind):
            raise BadDataError(f"{where}: {kind}, which this installation cannot read", EXTRA) from error
        reason = "empty file" if not encoded else "not an image that Pillow can read"
        raise bad_image(where, reason) from error
    except Exception as error:  # foreign bytes make decoders raise anything: struct.error, SyntaxError, ...
        raise bad_image(where, str(error) or type(error).__name__) from error


def open_image(encoded: bytes) -> Image.Image:
    """What Pillow makes of an image file, with the packages that its format needs; pixels are not decoded yet."""
    kind = format_of(encoded[:HEAD_BYTES])
    if kind is not None:
        make_known(kind)
    if kind == JPEG_XL and (found := jxl.header(encoded)) is not None:
        _check_pixels(
            found[0] * found[1]
        )  # as Image.open does for the others; the plugin decodes as it opens
    return Image.open(BytesIO(encoded))


def _check_pixels(count: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and count > 2 * limit:
        raise Image.DecompressionBombError(f"{count} pixels; at most {2 * limit} are decoded")


def bad_image(where: str, reason: str) -> BadDataError:
    """The error for an image that cannot be used, with what to do about it."""
    return BadDataError(
        f"{where}: {reason}",
        "Replace or remove it. cache-teachers and train-student leave such images out with --bad-images drop; kd data "
        "check DATA --write-exclude FILE lists them for DATA@without=FILE.",
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image of any image.

    Raises:
        ValueError: the pixels are floats, whose range nobody knows.
    """
    image.load()
    orientation = orientation_of(image)
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's PNG, PGM and TIFF readers deliver 16-bit gray in these modes, in 0..65535.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    elif image.mode != "RGB":  # which convert() would copy
        image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def pixels_digest(image: Image.Image) -> int:
    """64 bits that tell an RGB image by its size and pixels."""
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest())


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """What an image file is, apart from its pixels.

    Attributes:
        mode: Pillow's name of its colours: RGB, L, P, CMYK, ...
        turned: whether its EXIF asks for a rotation or a mirror image.
        animated: whether it has more than one frame; only the first is ever used.
    """

    mode: str
    turned: bool
    animated: bool


def kind_of(encoded: bytes) -> Kind:
    """What an image file that can be decoded is; of pixels that are no file, their mode."""
    if encoded.startswith(_RAW):
        return Kind(encoded.split(b" ", 2)[1].decode(), turned=False, animated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(encoded)
        try:
            animated = bool(getattr(image, "is_animated", False))
        except Exception:  # a second frame that is broken, of which decoders raise anything
            animated = True
    return Kind(image.mode, stored_orientation(encoded) in UPRIGHT, animated)


def stored_orientation(encoded: bytes) -> int:
    """EXIF's orientation of an image file: by which :func:`decode_image` turns it; 1 where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(encoded)
            if image.format not in (
                "JPEG",
                "MPO",
            ):  # others know it, or have turned it themselves, once loaded
                image.load()
            return orientation_of(image)
    except Exception:  # decoding it says what is wrong
        return 1


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation of an image that is open, see :func:`stored_orientation`."""
    try:
        if image.format == "JXL" and not getattr(image, "jpeg", False):  # no JPEG that was packed as it is
            found = jxl.header(getattr(image, "fc", b""))
            if found is not None and found[2] != 1:  # its decoder has turned it
                return 1
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata must not cost a good image, and its reader raises anything
        return 1


def pack_pixels(pixels: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode an image that exists as an array only: a short header and the raw bytes."""
    mode = "L" if pixels.ndim == 2 else "RGB"
    height, width = pixels.shape[:2]
    return b"%s %s %d %d\n" % (_RAW, mode.encode(), width, height) + np.ascontiguousarray(pixels).tobytes()


def unpack_pixels(encoded: bytes, where: str) -> Image.Image:
    """Undo :func:`pack_pixels`, as RGB.

    Raises:
        BadDataError: these are not such bytes.
    """
    header, _, raw = encoded.partition(b"\n")
    if not header.startswith(_RAW):
        raise bad_image(where, "not a raw image")
    try:
        _, mode, width, height = header.split(b" ")
        return Image.frombytes(mode.decode(), (int(width), int(height)), raw).convert("RGB")
    except ValueError as error:
        raise bad_image(where, "damaged raw image") from error
