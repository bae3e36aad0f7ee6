"""A few pixels of fixed images: they show whether another installation draws as the recorded one did."""

import numpy as np
from jaxtyping import UInt8

from kdcli.console import console
from kdcli.errors import Advice, IdentityError
from kdcli.types import Difference

PIXEL_TOLERANCE = 2
"""Largest difference, in steps of 1/255, that another version of a library may make to a pixel."""


def pixel_drift(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """Largest difference between two pixel fingerprints, in steps of 1/255; 255 for unequal sizes."""
    if len(old) != len(new):
        return 255
    if not old:
        return 0
    return int(np.abs(np.asarray(old, np.int16) - np.asarray(new, np.int16)).max())


def require_same_pixels(recorded: tuple[int, ...], now: tuple[int, ...], where: object) -> None:
    """Refuse to replay views that this installation draws differently; say a small drift.

    Args:
        recorded: a few pixels of the views of fixed images, as the cache was made.
        now: the same, as they are drawn here.
        where: the cache, for messages.

    Raises:
        IdentityError: they are more than :data:`PIXEL_TOLERANCE` steps apart.
    """
    drift = pixel_drift(recorded, now)
    if drift > PIXEL_TOLERANCE:
        raise IdentityError(
            f"{where}: this installation draws the training views differently",
            Advice("other-pixels"),
            [Difference("views.pixels", "recorded pixels", f"up to {drift}/255 apart")],
        )
    if drift:
        console.warn(
            f"{where}: this installation draws training views up to {drift}/255 apart from the recorded"
        )


def as_pixels(fingerprint: UInt8[np.ndarray, " k"]) -> tuple[int, ...]:
    """A pixel fingerprint as JSON integers."""
    return tuple(int(value) for value in fingerprint)
