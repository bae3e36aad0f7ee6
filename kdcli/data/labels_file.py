"""``labels.csv``: further labels of a folder's images, a column ``key`` and one column a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.data.names import folded, told_apart
from kdcli.data.tables import numbered, read_table
from kdcli.errors import BadDataError

LABELS_FILE = "labels.csv"
_KEY = "key"


@final
class LabelsFile:
    """The file of a folder.

    Args:
        path: of the file; it is there.

    Raises:
        StorageError: it cannot be read.
        BadDataError: it is no regular file, too large, no CSV in UTF-8, or its columns or rows are no table's.
    """

    def __init__(self, path: Path) -> None:
        self._table = read_table(path)
        self._path, self._header = path, self._table.header
        if _KEY not in self._header or "" in self._header:
            raise BadDataError(
                f"{path} has the columns {list(self._header)}",
                "It needs a column 'key' and one differently named column per task.",
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Its columns of labels."""
        return tuple(name for name in self._header if name != _KEY)

    def labels(
        self, keys: Sequence[str], prefix: str, task: str
    ) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...], list[str]]:
        """Labels of images, -1 where the column has none, and classes of all rows.

        Args:
            keys: of the images.
            prefix: that all images of this split have in their keys; rows of other splits match none of them.
            task: the column.

        Returns:
            The labels, the classes' names in plain string order, and what is to be said about them, a line each.

        Raises:
            BadDataError: a row has too many values, a key comes twice, two classes look the same, a class holds a
                NUL, no key matches, or a class has images only under keys that are written otherwise.
        """
        pairs, stripped = self._pairs(task)
        table = KeyTable.from_strings(key for key, _ in pairs)
        repeated = table.duplicates()
        if repeated:
            raise BadDataError(
                f"{self._path} has the key {repeated[0]} more than once", "Keep one row per image."
            )
        known, classes = numbered([value for _, value in pairs], None, f"{self._path}, column {task}")
        values = np.append(known, -1)
        rows = table.find(
            KeyTable.from_strings(keys)
        )  # -1, where labels.csv lacks a key, is the entry put last
        unmatched = sorted(set(range(len(pairs))) - set(rows.tolist()))
        own = [pairs[row] for row in unmatched if pairs[row][0].startswith(prefix)]
        bare = np.flatnonzero(rows < 0).tolist()
        near = _near(own, [keys[place] for place in bare])
        if (rows < 0).all():
            raise BadDataError(
                f"{self._path} names none of the images, such as {keys[0]}{_for_example(near)}",
                "Its keys are paths relative to its folder, with / and in the case of the files' names.",
            )
        self._require_no_loss(near, {classes[label] for label in values[rows] if label >= 0}, task)
        notes = [
            f"{self._path}: {stripped} values of {task} have blanks around them, which are left out"
            if stripped
            else "",
            f"{self._path}: {len(own)} keys are no images here, such as {_shown(own[0][0], near)}; their labels are "
            "not used"
            if own
            else "",
            f"{self._path}: {len(bare)} of {len(keys)} images have no row, such as {keys[bare[0]]}; they have no label"
            if bare
            else "",
        ]
        return values[rows], classes, [note for note in notes if note]

    def _pairs(self, task: str) -> tuple[list[tuple[str, str]], int]:
        """Key and label of each row, and how many labels had blanks around them."""
        values = self._table.column(task)
        labels = [value.strip() for value in values]
        pairs = list(zip(self._table.column(_KEY), labels, strict=True))
        return pairs, sum(map(str.__ne__, values, labels))

    def _require_no_loss(self, near: dict[str, tuple[str, str]], found: set[str], task: str) -> None:
        """Refuse a class that has no image because its keys are written otherwise."""
        for key, (image, value) in near.items():
            if value and value not in found:
                one, other = told_apart(key, image)
                raise BadDataError(
                    f"{self._path}: no image of the class '{value}' ({task}) is found: its key {one} is not {other}",
                    "Write the keys as the files are called, in case and Unicode form, with / between folders.",
                )


def _near(pairs: Sequence[tuple[str, str]], images: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Keys that would be an image's, were it not for case, Unicode form, blanks or slashes: it, and the label."""
    if not pairs or not images:
        return {}
    known = {_loosely(image): image for image in images}
    return {key: (known[_loosely(key)], value) for key, value in pairs if _loosely(key) in known}


def _loosely(key: str) -> str:
    return folded(key.strip().replace("\\", "/").removeprefix("./"))


def _for_example(near: dict[str, tuple[str, str]]) -> str:
    key = next(iter(near), None)
    return "" if key is None else f"; it has {_shown(key, near)}"


def _shown(key: str, near: dict[str, tuple[str, str]]) -> str:
    if key not in near and near:
        key = next(iter(near))
    if key not in near:
        return key
    one, other = told_apart(key, near[key][0])
    return f"{one} where the image is {other} ({len(near)} keys differ so)"
