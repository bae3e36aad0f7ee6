"""Boxes in integers: the crops of views, and what is erased or cut out of them."""

import math
from collections.abc import Sequence

from kdcli.data.philox import below

UNIT = 1 << 16
"""Fixed-point numbers of view parameters count in 1 / UNIT, of the image's side where they are places."""

TRIES = 10
BOX_WORDS = 4 * TRIES
"""Raw words that :func:`random_box` reads."""

_FRACTION_BITS = 32
Box = tuple[int, int, int, int]
"""left, top, width, height."""


def random_box(
    scale: tuple[float, float], ratio: float, random: Sequence[int], width: int, height: int
) -> Box | None:
    """Torchvision's RandomResizedCrop (after Szegedy et al. 2015): ten tries to find a box that fits.

    The area's share is uniform, the ratio of the sides log-uniform. Sides are computed in integers from
    fixed-point numbers, so that the last bit of a platform's exp() does not matter.

    Args:
        scale: least and largest share of the area.
        ratio: largest ratio of width to height; the smallest is its inverse.
        random: :data:`BOX_WORDS` raw words.
        width: of the image, in any unit.
        height: likewise.

    Returns:
        A box inside the image; None where no try fitted.
    """
    one = 1 << _FRACTION_BITS
    least, largest = (round(bound * one) for bound in scale)
    for start in range(0, BOX_WORDS, 4):
        share_word, ratio_word, left_word, top_word = random[start : start + 4]
        share = least + below(share_word, largest - least + 1)
        sides = round(ratio ** (2 * (ratio_word >> 12) / (1 << 52) - 1) * one)
        area = width * height * share
        box_width = _rounded_root(area * sides, one * one)
        box_height = _rounded_root(area, sides)
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = below(left_word, width - box_width + 1), below(top_word, height - box_height + 1)
            return left, top, box_width, box_height
    return None


def centre_box(ratio: float, width: int, height: int) -> Box:
    """The largest box in the middle whose ratio of sides is at most ``ratio`` and at least its inverse."""
    box_width = min(width, math.floor(height * ratio + 0.5))
    box_height = min(height, math.floor(width * ratio + 0.5))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def in_pixels(box: Sequence[int], width: int, height: int) -> Box:
    """left, top, right, bottom in pixels of a box in 1 / :data:`UNIT` of an image's sides."""
    left, top, box_width, box_height = box
    edges = ((left, width), (top, height), (left + box_width, width), (top + box_height, height))
    x0, y0, x1, y1 = ((place * side + UNIT // 2) // UNIT for place, side in edges)
    return x0, y0, x1, y1


def _rounded_root(numerator: int, denominator: int) -> int:
    """round(sqrt(numerator / denominator)), exactly."""
    return (math.isqrt(4 * numerator // denominator) + 1) // 2
