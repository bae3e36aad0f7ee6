"""Ranking without a cache: a folder of ``.npy`` files, one a source, and a file of labels."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.errors import BadDataError, NotFoundError, StorageError, nearest
from kdcli.files import real_path, storage_errors
from kdcli.ranking.config import RankConfig
from kdcli.ranking.probe import ProbeLabels, labelled_rows
from kdcli.reading import open_regular
from kdcli.types import OutputKind


@final
@dataclass(frozen=True, slots=True, eq=False)
class FileMaterial:
    """See :class:`~kdcli.ranking.material.Material`; what the files hold is what is ranked on.

    Attributes:
        arrays: of each source, mapped, one row per image.
        rows: of the images in the files.
    """

    arrays: dict[str, Float[np.ndarray, "all d"]]
    kept: tuple[OutputKind, ...]
    rows: Int64[np.ndarray, " n"]
    labels: ProbeLabels
    class_names: tuple[str, ...] | None
    cache_id: None = None
    location: None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Stems of the files."""
        return tuple(self.arrays)

    def id_of(self, name: str) -> None:
        """Files have no identity."""

    def image(self, place: int) -> str:
        """By its row."""
        return f"row {self.rows[place]}"

    def select(self, places: Int64[np.ndarray, " m"]) -> "FileMaterial":
        """These rows only."""
        return replace(self, rows=self.rows[places], labels=self.labels[places])

    def fingerprints(self, places: Int64[np.ndarray, " m"]) -> None:
        """Rows of a file are no images."""

    def gather(self, name: str, array: OutputKind) -> Float[np.ndarray, "n d"]:
        """These rows of the file."""
        return np.asarray(self.arrays[name][self.rows])


def open_files(config: RankConfig, kind: OutputKind) -> FileMaterial:
    """Open ``--features`` and ``--labels``; nothing in them is unpickled.

    Args:
        config: names the folder, the labels and the sources.
        kind: what the files hold, by ``--on``.

    Raises:
        NotFoundError: no such folder, file or source, or no ``.npy`` in the folder.
        BadDataError: an array of another shape or type.
    """
    if config.features is None or config.labels is None:
        raise ValueError("both are checked before")
    labels, class_names = _read_labels(config.labels)
    files = _sources(config)
    arrays = {name: _read_source(path, len(labels), config.labels) for name, path in files.items()}
    rows = labelled_rows(labels)
    return FileMaterial(arrays, (kind,), rows, labels[rows], class_names)


def _sources(config: RankConfig) -> dict[str, Path]:
    folder = config.features
    if folder is None or not folder.is_dir():
        raise NotFoundError(f"--features {folder} is no folder", "Give a folder of .npy files, one a source.")
    with storage_errors(folder):
        files = {path.stem: path for path in sorted(folder.glob("*.npy"))}
    if config.labels is not None:
        files = {name: path for name, path in files.items() if real_path(path) != real_path(config.labels)}
    for name in (*config.teacher, *config.exclude):
        if name not in files:
            raise NotFoundError(
                f"no source '{name}' in {folder}.{nearest(name, files)}",
                f"Sources are the .npy files there: {', '.join(files) or 'none'}.",
            )
    names = sorted(set(config.teacher or files) - set(config.exclude))
    if not names:
        raise NotFoundError(
            f"no source is left to rank in {folder}", "Write one .npy file [n, d] per source."
        )
    return {name: files[name] for name in names}


def _read_labels(path: Path) -> tuple[ProbeLabels, tuple[str, ...] | None]:
    """Class indices, names that are numbered in their order, or 0/1 rows of images with several labels."""
    values = _load(path, "labels")
    kinds = {1: "iuU", 2: "iub"}.get(values.ndim, "")
    if values.dtype.kind not in kinds or values.shape[1:] == (1,):
        raise BadDataError(
            f"the labels in {path} are {values.dtype} of shape {list(values.shape)}",
            "Labels are one integer (-1 for none) or one class name per image, shape [n]; or, where an image may "
            "have several, 0 or 1 per image and label, shape [n, l] (-1 throughout for none).",
        )
    if values.dtype.kind == "U":
        classes, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int64), tuple(str(name) for name in classes)
    return values.astype(np.int64), None


def _read_source(path: Path, images: int, labels: Path) -> Float[np.ndarray, "n d"]:
    values = _load(path, "source")
    if values.ndim != 2 or values.dtype.kind != "f":
        raise BadDataError(
            f"{path} holds {values.dtype} of shape {list(values.shape)}",
            "A source is an array of floats of shape [n, d]: one row per image.",
        )
    if len(values) != images:
        raise BadDataError(
            f"{path} has {len(values)} rows, and {labels} has {images} labels",
            "Give the same images in the same order in every file.",
        )
    return values


def _load(path: Path, what: str) -> np.ndarray:
    try:
        os.close(open_regular(path, sys.maxsize))
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {what} file {path}", "Check the path.") from error
    except BadDataError:
        raise
    except (ValueError, EOFError, TypeError, SyntaxError, AttributeError, RecursionError) as error:
        raise BadDataError(
            f"{path} cannot be read as an array: {error}",
            "Write it with numpy.save, as numbers: pickled objects are never loaded.",
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", "Check the path and its permissions.") from error
    if not isinstance(array, np.ndarray):
        raise BadDataError(f"{path} is an archive of arrays", "Write one array per file with numpy.save.")
    return array
