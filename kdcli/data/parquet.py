"""Images in Parquet: ``parquet/PATH@image=COL,label=COL,key=COL``, a file, a folder of them, or a pattern.

* The image column holds encoded files: bytes, or Hugging Face's ``{"bytes": ..., "path": ...}``.
* A key is the text of the column ``key=``, or ``FILE/0000012``: the file's path below the folder, and the row in it.
* Labels are text, whole numbers, or lists of these; class names those of Hugging Face's metadata, ``names=``, or a
  ``classes.txt`` beside the files. -1 is no label, as there.
* A file is of a split where a word of its path is one's name (``train-00000-of-00004.parquet``); ``split-column=``
  names a column that tells it row by row.
* One image cannot be had without its row group, so the last one of a process is kept: order makes it fast.
"""

import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.console import counted, duration, size
from kdcli.data.base import ImageSource, Listing, Opening, SourceKind, pick_task
from kdcli.data.decode import bad_image
from kdcli.data.formats import IMAGE_BYTES
from kdcli.data.names import require_distinct
from kdcli.data.paths import FileStamp, Found
from kdcli.data.remote import find_here_or_there
from kdcli.data.tables import (
    CLASSES,
    LABEL_COLUMNS,
    NAMES,
    is_number,
    label_text,
    listed_columns,
    named,
    names_asked,
    numbered,
    pick_column,
    rows_of,
    split_of,
    untrained,
)
from kdcli.errors import BadDataError, KdError, MissingExtraError, UsageError
from kdcli.files import storage_errors
from kdcli.reading import parse_json

_DIGITS: Final = 7
_KEY_BYTES: Final = 4095
_GROUP_BYTES: Final = 8 * 2**30
"""Most bytes of images in a row group: so much memory reading one of them takes."""
_FEW_ROWS: Final = 8
_SLOW: Final = 5.0
"""Milliseconds that an image in random order may cost: less than decoding a photograph."""
Files = tuple[tuple[str, FileStamp], ...]


@final
class ParquetSource(ImageSource):
    """Files of images.

    Args:
        text: what reopens it.
        found: the files, and the modifiers of :data:`PARQUET` that were given.
        image: column of the images.
    """

    def __init__(self, text: str, found: Found, image: str) -> None:
        self._text, self._where, self._base, self._image = text, found.where, found.base, image
        self._files, self._options = tuple(found.stamps.items()), dict(found.options)

    @classmethod
    def open(cls, opening: Opening) -> "ParquetSource":
        """Open ``parquet/REST``.

        Raises:
            MissingExtraError: the package pyarrow is not installed.
            NotFoundError: there is no such file.
            BadDataError: the first file is damaged, or has no column of images.
            UsageError: it has several, and none is named.
            StorageError: a file cannot be read.
        """
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "parquet/ needs the package pyarrow, which is not installed", "pip install 'kdcli[parquet]'"
            ) from error
        found = find_here_or_there(opening, ".parquet")
        name, stamp = next(iter(found.stamps.items()))
        schema, asked = _opened(stamp).schema_arrow, opening.options.get("image")
        where = f"{found.where}/{name}"
        held = [field.name for field in schema if _may_be_images(field.type)]
        if asked is not None:
            pick_column(asked, (), schema.names, "image", where)
        if not held or (asked is not None and asked not in held):
            raise BadDataError(
                f"{where}: {f'the column {asked} holds' if asked else 'no column holds'} no images, which are bytes or "
                "structs with a field 'bytes'",
                f"Its columns are {listed_columns(schema.names)}; a table of paths is a csv/ data set.",
            )
        if asked is None and len(held) > 1:
            raise UsageError(
                f"{where}: the columns {listed_columns(held)} may all be images",
                f"Say which: image={held[0]}",
            )
        return cls(f"{opening.scheme}/{found.place}", found, asked or held[0])

    @property
    def text(self) -> str:
        """``parquet//absolute/path``, or ``parquet/URL``."""
        return self._text

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`; a task is a column."""
        for name, stamp in self._files:
            pick_column(self._image, (), _opened(stamp).schema_arrow.names, "image", f"{self._where}/{name}")
            _require_room(stamp, self._image)
        splits = self._splits()
        keys, places = _index(self._files, self._options.get("key"))
        rows = np.flatnonzero(np.isin(places, rows_of(splits, split, self._text)))
        keys, places = keys.select(rows), places[rows]
        if not len(keys):
            raise BadDataError(
                f"there are no rows in {self._text.partition('/')[2]}", "Give files with images."
            )
        notes: list[str] = []
        first, stamp = self._files[int(self._file_of(places[:1])[0])]
        columns = _opened(stamp).schema_arrow.names
        label = self._options.get("label") if task is None else task
        if task is not None:
            pick_task(task, [name for name in columns if name != self._image], self._text)
        label = pick_column(label, LABEL_COLUMNS, columns, "label", f"{self._where}/{first}")
        if label is None:
            notes.append(
                f"{self._text} is used without labels: say which column holds them: label=COLUMN "
                f"({listed_columns(columns)})"
            )
            return Listing(keys, np.full(len(keys), -1), None, tuple(notes))
        labels, class_names = self._numbered(label, splits, notes)
        if bare := int((labels[places] < 0).sum()):
            notes.append(f"{self._text}: {bare} of {counted(len(keys), 'images')} have no {label}")
        return Listing(keys, labels[places], class_names, tuple(notes))

    def _file_of(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Number of the file of each place among the rows of all."""
        return np.searchsorted(self._ends(), places, side="right").astype(np.int64)

    def _ends(self) -> Int64[np.ndarray, " files"]:
        return np.cumsum([int(_starts(stamp)[-1]) for _, stamp in self._files])

    def _splits(self) -> list[str]:
        """The split of each row of all files: by a column, else by the name of its file."""
        column = self._options.get("split-column")
        if column is not None:
            return [text for name, stamp in self._files for text in self._texts(name, stamp, column, "split")]
        return [split for name, stamp in self._files for split in [split_of(name)] * int(_starts(stamp)[-1])]

    def _numbered(
        self, column: str, splits: list[str], notes: list[str]
    ) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
        """Labels of the rows of all files, and the classes of all."""
        everything = [
            text for name, stamp in self._files for text in self._texts(name, stamp, column, "label")
        ]
        names = names_asked(self._options.get("names"), self._base, CLASSES)
        told = _told(self._files[0][1], column) if names is None else None
        if told is not None:
            return np.array([self._number(value, len(told), column) for value in everything], np.int64), told
        if names is None:
            names = named(set(everything), self._text)
            classes: dict[str, set[str]] = {}
            for split, value in set(zip(splits, everything, strict=True)):
                classes.setdefault(split, set()).update({value} - {""})
            notes += untrained(classes, self._text)
        return numbered(everything, names, f"{self._text}, column {column}")

    def _number(self, value: str, classes: int, column: str) -> int:
        if value == "":
            return -1
        if not is_number(value) or len(value) > 9 or int(value) >= classes:
            raise BadDataError(
                f"{self._text}, column {column}: {value} is no number of its {classes} classes",
                "Correct the metadata of Hugging Face, or give names=FILE, a name a line.",
            )
        return int(value)

    def _texts(self, name: str, stamp: FileStamp, column: str, what: str) -> list[str]:
        """The label, or the split, of each row of a file, as text; empty where it has none."""
        where = f"{self._where}/{name}, column {column}"
        pick_column(column, (), _opened(stamp).schema_arrow.names, what, f"{self._where}/{name}")
        with _readable(stamp.path):
            cells = _opened(stamp).read([column], use_threads=False).column(0).to_pylist()
        return [
            "" if cell == -1 and not isinstance(cell, bool) else label_text(cell, where) for cell in cells
        ]

    def random_cost(self) -> str:
        """See :meth:`ImageSource.random_cost`: the row group that holds most is read once."""
        groups = [(bytes_, stamp) for _, stamp in self._files for bytes_ in _held(stamp, self._image)]
        held, stamp = max(groups, key=lambda group: group[0])
        number = _held(stamp, self._image).index(held)
        rows, start = int(np.diff(_starts(stamp))[number]), time.perf_counter()
        _group.__wrapped__(stamp, number, self._image, os.getpid())
        cost = 1e3 * (time.perf_counter() - start)
        if rows <= _FEW_ROWS or cost < _SLOW:
            return ""
        return (
            f"{self._text}: an image costs {cost:.0f} ms in random order, and {cost / rows:.2g} ms in order: its row "
            f"group of {rows} ({size(held)}) is read for it. A pass: {duration(cost * self._ends()[-1] / 1e3)} of all "
            f"workers. Write small groups (pyarrow's row_group_size={_FEW_ROWS}), or tars"
        )

    def encoded(self, key: str) -> bytes:
        """The bytes in the row."""
        name, row = self._place(key)
        stamp = dict(self._files)[name]
        starts = _starts(stamp)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if not 0 <= row < starts[-1]:
            raise bad_image(self.path(key), "no such row")
        cell = _group(stamp, group, self._image, os.getpid())[row - int(starts[group])].as_py()
        held = cell.get("bytes") if isinstance(cell, dict) else cell
        if held is None:
            path = cell.get("path") if isinstance(cell, dict) else None
            raise bad_image(
                self.path(key),
                f"the row names the file {path} and holds none" if path else "the row has no image",
            )
        if len(held) > IMAGE_BYTES:
            raise bad_image(self.path(key), f"{len(held)} bytes; at most {IMAGE_BYTES} are read")
        return bytes(held)

    def _place(self, key: str) -> tuple[str, int]:
        """File and row of a key."""
        column = self._options.get("key")
        if column is None:
            name, _, row = key.rpartition("/")
            return name, int(row)
        keys, places = _index(self._files, column)
        found = bisect_left(keys, key)
        if found == len(keys) or keys[found] != key:
            raise bad_image(self.path(key), "no such key")
        place = int(places[found])
        number = int(self._file_of(places[[found]])[0])
        return self._files[number][0], place - (int(self._ends()[number - 1]) if number else 0)


def _may_be_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _may_be_images(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what pyarrow says of a file into errors with a code and a hint."""
    import pyarrow as pa

    with storage_errors(path):
        try:
            yield
        except KdError:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadDataError(
                f"{path} is no Parquet file, or damaged: {' '.join(str(error).split())[:200]}",
                "Fetch or write it again.",
            ) from error


def _opened(stamp: FileStamp) -> Any:
    return _opened_in(stamp, os.getpid())


@lru_cache(maxsize=64)
def _opened_in(stamp: FileStamp, process: int) -> Any:
    """What pyarrow makes of a file, in the state that it was found in; a process that is forked opens its own."""
    import pyarrow.parquet as pq

    with stamp.opened(), _readable(stamp.path):  # which is no pipe, on which pyarrow would wait
        return pq.ParquetFile(stamp.path)


@lru_cache(maxsize=64)
def _starts(stamp: FileStamp) -> Int64[np.ndarray, " groups1"]:
    """Row at which each row group of a file begins, and the number of rows."""
    about = _opened(stamp).metadata
    return np.cumsum(
        [0, *(about.row_group(number).num_rows for number in range(about.num_row_groups))], dtype=np.int64
    )


def _held(stamp: FileStamp, column: str) -> list[int]:
    """Bytes of a column in each row group of a file."""
    about = _opened(stamp).metadata
    groups = (about.row_group(number) for number in range(about.num_row_groups))
    return [
        sum(
            part.total_uncompressed_size
            for part in map(group.column, range(group.num_columns))
            if part.path_in_schema.partition(".")[0] == column
        )
        for group in groups
    ]


def _require_room(stamp: FileStamp, column: str) -> None:
    """Refuse a file with a row group that is larger than memory.

    Raises:
        BadDataError: a column has more bytes in one.
    """
    held = max(_held(stamp, column), default=0)
    if held > _GROUP_BYTES:
        raise BadDataError(
            f"{stamp.path} has {size(held)} of images in one row group; at most {size(_GROUP_BYTES)} are read",
            f"Write smaller row groups: row_group_size={_FEW_ROWS}",
        )


@lru_cache(maxsize=1)
def _group(stamp: FileStamp, group: int, column: str, process: int) -> Any:
    """The images of a row group: the last one is kept."""
    with stamp.opened(), _readable(stamp.path):
        return _opened(stamp).read_row_group(group, [column], use_threads=False).column(0)


@lru_cache(maxsize=8)
def _index(files: Files, column: str | None) -> tuple[KeyTable, Int64[np.ndarray, " n"]]:
    """Keys of all rows of some files in plain string order, and the place of each among the rows.

    Raises:
        UsageError: there is no such column.
        BadDataError: a key is none, or comes twice.
    """
    keys: list[str] = []
    for name, stamp in files:
        if column is None:
            keys += [f"{name}/{row:0{_DIGITS}d}" for row in range(int(_starts(stamp)[-1]))]
            continue
        pick_column(column, (), _opened(stamp).schema_arrow.names, "key", stamp.path)
        with _readable(stamp.path):
            cells = _opened(stamp).read([column], use_threads=False).column(0).to_pylist()
        for row, cell in enumerate(cells):
            key = str(cell) if isinstance(cell, int | str) and not isinstance(cell, bool) else ""
            if not key or "\0" in key or len(key.encode()) > _KEY_BYTES:
                raise BadDataError(
                    f"{stamp.path}, column {column}, row {row}: {str(cell)[:80]!r} is no key",
                    "A key is text or a whole number; leave key= out to number the rows.",
                )
            keys.append(key)
    order = np.argsort(np.array(keys, dtype=object), kind="stable")
    table = KeyTable.from_strings(keys[row] for row in order)
    if repeated := table.duplicates():
        raise BadDataError(
            f"the column {column} has the key {repeated[0]} more than once in {counted(len(files), 'files')}",
            "Keep one row per image, or leave key= out to number the rows.",
        )
    return table, order.astype(np.int64)


def _told(stamp: FileStamp, column: str) -> tuple[str, ...] | None:
    """The class names of a column, where Hugging Face's metadata has them."""
    told = (_opened(stamp).schema_arrow.metadata or {}).get(b"huggingface")
    if told is None:
        return None
    about: Any = parse_json(told, f"{stamp.path}, metadata of Hugging Face")
    for field in ("info", "features", column):
        about = about.get(field) if isinstance(about, dict) else None
    names = about.get("names") if isinstance(about, dict) and about.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return None
    if len(set(names)) < len(names):
        raise BadDataError(f"{stamp.path} names a class of {column} twice", "Give names=FILE, a name a line.")
    require_distinct(names, f"{stamp.path}, column {column}")
    return tuple(names)


PARQUET = SourceKind(
    "images in Parquet files: parquet/PATH, a file, a folder of them, or a pattern",
    ParquetSource.open,
    options={
        "image": "column of the images",
        "label": "column of the labels",
        "key": "column of the images' keys; default: file and row",
        "split-column": "column of the splits, of which split=NAME takes one; default: by the files' names",
        "names": NAMES,
    },
)
