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
from jaxtyping import Int64

from kdcli.console import counted
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
from kdcli.data.tables import (
    LABEL_COLUMNS,
    NAMES,
    label_text,
    listed_columns,
    named,
    names_asked,
    numbered,
    pick_column,
)
from kdcli.errors import BadDataError, MissingExtraError, NotFoundError
from kdcli.reading import read_bytes

_FIRST = ("label", "labels", "fine_label")


@final
class HubSource(ImageSource):
    """A ``datasets.DatasetDict``; keys are ``train/0000012``, numbered by row.

    Args:
        name: what reopens it: a hub name or an absolute folder.
        splits: the memory-mapped splits, images left encoded.
        image_column: name of the column of images.
        options: the modifiers of :data:`HFDS` that were given.
    """

    def __init__(self, name: str, splits: dict[str, Any], image_column: str, options: dict[str, str]) -> None:
        self._name, self._splits, self._image_column, self._options = name, splits, image_column, options

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
        encoded = {
            split: rows.cast_column(images[0], datasets.Image(decode=False)) for split, rows in loaded.items()
        }
        return cls(name, encoded, images[0], dict(opening.options))

    @property
    def text(self) -> str:
        """``hfds/org/name`` or ``hfds//absolute/folder``."""
        return f"hfds/{self._name}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`; a task is a column."""
        columns = [name for name in self._features if name != self._image_column]
        column = self._usual(columns) if task is None else pick_task(task, columns or ("",), self.text)
        if column is None:
            bare = {name: np.full(len(rows), -1) for name, rows in self._splits.items()}
            listing = self._listed(bare, split, None)
            held = listed_columns(columns)
            note = f"{self.text} is used without labels: say which column holds them: label=COLUMN ({held})"
            return replace(listing, notes=(note,))
        labels, names = self._labels(column)
        listing = self._listed(labels, split, names)
        missing = int((listing.labels < 0).sum())
        notes = (
            [f"{self.text}: {missing} of {counted(len(listing.labels), 'images')} have no {column}"]
            if missing
            else []
        )
        others = [name for name in columns if name != column and _names(self._features[name])]
        if task is None and "label" not in self._options and others:
            notes.append(
                f"{self.text}: labels are those of the column {column}; others: labels={'|'.join(others)}"
            )
        return replace(listing, notes=tuple(notes))

    @property
    def _features(self) -> Any:
        return next(iter(self._splits.values())).features

    def _listed(
        self, labels: dict[str, Int64[np.ndarray, " n"]], split: str | None, names: tuple[str, ...] | None
    ) -> Listing:
        rows = {name: np.arange(len(values)) for name, values in labels.items()}
        return numbered_listing(rows, labels, split, names, self.text)

    def _usual(self, columns: list[str]) -> str | None:
        """The column of labels where nobody says: of those that name their classes, one that is called so, else any."""
        asked = self._options.get("label")
        if asked is None:
            classes = [name for name in columns if _names(self._features[name])]
            if classes:
                return min(classes, key=lambda name: name not in _FIRST)
        return pick_column(asked, LABEL_COLUMNS, columns, "label", self.text)

    def _labels(self, column: str) -> tuple[dict[str, Int64[np.ndarray, " n"]], tuple[str, ...]]:
        """Labels of each split by a column, and the classes of all."""
        kind, where = self._features[column], f"{self.text}, column {column}"
        if names := _names(kind):
            cells = {
                split: np.array([-1 if cell is None else cell for cell in rows[column]], np.int64)
                for split, rows in self._splits.items()
            }
            for values in cells.values():
                if len(values) and (values.max() >= len(names) or values.min() < -1):
                    raise BadDataError(
                        f"{where}: {values.max()} is no number of its {len(names)} classes",
                        "Correct the data set.",
                    )
            return cells, names
        several = _names(getattr(kind, "feature", None))
        texts = {
            split: [
                label_text([several[number] for number in cell] if several and cell else cell, where)
                for cell in rows[column]
            ]
            for split, rows in self._splits.items()
        }
        everything = {text for each in texts.values() for text in each}
        local = Path(self._name) if Path(self._name).is_absolute() else Path()
        given = names_asked(self._options.get("names"), local) or named(everything, where)
        return {split: numbered(each, given, where)[0] for split, each in texts.items()}, given

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


def _names(kind: Any) -> tuple[str, ...]:
    """The class names of a ClassLabel; nothing of other features."""
    return tuple(getattr(kind, "names", None) or ())


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


HFDS = SourceKind(
    "Hugging Face data sets, hfds/ORG/NAME",
    HubSource.open,
    options={"label": "column of the labels", "names": NAMES},
)
