"""A folder of image files: ``[SPLIT/]CLASS/.../NAME.jpg``, or images without classes, or a labels.csv.

* Keys are posix paths below the folder, with the split's folder, in plain string order.
* Splits are sub folders (train, val, test, their long forms, or any other that is asked for by name).
* The class is the first sub folder below the split; class folders of all splits make one list of classes,
  so a class that one split lacks does not shift the labels of another.
* ``labels.csv`` in the folder has a column ``key`` and one column per further task (``labels=TASK``).
* Symbolic links are followed; hidden files, folders without images and other files are skipped.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.console import console
from kdcli.data.base import ImageSource, Listing, SourceKind, pick_split, pick_task
from kdcli.data.spec import JOIN, canonical_split
from kdcli.errors import BadDataError, NotFoundError, UsageError, nearest
from kdcli.files import storage_errors
from kdcli.registry import SOURCES

# A fixed list, not Pillow's: what is a sample must not depend on the plugins of one installation.
EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "avif",
        "bmp",
        "gif",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pbm",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "tif",
        "tiff",
        "webp",
    )
)
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
LABELS_FILE = "labels.csv"
CLASS_TASK = "class"


@final
class FolderSource(ImageSource):
    """Image files below ``root``.

    Args:
        root: absolute path of the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def open(cls, path: Path) -> "FolderSource":
        """Check that ``path`` is a folder.

        Raises:
            NotFoundError: nothing is there.
            BadDataError: it is a file.
            StorageError: it cannot be looked at.
        """
        root = Path(os.path.normpath(path.absolute()))
        with storage_errors(root):
            try:
                root.stat()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFoundError(
                    f"there is no folder {root}", "Check the path or give --data-root."
                ) from error
        if not root.is_dir():
            raise BadDataError(f"{root} is a file, not a folder of images", f"Give its folder: {root.parent}")
        return cls(root)

    @property
    def text(self) -> str:
        """``folder//absolute/path``."""
        return f"folder/{self._root.as_posix()}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        with storage_errors(self._root):
            folders = _image_folders(self._root)
            prefix = self._split_prefix(split, folders)
            keys = list(_images(self._root / prefix, prefix, frozenset()))
            if not keys:
                raise BadDataError(
                    f"there are no images in {self._root / prefix}",
                    f"Images are files that end in {', '.join(sorted(EXTENSIONS))}, hidden ones left out.",
                )
            task = pick_task(task, (CLASS_TASK, *self._csv_tasks()), str(self._root))
            if task != CLASS_TASK:
                table = KeyTable.from_strings(keys)
                return Listing(table, *self._csv_labels(table, task))
            classes = self._classes(keys, prefix, folders)
        return Listing(KeyTable.from_strings(keys), _class_labels(keys, prefix, classes), classes)

    def _split_prefix(self, split: str | None, folders: list[str]) -> str:
        """The split's folder and a slash; empty without splits."""
        split_like = [name for name in folders if name.lower() in SPLIT_NAMES]
        if split is not None:
            return self._asked_split(split, folders if split in folders else split_like, folders) + "/"
        kinds = {canonical_split(name) for name in split_like}
        nested = any(_image_folders(self._root / name) for name in split_like)
        if split_like and (len(split_like) == len(folders) or len(kinds) > 1 or nested):
            raise UsageError(
                f"{self._root} holds splits ({', '.join(split_like)}), not classes",
                f"Say which: {self._root}@split={split_like[0]}",
            )
        if split_like:
            console.warn(f"{self._root}: the folder '{split_like[0]}' is taken as a class, not as a split")
        return ""

    def _asked_split(self, split: str, candidates: list[str], folders: list[str]) -> str:
        if candidates:
            return pick_split(split, candidates, str(self._root))
        found = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
        raise NotFoundError(
            f"{self._root} has no split '{split}'; its folders with images: {found or 'none'}",
            "Leave split= out to use the whole folder.",
        )

    def _classes(self, keys: list[str], prefix: str, folders: list[str]) -> tuple[str, ...] | None:
        """Class folders of this split and of all others; None for images without classes."""
        directly = next((key for key in keys if "/" not in key[len(prefix) :]), None)
        nested = next((key for key in keys if "/" in key[len(prefix) :]), None)
        if directly and nested:
            raise BadDataError(
                f"{self._root / prefix} has images with and without a class folder: {nested}, {directly}",
                "Move them all into class folders, or all out of them.",
            )
        if directly:
            return None
        names = {key[len(prefix) :].split("/", 1)[0] for key in keys}
        if prefix:
            for other in folders:
                if other.lower() in SPLIT_NAMES and other != prefix[:-1]:
                    names.update(_image_folders(self._root / other))
        return tuple(sorted(names))

    def _csv_tasks(self) -> tuple[str, ...]:
        if not (self._root / LABELS_FILE).is_file():
            return ()
        return tuple(name for name in self._csv_header() if name != "key")

    def _csv_header(self) -> list[str]:
        path = self._root / LABELS_FILE
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                header = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadDataError(f"{path} is not CSV in UTF-8: {error}", "Save it as UTF-8 CSV.") from error
        if "key" not in header or len(set(header)) < len(header) or "" in header:
            raise BadDataError(
                f"{path} has the columns {header}",
                "It needs a column 'key' and one differently named column per task.",
            )
        return header

    def _csv_labels(self, keys: KeyTable, task: str) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
        """Labels of ``keys`` in a column of labels.csv, -1 where it has none; classes of all its rows."""
        path = self._root / LABELS_FILE
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                pairs = [(row["key"] or "", row[task] or "") for row in csv.DictReader(file)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadDataError(f"{path} is not CSV in UTF-8: {error}", "Save it as UTF-8 CSV.") from error
        table = KeyTable.from_strings(key for key, _ in pairs)
        repeated = table.duplicates()
        if repeated:
            raise BadDataError(f"{path} has the key {repeated[0]} more than once", "Keep one row per image.")
        classes = tuple(sorted({value for _, value in pairs} - {""}))
        index = {name: number for number, name in enumerate(classes)} | {"": -1}
        values = np.array([*(index[value] for _, value in pairs), -1])
        rows = table.find(keys)  # -1, where labels.csv lacks a key, is the entry put last
        if (rows < 0).all():
            raise BadDataError(
                f"{path} names none of the images, such as {keys[0]}",
                "Its keys are paths relative to its folder.",
            )
        return values[rows], classes

    def encoded(self, key: str) -> bytes:
        """The bytes of the file."""
        path = self._root / key
        with storage_errors(path):
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                raise BadDataError(
                    f"{path}: no such file (removed, or a link that leads nowhere)", "Restore or remove it."
                ) from error

    def size(self, key: str) -> int:
        """Size of the file; -1 when it is gone."""
        try:
            return (self._root / key).stat().st_size
        except OSError:
            return -1

    def path(self, key: str) -> str:
        """Absolute path of the file."""
        return str(self._root / key)


def _class_labels(keys: list[str], prefix: str, classes: tuple[str, ...] | None) -> Int64[np.ndarray, " n"]:
    if classes is None:
        return np.full(len(keys), -1)
    index = {name: number for number, name in enumerate(classes)}
    return np.fromiter((index[key[len(prefix) :].split("/", 1)[0]] for key in keys), np.int64, len(keys))


def _image_folders(folder: Path) -> list[str]:
    """Names of the sub folders that hold an image at any depth."""
    return [
        name
        for name, is_folder in _entries(folder)
        if is_folder and next(_images(folder / name, "", frozenset()), None) is not None
    ]


def _images(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Keys of all images below ``folder``, in plain string order."""
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:
        raise BadDataError(f"{folder} is a link to a folder that contains it", "Remove the link.")
    for name, is_folder in _entries(folder):
        if is_folder:
            yield from _images(folder / name, f"{prefix}{name}/", above | {here})
        else:
            yield prefix + name


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Visible sub folders and image files, so ordered that a walk yields keys in plain string order."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_folder = entry.is_dir()
            if is_folder or os.path.splitext(entry.name)[1].lower() in EXTENSIONS:  # noqa: PTH122  (1M names)
                found.append((_checked(entry.name, folder), is_folder))
    return sorted(found, key=lambda item: f"{item[0]}/" if item[1] else item[0])


def _checked(name: str, folder: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadDataError(f"{folder}: the file name {name!r} is not UTF-8", "Rename the file.") from error
    return name


def embedded_names() -> tuple[str, ...]:
    """Sources that there is a full list of: those that come inside packages."""
    return tuple(f"{scheme}/{name}" for scheme, kind in SOURCES.items() for name in kind.names)


def find_folder(text: str, data_root: Path | None) -> Path:
    """The folder of ``folder/REL``, or of what only looks like a scheme.

    Raises:
        NotFoundError: nothing is there; near names of embedded sources are suggested.
    """
    scheme, _, rest = text.partition("/")
    wanted = [rest, text] if scheme == "folder" and rest else [text]
    roots = [data_root, Path()] if data_root else [Path()]
    for name in wanted:
        for root in roots:
            with storage_errors(root / name):
                if (root / name).exists():
                    return root / name
    if scheme != "folder":
        raise NotFoundError(
            f"unknown data set '{text}'.{nearest(text, embedded_names())}",
            f"Known: {', '.join(embedded_names())}; torch/NAME, hfds/NAME, or a folder.",
        )
    where = f" below {data_root} or {Path.cwd()}" if data_root else f" below {Path.cwd()}"
    raise NotFoundError(
        f"there is no folder '{rest}'{'' if Path(rest).is_absolute() else where}."
        + nearest(rest, (*embedded_names(), *(f"{known}/{rest.partition('/')[2]}" for known in SOURCES))),
        f"Behind {JOIN}, a folder is written folder/PATH."
        if JOIN in rest
        else "Check the path, give --data-root, or use an embedded set such as sklearn/digits.",
    )


FOLDER = SourceKind(
    "a folder of images: [SPLIT/]CLASS/NAME.jpg, or images alone, or with a labels.csv",
    lambda opening: FolderSource.open(find_folder(f"{opening.scheme}/{opening.rest}", opening.data_root)),
)
