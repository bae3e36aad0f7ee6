"""torchvision's data sets: ``torch/NAME`` below the data root, ``torch//absolute/root/NAME``."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from kdcli.data.base import (
    ImageSource,
    Listing,
    Opening,
    SourceKind,
    numbered_listing,
    pick_split,
    pick_task,
    split_and_row,
)
from kdcli.data.decode import bad_image, pack_pixels, unpack_pixels
from kdcli.errors import MissingExtraError, NotFoundError, nearest

CLASS_TASK = "class"

_FLAG = {"train": {"train": True}, "test": {"train": False}}


def _named(*splits: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in splits}


def _samples(dataset: Any) -> list[int]:
    return [label for _, label in dataset._samples]


@final
@dataclass(frozen=True, slots=True)
class TorchSet:
    """How torchvision spells one of its data sets.

    Attributes:
        type_name: class in torchvision.datasets.
        splits: constructor arguments of each split.
        labels: reads all labels without decoding an image.
        classes: number of classes, where torchvision has no names for them.
    """

    type_name: str
    splits: Mapping[str, Mapping[str, Any]]
    labels: Callable[[Any], Any]
    classes: int | None = None


TORCH_SETS = {
    "cifar10": TorchSet("CIFAR10", _FLAG, lambda d: d.targets),
    "cifar100": TorchSet("CIFAR100", _FLAG, lambda d: d.targets),
    "mnist": TorchSet("MNIST", _FLAG, lambda d: d.targets),
    "fashion_mnist": TorchSet("FashionMNIST", _FLAG, lambda d: d.targets),
    "kmnist": TorchSet("KMNIST", _FLAG, lambda d: d.targets),
    "usps": TorchSet("USPS", _FLAG, lambda d: d.targets, 10),
    "svhn": TorchSet("SVHN", _named("train", "test", "extra"), lambda d: d.labels, 10),
    "stl10": TorchSet("STL10", _named("train", "test", "unlabeled"), lambda d: d.labels),
    "flowers102": TorchSet("Flowers102", _named("train", "val", "test"), lambda d: d._labels),
    "food101": TorchSet("Food101", _named("train", "test"), lambda d: d._labels),
    "dtd": TorchSet("DTD", _named("train", "val", "test"), lambda d: d._labels),
    "fgvc_aircraft": TorchSet("FGVCAircraft", _named("train", "val", "test"), lambda d: d._labels),
    "oxford_iiit_pet": TorchSet("OxfordIIITPet", _named("trainval", "test"), lambda d: d._labels),
    "stanford_cars": TorchSet("StanfordCars", _named("train", "test"), _samples),
    "gtsrb": TorchSet("GTSRB", _named("train", "test"), _samples, 43),
    "country211": TorchSet(
        "Country211",
        {n: {"split": s} for n, s in (("train", "train"), ("val", "valid"), ("test", "test"))},
        lambda d: d.targets,
    ),
    "eurosat": TorchSet("EuroSAT", {"all": {}}, lambda d: d.targets),
}


@final
class TorchSource(ImageSource):
    """One of :data:`TORCH_SETS`; keys are ``train/0000012``, numbered as torchvision does.

    Args:
        name: of the data set.
        root: absolute folder that torchvision calls root.
        download: let a listing download the splits it lists.
    """

    def __init__(self, name: str, root: Path, download: bool = False) -> None:
        self._name, self._root, self._download = name, root, download

    @classmethod
    def open(cls, opening: Opening) -> "TorchSource":
        """Open ``torch/REST``.

        Raises:
            NotFoundError: unknown name.
        """
        parent, slash, name = opening.rest.rpartition("/")
        name = name.lower().replace("-", "_")
        if name not in TORCH_SETS:
            raise NotFoundError(
                f"unknown data set 'torch/{opening.rest}'.{nearest(name, TORCH_SETS)}",
                f"Known: {', '.join(TORCH_SETS)}.",
            )
        folder = (opening.data_root or Path()) / (
            parent or slash
        )  # an absolute parent replaces the data root
        return cls(name, Path(os.path.normpath(folder.absolute())), opening.download)

    @property
    def text(self) -> str:
        """``torch//absolute/root/cifar10``."""
        return f"torch/{(self._root / self._name).as_posix()}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`; only the splits that are listed need to be there."""
        pick_task(task, (CLASS_TASK,), self.text)
        known = TORCH_SETS[self._name]
        wanted = [pick_split(split, tuple(known.splits), self.text)] if split else list(known.splits)
        if self._download:
            for name in wanted:
                _open(self._name, str(self._root), name, download=True)
        opened = {name: _split(self._name, str(self._root), name) for name in wanted}
        labels = {name: np.asarray(known.labels(dataset), np.int64) for name, dataset in opened.items()}
        rows = {name: np.arange(len(values)) for name, values in labels.items()}
        names = range(known.classes) if known.classes else opened[wanted[0]].classes
        return numbered_listing(rows, labels, split, tuple(str(name) for name in names), self.text)

    def encoded(self, key: str) -> bytes:
        """A short header and the pixels, as torchvision decodes them."""
        split, row = split_and_row(key)
        try:
            image = _split(self._name, str(self._root), split)[row][0]
        except (OSError, SyntaxError, ValueError) as error:  # torchvision decodes the files of some sets
            raise bad_image(self.path(key), str(error) or type(error).__name__) from error
        return pack_pixels(np.asarray(image if image.mode == "L" else image.convert("RGB")))

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """See :meth:`ImageSource.decode`."""
        return unpack_pixels(encoded, self.path(key))


@lru_cache
def _split(name: str, root: str, split: str) -> Any:
    """Torchvision's own object, once per process: sources, and so workers, carry only its name."""
    return _open(name, root, split, download=False)


def _open(name: str, root: str, split: str, download: bool) -> Any:
    """Let torchvision open (or download) one split.

    Raises:
        NotFoundError: it is not below ``root``, or the download failed.
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtraError(
            "torch/ needs torchvision, which is not installed", "pip install torchvision"
        ) from error
    known = TORCH_SETS[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints its narration to stdout
            return getattr(datasets, known.type_name)(root, download=download, **known.splits[split])
    except (OSError, RuntimeError, ValueError) as error:
        what = "cannot be downloaded to" if download else "is not (complete) below"
        raise NotFoundError(
            f"torch/{name}, split {split}, {what} {root}: {error}",
            "Give the folder that holds it with --data-root, or allow the download with --download.",
        ) from error


TORCH = SourceKind("torchvision's data sets, torch/NAME below --data-root", TorchSource.open)
