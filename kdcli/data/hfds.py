"""Hugging Face data sets (map-style): ``hfds/ORG/NAME``, or a local folder as ``hfds//absolute/folder``.

Opened from the local cache of the package ``datasets``; the hub is asked only with ``--download``. A folder
of that name below the data root comes first.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np

from kdcli.data.base import (
    ImageSource,
    Listing,
    Opening,
    SourceKind,
    numbered_listing,
    pick_task,
    split_and_row,
)
from kdcli.data.decode import bad_image
from kdcli.data.formats import IMAGE_BYTES
from kdcli.errors import BadDataError, MissingExtraError, NotFoundError
from kdcli.reading import read_bytes

_NO_TASK = "class"


@final
class HubSource(ImageSource):
    """A ``datasets.DatasetDict``; keys are ``train/0000012``, numbered by row.

    Args:
        name: what reopens it: a hub name or an absolute folder.
        splits: the memory-mapped splits, images left encoded.
        image_column: name of the column of images.
        tasks: label columns and the names of their classes.
    """

    def __init__(
        self, name: str, splits: dict[str, Any], image_column: str, tasks: dict[str, tuple[str, ...]]
    ) -> None:
        self._name, self._splits, self._image_column, self._tasks = name, splits, image_column, tasks

    @classmethod
    def open(cls, opening: Opening) -> "HubSource":
        """Open ``hfds/REST``.

        Raises:
            MissingExtraError: the package ``datasets`` is not installed.
            NotFoundError: no such data set here.
            BadDataError: it has no column of images.
        """
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError(
                "hfds/ needs the package datasets, which is not installed", "pip install 'kdcli[datasets]'"
            ) from error
        rest = opening.rest
        local = (opening.data_root or Path()) / rest
        name = os.path.normpath(local.absolute()) if local.is_dir() else rest
        loaded = _load(datasets, name, opening.download)
        features = next(iter(loaded.values())).features
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images:
            held = [column for column, kind in features.items() if _may_be_images(kind)]
            raise BadDataError(
                f"hfds/{rest} has no column of images; its columns are {', '.join(features)}",
                f"Its column '{held[0]}' holds bytes that nothing calls images. Call them so once, in Python: "
                f'datasets.load_dataset(...).cast_column("{held[0]}", datasets.Image()), then to_parquet.'
                if held
                else "Give a data set with images, or a folder of image files.",
            )
        tasks = {
            column: tuple(kind.names)
            for column, kind in features.items()
            if isinstance(kind, datasets.ClassLabel)
        }
        first = sorted(tasks, key=lambda column: column not in ("label", "labels", "fine_label"))
        encoded = {
            split: rows.cast_column(images[0], datasets.Image(decode=False)) for split, rows in loaded.items()
        }
        return cls(name, encoded, images[0], {column: tasks[column] for column in first})

    @property
    def text(self) -> str:
        """``hfds/org/name`` or ``hfds//absolute/folder``."""
        return f"hfds/{self._name}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        column = pick_task(task, tuple(self._tasks) or (_NO_TASK,), self.text)
        labels = {
            name: np.array([-1 if value is None else value for value in rows[column]], np.int64)
            if self._tasks
            else np.full(len(rows), -1)
            for name, rows in self._splits.items()
        }
        rows = {name: np.arange(len(values)) for name, values in labels.items()}
        listing = numbered_listing(rows, labels, split, self._tasks.get(column), self.text)
        return listing if self._tasks else replace(listing, notes=(self._no_labels(),))

    def _no_labels(self) -> str:
        columns = ", ".join(next(iter(self._splits.values())).features)
        return (
            f"{self.text} is used without labels: none of its columns ({columns}) is a ClassLabel; for labels, unpack "
            "it to CLASS/NAME.jpg, or cast the column to datasets.ClassLabel and write it with to_parquet"
        )

    def encoded(self, key: str) -> bytes:
        """The bytes of the image file that the row holds or names."""
        split, row = split_and_row(key)
        cell = self._splits[split][row][self._image_column]
        if cell is None:
            raise bad_image(self.path(key), "the row has no image")
        held: bytes | None = cell["bytes"]
        if held is not None:
            return held
        try:
            return read_bytes(Path(cell["path"]), IMAGE_BYTES)
        except OSError as error:
            raise bad_image(self.path(key), f"{cell['path']}: {error.strerror or error}") from error
        except BadDataError as error:
            raise bad_image(self.path(key), error.message) from error


def _may_be_images(kind: Any) -> bool:
    """Whether a column holds bytes, or what an image is stored as: ``{"bytes": ..., "path": ...}``."""
    return getattr(kind, "dtype", None) in ("binary", "large_binary") or (
        isinstance(kind, dict) and "bytes" in kind
    )


def _load(datasets: Any, name: str, download: bool) -> dict[str, Any]:
    datasets.disable_progress_bars()  # they draw on log files, too
    try:
        with contextlib.nullcontext() if download else _offline(datasets):
            return dict(datasets.load_dataset(name))
    except Exception as error:  # the package raises anything: its own, the hub's and the network's errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NotFoundError(
            f"hfds/{name} cannot be had{'' if download else ' from the local cache'}: {reason}",
            "Check the name, or allow the download with --download.",
        ) from error


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """HF_HUB_OFFLINE=1 for the time of the block; both packages read the variable only when imported."""
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


HFDS = SourceKind("Hugging Face data sets, hfds/ORG/NAME", HubSource.open)
