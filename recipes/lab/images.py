"""Images that are drawn when they are asked for, so that a recipe can be run and planned without data.

``lab.images:DRAWN/NAME/TRAINxTESTxCLASSES`` has TRAIN and TEST images of so many classes, each a colour of its own.
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
from kdcli.errors import UsageError

SIDE = 48


@final
class Drawn(ImageSource):
    """Noise around a colour near that of the class.

    Args:
        text: what opens it again, without modifiers.
        counts: images of each split.
        classes: how many.
    """

    def __init__(self, text: str, counts: dict[str, int], classes: int) -> None:
        self._text, self._counts, self._classes = text, counts, classes

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
        """A bitmap."""
        label = split_and_row(key)[1] % self._classes
        seed = zlib.crc32(f"{self._text}/{key}".encode())
        colour = np.random.Generator(np.random.Philox(label)).uniform(40, 215, 3)
        random = np.random.Generator(np.random.Philox(seed))
        own = colour + random.normal(0, 50, 3)  # classes overlap, or all scores would be equal
        noise = random.normal(0, 20, (SIDE, SIDE, 3))
        file = BytesIO()
        Image.fromarray((own + noise).clip(0, 255).astype(np.uint8)).save(file, "PPM")
        return file.getvalue()


def drawn(name: str, train: int, test: int, classes: int) -> str:
    """The source string of such a data set."""
    return f"lab.images:DRAWN/{name}/{train}x{test}x{classes}"


def _open(opening: Opening) -> Drawn:
    name, _, sizes = opening.rest.partition("/")
    numbers = sizes.split("x")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise UsageError(f"'{opening.rest}' says no sizes", "lab.images:DRAWN/NAME/TRAINxTESTxCLASSES")
    train, test, classes = map(int, numbers)
    if not classes and train + test:
        raise UsageError(
            f"'{opening.rest}' has images of no class", "lab.images:DRAWN/NAME/TRAINxTESTxCLASSES"
        )
    return Drawn(f"{opening.scheme}/{name}/{sizes}", {"train": train, "test": test}, classes)


DRAWN = SourceKind("images that are drawn, NAME/TRAINxTESTxCLASSES", _open)
