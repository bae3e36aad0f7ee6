"""Random numbers of a number: the same of the same key on every device, in every process and piece of a step."""

from jaxtyping import Float, Int64
from torch import Tensor

_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
"""Of splitmix64: by how many bits it shifts, and what it multiplies by, as torch's signed integers."""
_LAST = 31
_BITS = 24
"""Of a float32's significand."""


def hashed(values: Int64[Tensor, "..."], seed: int, step: int) -> Int64[Tensor, "..."]:
    """splitmix64's hash (Steele et al. 2014) of (seed, step, value), which maps no two values to the same number."""
    mixed = values + _mixed_int(_mixed_int(seed) + step)
    for shift, factor in _MIX:
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, _LAST)


def uniform(values: Int64[Tensor, "..."], seed: int, step: int) -> Float[Tensor, "..."]:
    """A number in [0, 1) for each value: the first 24 bits of :func:`hashed`."""
    drawn: Tensor = _shifted(hashed(values, seed, step), 64 - _BITS).float() / 2**_BITS
    return drawn


def _shifted(values: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Shifted to the right as if without sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mixed_int(value: int) -> int:
    """The hash of one number, as a signed one: apart by one, starts would be almost the same values in turn."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in _MIX:
        value = (value ^ (value >> shift)) * factor % 2**64
    value ^= value >> _LAST
    return value - 2**64 if value >= 2**63 else value
