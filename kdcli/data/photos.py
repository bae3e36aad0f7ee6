"""``--decode scaled``: large JPEG photos decoded with no more pixels than what is drawn of them needs.

libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its sides from the lower coefficients of each block alone. What is drawn
of a photo is drawn of the smallest of these that has at least :data:`MARGIN` times the pixels a side that are wanted;
where none has, of the photo itself. The scale follows from the box and from the size it is resized to, nothing else:
a view is the same whatever is drawn beside it. Boxes stay in pixels of the whole photo.
"""

from math import ceil, floor
from typing import Final, final

from PIL import Image

from kdcli.data.boxes import Box
from kdcli.data.clips import Clip
from kdcli.data.decode import decode_image, open_image, orientation_of, unreadable

SCALES: Final = (8, 4, 2)
"""What libjpeg can divide sides by, the coarsest first."""
MARGIN: Final = 2
"""Least number of decoded pixels a side for each that is drawn of them."""
_SWAPPED, _FROM_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF's orientations whose upright image has width and height swapped, or begins at the stored one's far edge."""

FloatBox = tuple[float, float, float, float]
"""left, top, right, bottom."""


def scale_for(box: Box, size: tuple[int, int]) -> int:
    """What sides may be divided by where a box is resized to ``size`` (width, height); 1 where by nothing.

    Args:
        box: in pixels of the whole photo.
        size: in pixels, of all that the box is resized to.
    """
    shares = (side // (MARGIN * wanted) for side, wanted in zip(box[2:], size, strict=True))
    most = min(shares)
    return next((scale for scale in SCALES if scale <= most), 1)


@final
class Photo:
    """A JPEG that is decoded when something is drawn of it, once at each scale.

    Attributes:
        size: width and height of the whole upright photo, in pixels.
    """

    def __init__(self, encoded: bytes, where: str, size: tuple[int, int], orientation: int) -> None:
        self._encoded, self._where, self._orientation = encoded, where, orientation
        self.size = size[::-1] if orientation in _SWAPPED else size
        self._decoded: dict[int, Image.Image] = {}

    def load(self) -> None:
        """Decode something of it, if nothing was yet.

        Raises:
            BadDataError: see :func:`~kdcli.data.decode.decode_image`.
        """
        if not self._decoded:
            self.at(next((scale for scale in SCALES if scale <= min(self.size)), 1))

    def at(self, scale: int) -> Image.Image:
        """The upright RGB photo with its sides divided by ``scale``, rounded up.

        Args:
            scale: 1, or one of :data:`SCALES` that is no longer than a side.

        Raises:
            BadDataError: as :meth:`load` does.
        """
        if scale not in self._decoded:
            self._decoded[scale] = decode_image(self._encoded, self._where, scale)
        return self._decoded[scale]

    def cut(self, box: Box, size: tuple[int, int]) -> tuple[Image.Image, FloatBox]:
        """What a box is drawn of where it is resized to ``size``: the decoded pixels it touches, its place in them.

        Raises:
            BadDataError: as :meth:`load` does.
        """
        scale = scale_for(box, size)
        image = self.at(scale)
        edges: list[tuple[float, float]] = []
        for axis, turned in ((0, _FROM_RIGHT), (1, _FROM_BELOW)):
            # The last decoded pixel may reach beyond the photo; upright, it may be the first one.
            before = -self.size[axis] % scale if self._orientation in turned else 0
            start = (box[axis] + before) / scale
            edges.append((start, start + box[2 + axis] / scale))
        (left, right), (top, bottom) = edges
        x, y = floor(left), floor(top)
        return image.crop((x, y, ceil(right), ceil(bottom))), (left - x, top - y, right - x, bottom - y)


Still = Image.Image | Photo
"""An upright RGB image, decoded whole or as far as is needed."""
Picture = Still | Clip
"""What views are drawn of: an image, or frames that are all drawn alike."""


def open_photo(encoded: bytes, where: str) -> Picture:
    """An image file for ``--decode scaled``: a JPEG is decoded when it is drawn, anything else at once.

    Raises:
        BadDataError: see :func:`~kdcli.data.decode.decode_image`.
    """
    with unreadable(encoded, where):
        image = open_image(encoded)
        if image.format in ("JPEG", "MPO"):
            return Photo(encoded, where, image.size, orientation_of(image))
    return decode_image(encoded, where)
