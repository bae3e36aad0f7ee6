"""Images that are drawn when they are asked for, so that a recipe can be run and planned without data.

``lab.images:DRAWN/NAME/TRAINxTESTxCLASSES`` has TRAIN and TEST images of so many classes, each a colour of its own;
``TRAINxTESTxCLASSESxFRAMES`` has clips of so many frames.
"""

import zlib
from io import BytesIO
from typing import final

import numpy as np
from PIL import Image

from kdcli.data.base import (
    ImageSource,
    Listing,
    Opening,
    SourceKind,
    numbered_listing,
    pick_task,
    split_and_row,
)
from kdcli.data.clips import open_clip, pack_frames
from kdcli.data.photos import Picture
from kdcli.errors import UsageError
from kdcli.types import DecodeMode

SIDE = 48
_FORM = "lab.images:DRAWN/NAME/TRAINxTESTxCLASSES, of clips TRAINxTESTxCLASSESxFRAMES"


@final
class Drawn(ImageSource):
    """Noise around a colour near that of the class.

    Args:
        text: what opens it again, without modifiers.
        counts: images of each split.
        classes: how many.
        frames: of each clip; 0: they are images.
    """

    def __init__(self, text: str, counts: dict[str, int], classes: int, frames: int = 0) -> None:
        self._text, self._counts, self._classes, self._frames = text, counts, classes, frames
        self.clips = bool(frames)

    @property
    def text(self) -> str:
        """See :class:`ImageSource`."""
        return self._text

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        pick_task(task, ("class",), self._text)
        rows = {name: np.arange(count) for name, count in self._counts.items()}
        labels = {name: numbers % self._classes for name, numbers in rows.items()}
        return numbered_listing(rows, labels, split, tuple(map(str, range(self._classes))), self._text)

    def encoded(self, key: str) -> bytes:
        """A bitmap, or those of all frames."""
        label = split_and_row(key)[1] % self._classes
        seed = zlib.crc32(f"{self._text}/{key}".encode())
        colour = np.random.Generator(np.random.Philox(label)).uniform(40, 215, 3)
        random = np.random.Generator(np.random.Philox(seed))
        own = colour + random.normal(0, 50, 3)  # classes overlap, or all scores would be equal
        bitmaps = [_bitmap(own + random.normal(0, 20, (SIDE, SIDE, 3))) for _ in range(self._frames or 1)]
        return pack_frames(bitmaps) if self.clips else bitmaps[0]

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """See :meth:`ImageSource.decode`."""
        return open_clip(encoded, key).strip() if self.clips else super().decode(key, encoded)

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """See :meth:`ImageSource.picture`."""
        return open_clip(encoded, key) if self.clips else super().picture(key, encoded, how)


def _bitmap(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PPM")
    return file.getvalue()


def drawn(name: str, train: int, test: int, classes: int, frames: int = 0) -> str:
    """The source string of such a data set; with frames, of clips."""
    return f"lab.images:DRAWN/{name}/{train}x{test}x{classes}" + (f"x{frames}" if frames else "")


def _open(opening: Opening) -> Drawn:
    name, _, sizes = opening.rest.partition("/")
    numbers = sizes.split("x")
    if len(numbers) not in (3, 4) or not all(number.isdigit() for number in numbers):
        raise UsageError(f"'{opening.rest}' says no sizes", _FORM)
    train, test, classes, *frames = map(int, numbers)
    if not classes and train + test:
        raise UsageError(f"'{opening.rest}' has images of no class", _FORM)
    return Drawn(f"{opening.scheme}/{name}/{sizes}", {"train": train, "test": test}, classes, *frames)


DRAWN = SourceKind("images or clips that are drawn, NAME/TRAINxTESTxCLASSES[xFRAMES]", _open)
