"""RandAugment and AutoAugment: a list of operations, each with a magnitude.

The operations, their ranges and their policies are torchvision's (``transforms.v2``, nearest-neighbour
sampling); Pillow computes the pixels. Places and shifts are shares of the image's sides, so a view is the
same in every input size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from math import ceil
from typing import Annotated, Any, Literal, final

from PIL import Image, ImageEnhance, ImageOps
from pydantic import AfterValidator, BeforeValidator, Field, with_config

from kdcli.data.boxes import UNIT
from kdcli.data.philox import WORD, below
from kdcli.data.stages import STRICT, Fill, Stage


class Op(IntEnum):
    """Numbers of the operations, as they are recorded; they never change."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14


_LARGEST = {
    Op.SHEAR_X: Fraction(3, 10),
    Op.SHEAR_Y: Fraction(3, 10),
    Op.TRANSLATE_X: Fraction(150, 331),
    Op.TRANSLATE_Y: Fraction(150, 331),
    Op.ROTATE: Fraction(30),
    Op.BRIGHTNESS: Fraction(9, 10),
    Op.COLOR: Fraction(9, 10),
    Op.CONTRAST: Fraction(9, 10),
    Op.SHARPNESS: Fraction(9, 10),
}
"""Operations with a sign: tangent, share of the side, degrees, or change of a factor of 1."""


def magnitude(op: Op, strength: Fraction, negative: bool) -> int:
    """The recorded magnitude of an operation.

    Args:
        op: which.
        strength: from 0 (nothing or little) to 1 (torchvision's largest).
        negative: the other direction, where the operation has one.

    Returns:
        1 / UNIT of the quantity in :data:`_LARGEST`; posterize: bits kept; solarize: the least level that
        is inverted; 0 for operations without a magnitude.
    """
    if op in _LARGEST:
        # Rounded up, so that a shift of a whole number of pixels stays one.
        size = ceil(_LARGEST[op] * strength * UNIT)
        return -size if negative else size
    if op is Op.POSTERIZE:
        return round(8 - 4 * strength)
    return ceil(255 * (1 - strength)) if op is Op.SOLARIZE else 0


# --- pixels -----------------------------------------------------------------------------------


def apply_op(image: Image.Image, op: Op, value: int, fill: Fill) -> Image.Image:
    """One operation on an RGB image.

    Args:
        image: of any size.
        op: which.
        value: see :func:`magnitude`.
        fill: what comes in from outside the image.
    """
    amount = value / UNIT
    match op:
        case Op.SHEAR_X:
            return _affine(image, (1, amount, 0, 0, 1, 0), fill)
        case Op.SHEAR_Y:
            return _affine(image, (1, 0, 0, amount, 1, 0), fill)
        case Op.TRANSLATE_X:
            return _affine(image, (1, 0, -_pixels(value, image.width), 0, 1, 0), fill)
        case Op.TRANSLATE_Y:
            return _affine(image, (1, 0, 0, 0, 1, -_pixels(value, image.height)), fill)
        case Op.ROTATE:
            return image.rotate(amount, Image.Resampling.NEAREST, fillcolor=fill)
        case Op.POSTERIZE:
            return ImageOps.posterize(image, value)
        case Op.SOLARIZE:
            return ImageOps.solarize(image, value)
        case Op.BRIGHTNESS | Op.COLOR | Op.CONTRAST | Op.SHARPNESS:
            return _ENHANCERS[op](image).enhance(1 + amount)  # type: ignore[no-any-return]
        case _:
            return _WHOLE[op](image)


_ENHANCERS: dict[Op, Callable[[Image.Image], Any]] = {
    Op.BRIGHTNESS: ImageEnhance.Brightness,
    Op.COLOR: ImageEnhance.Color,
    Op.CONTRAST: ImageEnhance.Contrast,
    Op.SHARPNESS: ImageEnhance.Sharpness,
}
_WHOLE: dict[Op, Callable[[Image.Image], Image.Image]] = {
    Op.IDENTITY: lambda image: image,
    Op.AUTO_CONTRAST: ImageOps.autocontrast,
    Op.EQUALIZE: ImageOps.equalize,
    Op.INVERT: ImageOps.invert,
}


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill
    )


def _pixels(share: int, side: int) -> int:
    """A shift in whole pixels, towards zero like torchvision's."""
    shift = abs(share) * side // UNIT
    return shift if share >= 0 else -shift


# --- policies ---------------------------------------------------------------------------------


class Policy(Stage):
    """Operations in a row; op 0 does nothing."""

    __slots__ = ()

    def apply(self, image: Image.Image, values: Sequence[int], fill: Fill) -> Image.Image:
        """See :class:`~kdcli.data.stages.Stage`."""
        for op, value in zip(values[::2], values[1::2], strict=True):
            image = apply_op(image, Op(op), value, fill)
        return image


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in range(1, count + 1) for name in ("op", "magnitude"))


def _both(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _ordered(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first bound is above the second")
    return bounds


_STEPS = 30
_Step = Annotated[int, Field(ge=0, le=_STEPS, strict=True)]


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class RandAugment(Policy):
    """RandAugment (Cubuk et al. 2019): ``n`` operations, each one of fourteen.

    Attributes:
        n: how many.
        m: least and largest strength, 0 to 30; every operation draws its own. A lone number is both.
    """

    n: Annotated[int, Field(ge=1, le=8, strict=True)] = 2
    m: Annotated[tuple[_Step, _Step], AfterValidator(_ordered), BeforeValidator(_both)] = (9, 9)

    @property
    def names(self) -> tuple[str, ...]:
        """An operation and its magnitude, n times."""
        return _names(self.n)

    @property
    def neutral(self) -> tuple[int, ...]:
        """Nothing, n times."""
        return (0, 0) * self.n

    @property
    def word_count(self) -> int:
        """Operation, strength and sign, n times."""
        return 3 * self.n

    def sample(self, random: Sequence[int]) -> tuple[int, ...]:
        """See :class:`~kdcli.data.stages.Stage`."""
        values: list[int] = []
        for start in range(0, 3 * self.n, 3):
            which, strength, sign = random[start : start + 3]
            op = Op(below(which, Op.INVERT))  # torchvision's RandAugment has all but the last one
            step = self.m[0] + below(strength, self.m[1] - self.m[0] + 1)
            values += (op, magnitude(op, Fraction(step, _STEPS), bool(below(sign, 2))))
        return tuple(values)


_Step9 = tuple[Op, float, int]
_IMAGENET: tuple[tuple[_Step9, _Step9], ...] = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 0), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 0), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.0, 0), (Op.EQUALIZE, 0.8, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 0)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
)
"""AutoAugment's policy for ImageNet, as torchvision has it: operation, probability, strength of 9."""


@final
@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class AutoAugment(Policy):
    """AutoAugment (Cubuk et al. 2018): one of 25 pairs of operations.

    Attributes:
        policy: the data set that it was searched on.
    """

    policy: Literal["imagenet"] = "imagenet"

    @property
    def names(self) -> tuple[str, ...]:
        """Two operations and their magnitudes."""
        return _names(2)

    @property
    def neutral(self) -> tuple[int, ...]:
        """Nothing, twice."""
        return (0, 0, 0, 0)

    @property
    def word_count(self) -> int:
        """One for the pair; whether and sign for each of the two."""
        return 5

    def sample(self, random: Sequence[int]) -> tuple[int, ...]:
        """See :class:`~kdcli.data.stages.Stage`."""
        values: list[int] = []
        pair = _IMAGENET[below(random[0], len(_IMAGENET))]
        for (op, probability, step), whether, sign in zip(pair, random[1::2], random[2::2], strict=True):
            applied = whether < int(probability * WORD)
            values += (
                (op, magnitude(op, Fraction(step, 9), bool(below(sign, 2)))) if applied else (Op.IDENTITY, 0)
            )
        return tuple(int(value) for value in values)
