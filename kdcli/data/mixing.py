"""MixUp and CutMix: a view of an image and the same view of a partner, in one picture.

The partner is a row of the cached data set and the share an integer, both recorded, so a teacher and a
student see the same mixture. Pixels are mixed in integers: no library computes them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, final

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, with_config

from kdcli.data.boxes import UNIT, in_pixels
from kdcli.data.philox import WORD, below
from kdcli.data.stages import STRICT, Share

NO_PARTNER = -1

Pixels = UInt8[np.ndarray, "*t h w 3"]
Alpha = Annotated[float, Field(ge=0.1, le=10, strict=True)]
"""Of the Beta distribution; outside this range shares are as good as 0, 1/2 or 1."""


class Mixing(ABC):
    """How two pictures become one. Its first two columns are ``partner`` and ``lam``."""

    __slots__ = ()

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Its columns of view parameters."""

    @property
    @abstractmethod
    def neutral(self) -> tuple[int, ...]:
        """Parameters of a picture that is not mixed."""

    @property
    @abstractmethod
    def word_count(self) -> int:
        """Raw words that :meth:`sample` reads."""

    @abstractmethod
    def sample(self, random: Sequence[int], pool: range) -> tuple[int, ...]:
        """Parameters from :attr:`word_count` raw words; the partner is one of the rows ``pool``."""

    @abstractmethod
    def blend(self, own: Pixels, other: Pixels, values: Sequence[int]) -> Pixels:
        """The mixture of two pictures of equal size."""


def beta(alpha: float, size_word: int, angle_word: int) -> int:
    """A share in 1 / UNIT, from 0 to UNIT, of distribution Beta(alpha, alpha).

    Devroye's one-line method for symmetric beta variates (Random variate generation in one line of code,
    WSC 1996): no rejection, so always the same two words.
    """
    size = ((size_word >> 12) + 0.5) / (1 << 52)
    angle = ((angle_word >> 12) + 0.5) / (1 << 52)
    spread = (size ** (-1 / alpha) - 1) * math.cos(2 * math.pi * angle) ** 2
    # The last bit of the word is not part of the angle, so it can be the sign.
    sign = 1 if angle_word & 1 else -1
    return round((1 + sign * math.sqrt(spread / (1 + spread))) * UNIT / 2)


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class MixUp(Mixing):
    """MixUp (Zhang et al. 2018): a weighted mean of the pixels.

    Attributes:
        alpha: the weight's distribution is Beta(alpha, alpha).
        probability: of mixing at all.
    """

    alpha: Alpha = 0.2
    probability: Share = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Row of the partner and the image's own weight in 1 / UNIT."""
        return ("partner", "lam")

    @property
    def neutral(self) -> tuple[int, ...]:
        """No partner."""
        return (NO_PARTNER, UNIT)

    @property
    def word_count(self) -> int:
        """Whether, with whom, and two for the weight."""
        return 4

    def sample(self, random: Sequence[int], pool: range) -> tuple[int, ...]:
        """See :class:`Mixing`."""
        if random[0] >= int(self.probability * WORD):
            return self.neutral
        return pool[below(random[1], len(pool))], beta(self.alpha, random[2], random[3])

    def blend(self, own: Pixels, other: Pixels, values: Sequence[int]) -> Pixels:
        """``lam own + (1 - lam) other``, rounded to the nearest integer."""
        mixed = own.astype(np.int32) * values[1] + other.astype(np.int32) * (UNIT - values[1])
        return ((mixed + UNIT // 2) // UNIT).astype(np.uint8)


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class CutMix(Mixing):
    """CutMix (Yun et al. 2019): a box of the partner pasted over the same place of the image.

    Attributes:
        alpha: the distribution of the uncut share is Beta(alpha, alpha), before the box is clipped.
        probability: of mixing at all.
    """

    alpha: Alpha = 1.0
    probability: Share = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Row of the partner, the area's share that is left in 1 / UNIT, the box in 1 / UNIT of the sides."""
        return ("partner", "lam", "cut_left", "cut_top", "cut_width", "cut_height")

    @property
    def neutral(self) -> tuple[int, ...]:
        """No partner, no box."""
        return (NO_PARTNER, UNIT, 0, 0, 0, 0)

    @property
    def word_count(self) -> int:
        """Whether, with whom, two for the share and two for the box's centre."""
        return 6

    def sample(self, random: Sequence[int], pool: range) -> tuple[int, ...]:
        """See :class:`Mixing`; ``lam`` is what is left once the box is clipped to the image."""
        if random[0] >= int(self.probability * WORD):
            return self.neutral
        half = math.isqrt((UNIT - beta(self.alpha, random[2], random[3])) * UNIT) // 2
        centres = [below(word, UNIT + 1) for word in random[4:6]]
        left, top = (max(0, centre - half) for centre in centres)
        width, height = (
            min(UNIT, centre + half) - first for centre, first in zip(centres, (left, top), strict=True)
        )
        lam = UNIT - (width * height + UNIT // 2) // UNIT
        return pool[below(random[1], len(pool))], lam, left, top, width, height

    def blend(self, own: Pixels, other: Pixels, values: Sequence[int]) -> Pixels:
        """The partner's pixels in the box, the image's own elsewhere."""
        left, top, right, bottom = in_pixels(values[2:], own.shape[1], own.shape[0])
        mixed = own.copy()
        mixed[top:bottom, left:right] = other[top:bottom, left:right]
        return mixed
