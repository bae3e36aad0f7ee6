"""A table of paths: ``csv/FILE@path=COL,label=COL``; the images lie in a folder: ``root=``, or the table's own.

* A key is the path below the folder, as the folder itself would call it, in plain string order.
* Any other column is a further labelling, ``labels=COL``; several labels stand in one value (``cat|dog``, and
  ``--multi-label '|'``).
* ``split=NAME`` takes the rows of that split; the classes are those of all rows.
* With ``start=COL`` or ``end=COL`` the files are videos, and a sample is what lies between these seconds of one: its
  key is ``PATH#START-END``.
* What the table says is not trusted: a path that leads out of the folder, also by a link, is refused.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.console import counted
from kdcli.data.base import ImageSource, Listing, Opening, SourceKind, pick_task
from kdcli.data.clips import Clip, open_clip
from kdcli.data.folder import FolderSource
from kdcli.data.formats import VIDEOS
from kdcli.data.paths import find_file
from kdcli.data.photos import Picture, open_photo
from kdcli.data.tables import (
    LABEL_COLUMNS,
    NAMES,
    SPLIT_COLUMNS,
    Table,
    listed_columns,
    names_asked,
    numbered,
    pick_column,
    read_table,
    rows_of,
    untrained,
)
from kdcli.errors import BadDataError
from kdcli.files import storage_errors
from kdcli.reading import NAME_BYTES, require_inside, require_regular
from kdcli.types import DecodeMode

_PATH_COLUMNS: Final = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "key"),
)
_TIMES: Final = frozenset({"start", "end"})
_LOOKED_AT: Final = 64
_PATH_BYTES: Final = 4095


@final
class CsvSource(ImageSource):
    """Images that a table names.

    Args:
        file: absolute path of the table.
        options: the modifiers of :data:`CSV` that were given.
    """

    def __init__(self, file: Path, options: dict[str, str]) -> None:
        self._file, self._options = file, options
        self.clips = not _TIMES.isdisjoint(options)
        self._root = Path(os.path.normpath(file.parent / options.get("root", "")))
        self._folder = FolderSource.open(self._root)

    @classmethod
    def open(cls, opening: Opening) -> "CsvSource":
        """Open ``csv/REST``.

        Raises:
            NotFoundError: there is no such table, or no folder ``root``.
            BadDataError: it is no regular file.
            StorageError: it cannot be read.
        """
        file = find_file(opening)
        require_regular(file)
        return cls(file, dict(opening.options))

    @property
    def text(self) -> str:
        """``csv//absolute/file.csv``."""
        return f"csv/{self._file.as_posix()}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        table, options, where = read_table(self._file), self._options, str(self._file)
        paths = self._column(table, "path", _PATH_COLUMNS)
        if paths is None:
            raise BadDataError(
                f"{where} has no column that is usually called that of the paths: {listed_columns(table.header)}",
                "The first line names the columns; say which one holds the paths: path=COLUMN.",
            )
        splits = self._column(table, "split-column", SPLIT_COLUMNS)
        if task is None:
            column = self._column(table, "label", LABEL_COLUMNS)
        else:
            column = pick_task(
                task, [name for name in table.header if name not in ("", paths, splits)], where
            )
        split_of = (
            [value.strip() for value in table.column(splits)]
            if splits is not None
            else [""] * len(table.rows)
        )
        self._require_times(table.column(paths)[:1])
        keys = self._keys(table, paths)
        chosen = rows_of(split_of, split, where)
        rows = chosen[np.argsort(np.array([keys[row] for row in chosen], dtype=object), kind="stable")]
        table_of_keys = KeyTable.from_strings(keys[row] for row in rows)
        self._require_there(list(table_of_keys.at(rows_to_look_at(len(rows)))))
        if column is None:
            note = (
                f"{where} is used without labels: say which column holds them: label=COLUMN "
                f"({listed_columns(table.header)})"
            )
            return Listing(table_of_keys, np.full(len(rows), -1), None, (note,))
        values = [value.strip() for value in table.column(column)]
        asked = options.get("names") if task in (None, options.get("label")) else None
        names = names_asked(asked, self._file.parent)
        labels, class_names = numbered(values, names, f"{where}, column {column}")
        classes: dict[str, set[str]] = {}
        for name, value in zip(split_of, values, strict=True):
            classes.setdefault(name, set()).update({value} - {""})
        notes = (*self._missing(values, rows.tolist(), column), *untrained(classes, where))
        return Listing(table_of_keys, labels[rows], class_names, notes)

    def _require_times(self, paths: Sequence[str]) -> None:
        if not self.clips and any(path.lower().endswith(VIDEOS) for path in paths):
            raise BadDataError(
                f"{self._file} names videos, such as {paths[0]}",
                "Say which columns hold the seconds of clips: start=COLUMN,end=COLUMN; or give a folder: video/FOLDER",
            )

    def _column(self, table: Table, option: str, usual: tuple[str, ...]) -> str | None:
        return pick_column(self._options.get(option), usual, table.header, option, str(self._file))

    def _missing(self, values: list[str], rows: list[int], column: str) -> list[str]:
        bare = sum(not values[row] for row in rows)
        return [f"{self._file}: {bare} of {counted(len(rows), 'images')} have no {column}"] if bare else []

    def _keys(self, table: Table, column: str) -> list[str]:
        """The key of each row, all different."""
        lines: dict[str, int] = {}
        windows = self._windows(table)
        for (line, _), path, window in zip(table.rows, table.column(column), windows, strict=True):
            key = self._key(path, f"{self._file}, line {line}") + window
            if key in lines:
                raise BadDataError(
                    f"{self._file} has the path {path}{window} in line {lines[key]} and in line {line}",
                    "Keep one row per image; several labels stand in one value, as in cat|dog, and --multi-label '|'.",
                )
            lines[key] = line
        if not lines:
            raise BadDataError(
                f"{self._file} has no rows", "Give a table with a row per image below its columns' names."
            )
        return list(lines)

    def _windows(self, table: Table) -> list[str]:
        """What is behind the path in a key: of clips ``#START-END``, in seconds, or to the end ``#START-``."""
        if not self.clips:
            return [""] * len(table.rows)
        columns = [
            table.column(pick_column(self._options[name], (), table.header, name, str(self._file)) or "")
            if name in self._options
            else [""] * len(table.rows)
            for name in ("start", "end")
        ]
        found = []
        for (line, _), *words in zip(table.rows, *columns, strict=True):
            where = f"{self._file}, line {line}"
            start, end = (_seconds(word, where) for word in words)
            if end is not None and end <= (start or 0.0):
                raise BadDataError(
                    f"{where}: the clip ends ({end:g} s) no later than it begins", "Correct the row."
                )
            found.append(f"#{start or 0.0:.12g}-" + ("" if end is None else f"{end:.12g}"))
        return found

    def _key(self, path: str, where: str) -> str:
        root, joined = str(self._root), os.path.normpath(os.path.join(self._root, path))  # noqa: PTH118  (1M rows)
        if not path or "\0" in path:
            raise BadDataError(f"{where}: {path!r} is no path", "Give every row the path of its image.")
        if len(os.fsencode(joined)) > _PATH_BYTES or any(
            len(os.fsencode(name)) > NAME_BYTES for name in path.split("/")
        ):
            raise BadDataError(f"{where}: {path[:80]}... is longer than a path may be", "Correct the row.")
        if "://" in path:
            raise BadDataError(
                f"{where}: {path} is an address, and kd reads files", "Download the images first."
            )
        if ".." in path.split("/") or not joined.startswith(f"{root.rstrip('/')}/"):
            raise BadDataError(
                f"{where}: the path {path} leads out of {root}",
                "Say in which folder all paths lie: root=FOLDER; ../ is not followed.",
            )
        return joined[len(root.rstrip("/")) + 1 :]

    def _require_there(self, keys: list[str]) -> None:
        with storage_errors(self._root):
            if not any((self._root / self._name(key)).exists() for key in keys):
                raise BadDataError(
                    f"{self._file}: none of {counted(len(keys), 'files')} that kd looked for is there, such as "
                    f"{self._root / keys[0]}",
                    "Paths are relative to the table's folder; say in which other they lie: root=FOLDER.",
                )

    def encoded(self, key: str) -> bytes:
        """The bytes of the file, which lies in the folder, links followed."""
        name = self._name(key)
        require_inside(self._root / name, self._root, self._file)
        return self._folder.encoded(name)

    def size(self, key: str) -> int:
        """Size of the file; -1 when it is gone."""
        return self._folder.size(self._name(key))

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """See :meth:`ImageSource.decode`."""
        return self._clip(key, encoded).strip() if self.clips else super().decode(key, encoded)

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """See :meth:`ImageSource.picture`."""
        return self._clip(key, encoded) if self.clips else super().picture(key, encoded, how)

    def photo(self, key: str, encoded: bytes) -> Picture:
        """See :meth:`ImageSource.photo`."""
        return open_photo(encoded, self.path(key))

    def path(self, key: str) -> str:
        """Absolute path of the file, of a clip with its seconds."""
        return self._folder.path(key)

    def _name(self, key: str) -> str:
        """The path below the folder."""
        return key.rpartition("#")[0] if self.clips else key

    def _clip(self, key: str, encoded: bytes) -> Clip:
        start, _, end = key.rpartition("#")[2].partition("-")
        return open_clip(encoded, self.path(key), (float(start), float(end) if end else None))


def _seconds(word: str, where: str) -> float | None:
    """A time in a table; None where there is none."""
    try:
        found = float(word) if word.strip() else None
    except ValueError:
        found = -1.0
    if found is not None and not 0 <= found < 1e7:
        raise BadDataError(
            f"{where}: {word!r} is no time", "Give seconds from the beginning of the video, as 12.5."
        )
    return found


def rows_to_look_at(count: int) -> np.ndarray:
    """Some of so many rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64))


CSV = SourceKind(
    "a table of paths: csv/FILE@path=COLUMN,label=COLUMN",
    CsvSource.open,
    options={
        "path": "column of the paths",
        "label": "column of the labels",
        "split-column": "column of the splits, of which split=NAME takes one",
        "root": "folder in which the paths lie, from the table's own",
        "names": NAMES,
        "start": "column of the seconds at which clips of videos begin",
        "end": "column of the seconds at which they end",
    },
)
