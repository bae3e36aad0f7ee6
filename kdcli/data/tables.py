"""Tables of images: a file of comma-separated values, and what its columns, splits and labels mean.

What is decided here holds for every source that gets labels from a table or from files beside its images.
"""

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
from jaxtyping import Int64

from kdcli.data.base import pick_split
from kdcli.data.names import alike, require_distinct, told_apart
from kdcli.data.spec import SPLIT_NAMES, canonical_split
from kdcli.errors import BadDataError, NotFoundError, UsageError, nearest
from kdcli.files import beside, storage_errors
from kdcli.reading import read_text

CLASSES: Final = "classes.txt"
"""Class names beside files of images, a line each."""
LABEL_COLUMNS: Final = ("label", "labels", "class", "class_name", "target")
"""What the column of labels is called, where nobody says."""
SPLIT_COLUMNS: Final = ("split",)
NAMES: Final = "file of class names, a line each, or how many classes there are: for labels that are numbers"
"""What the modifier ``names=`` of these sources does."""
_DELIMITERS: Final = ",;\t"
_SAVE: Final = "Save it as UTF-8 CSV."
_MOST_CLASSES: Final = 10**7


@final
@dataclass(frozen=True, slots=True)
class Table:
    """A file of comma-separated values.

    Attributes:
        path: the file.
        header: names of the columns, all different.
        rows: the number of the line that a row ends in, and as many values as there are columns.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, list[str]], ...]

    def column(self, name: str) -> list[str]:
        """The values of a column."""
        place = self.header.index(name)
        return [row[place] for _, row in self.rows]


def read_table(path: Path) -> Table:
    """Read a table. What separates the columns (a comma, a semicolon, a tab) is seen in its first line.

    Empty lines are no rows, and what a short row lacks is empty.

    Raises:
        StorageError: it cannot be read.
        BadDataError: it is no regular file, too large, no CSV in UTF-8, two columns are called alike, or a row has
            more values than there are columns.
    """
    with storage_errors(path):
        text = read_text(path, hint=_SAVE)
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    try:  # strict: a quote that is never closed would swallow all rows behind it
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(lines, [])
        rows = tuple((lines.line_num, row) for row in lines if row)
    except csv.Error as error:
        raise BadDataError(f"{path}, at line {lines.line_num}, is not CSV: {error}", _SAVE) from error
    if not header:
        raise BadDataError(f"{path} is empty", "Give a table whose first line names its columns.")
    if len(set(header)) < len(header):
        raise BadDataError(f"{path} has the columns {header}", "Call every column differently.")
    for line, row in rows:
        if len(row) > len(header):
            raise BadDataError(
                f"{path}, line {line}: {len(row)} values, and there are {len(header)} columns",
                "Put a value that holds a comma in quotes.",
            )
        row += [""] * (len(header) - len(row))
    return Table(path, tuple(header), rows)


def pick_column(
    asked: str | None, usual: Sequence[str], columns: Sequence[str], option: str, where: str
) -> str | None:
    """The column that a user asked for, or else the one that is usually called so; None where there is none.

    Args:
        asked: its name.
        usual: names in lower case.
        columns: that there are.
        option: the modifier that names it.
        where: the table, for messages.

    Raises:
        UsageError: there is no such column, or two are usually called so.
    """
    if asked is not None:
        if asked not in columns:
            raise UsageError(
                f"{where} has no column '{asked}'.{nearest(asked, columns)}",
                f"Its columns are {listed_columns(columns)}: give {option}=COLUMN.",
            )
        return asked
    found = [name for name in columns if name.strip().lower() in usual]
    if len(found) > 1:
        raise UsageError(
            f"{where}: the columns '{found[0]}' and '{found[1]}' may both be the {option}",
            f"Say which: {option}={found[0]}",
        )
    return found[0] if found else None


def listed_columns(columns: Sequence[str]) -> str:
    """Names of columns for a message."""
    return ", ".join(name or "''" for name in columns[:20]) + (", ..." if len(columns) > 20 else "")


def rows_of(splits: Sequence[str], split: str | None, where: str) -> Int64[np.ndarray, " m"]:
    """Rows of the split that was asked for; all where there is but one.

    Args:
        splits: of each row, empty where it is in none.
        split: what the user asked for.
        where: the source, for messages.

    Raises:
        UsageError: there are several, and none was asked for.
        NotFoundError: there is none of that name.
        BadDataError: two look the same.
    """
    known = sorted(set(splits) - {""})
    for one, other in alike(known)[:1]:
        raise BadDataError(
            f"{where}: the splits {' and '.join(told_apart(one, other))} differ only by case, Unicode form or "
            "invisible characters",
            "Write them alike.",
        )
    if split is not None:
        asked = pick_split(split, known, where)
        return np.flatnonzero([each == asked for each in splits])
    if len(set(splits)) > 1:
        first = min(known, key=lambda name: canonical_split(name) != "train")
        some = f", and {splits.count('')} in none" if "" in splits else ""
        raise UsageError(f"{where} holds splits ({', '.join(known)}{some})", f"Say which: @split={first}")
    return np.arange(len(splits))


def names_asked(text: str | None, folder: Path, usual: str | None = None) -> tuple[str, ...] | None:
    """The class names of ``names=FILE|COUNT``.

    Args:
        text: a count, or a file with a name a line.
        folder: where a relative path begins.
        usual: the file that is taken where it is there and nothing was asked for.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it cannot be read.
        BadDataError: it is no regular file, too large, no text, or two names look the same.
        UsageError: more classes than there can be.
    """
    if text is None and usual is not None and (folder / usual).is_file():
        text = usual
    if text is None:
        return None
    if text.isdecimal() and text.isascii():
        if len(text) > len(str(_MOST_CLASSES)) or not 0 < int(text) <= _MOST_CLASSES:
            raise UsageError(
                f"names={text} is no number of classes", f"Give 1 to {_MOST_CLASSES}, or a file."
            )
        return tuple(map(str, range(int(text))))
    path = folder / text
    with storage_errors(path):
        if not path.exists():
            raise NotFoundError(
                f"there is no file {path}.{beside(path)}",
                "names= is a file with a class name a line, or how many classes there are.",
            )
        lines = read_text(path, hint="Write a class name a line, in UTF-8.").splitlines()
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if "" in names or not names:
        raise BadDataError(
            f"{path}: line {names.index('') + 1 if names else 1} is empty", "Write a class name a line."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadDataError(f"{path} names the class '{twice}' twice", "Give every class a name of its own.")
    require_distinct(names, str(path))
    return names


def numbered(
    values: Sequence[str], names: tuple[str, ...] | None, where: str
) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Labels as indices into the names of classes.

    Args:
        values: a class each, empty without a label: its name, or its number in ``names`` where all are numbers.
        names: of the classes in order; None: all that there are, in plain string order.
        where: the labels, for messages.

    Raises:
        BadDataError: two classes look the same, a value is none of ``names``, or one's name and another's number.
    """
    different = set(values) - {""}
    if names is None:
        names = tuple(sorted(different))
        require_distinct(names, where)
        numbers = {}
    else:
        numbers = {str(number): number for number in range(len(names))}
    index = {name: number for number, name in enumerate(names)}
    if numbers and all(map(is_number, different)):
        by_name = different <= index.keys()
        if by_name and (unsure := sorted(each for each in different if index[each] != numbers.get(each))):
            raise BadDataError(
                f"{where}: '{unsure[0]}' is the name of one class of names= and the number of another",
                "Leave names= out where labels are names; else give the classes names that are no numbers.",
            )
        index = index if by_name else numbers
    if unknown := sorted(different - index.keys()):
        raise BadDataError(
            f"{where}: '{unknown[0]}' is none of the {len(names)} classes of names=.{nearest(unknown[0], names)}",
            "Name all classes, in the order of their numbers from 0; leave names= out where a value holds several.",
        )
    index[""] = -1
    return np.fromiter((index[value] for value in values), np.int64, len(values)), names


def named(values: Collection[str], where: str) -> tuple[str, ...]:
    """The classes that there are, in plain string order, where their labels are no mere numbers.

    Args:
        values: labels of all images; empty without one.
        where: the source, for messages.

    Raises:
        UsageError: all are numbers, so somebody has to say of which classes.
        BadDataError: two look the same.
    """
    names = tuple(sorted(set(values) - {""}))
    if names and all(map(is_number, names)):
        most = max(map(int, names))
        raise UsageError(
            f"{where}: the labels are numbers, from {min(map(int, names))} to {most}",
            f"Say what the classes are called: names=FILE, a name a line, or a {CLASSES} beside the data; "
            f"names={most + 1} calls them by their numbers.",
        )
    require_distinct(names, where)
    return names


def split_of(file: str) -> str:
    """The split that a word of a file's path names (``train-0001.tar``, ``val/0001.tar``); empty where none does."""
    words = re.split(r"[/._-]", file.lower())
    return next((canonical_split(word) for word in words if word in SPLIT_NAMES), "")


def is_number(text: str) -> bool:
    """Whether a label is a class's number, written as numbers are."""
    return text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")


def label_text(value: object, where: str) -> str:
    """The class in a cell or a document: text, a whole number, or several of these, joined by ``|``; empty for none.

    A list without labels says more than a cell without a value: it is ``|``, an image that has none of the labels.

    Raises:
        BadDataError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        parts = [label_text(part, where) for part in value if not isinstance(part, list)]
        if len(parts) == len(value) and all(part and "|" not in part for part in parts):
            return "|".join(parts) or "|"
    raise BadDataError(
        f"{where}: {str(value)[:80]!r} is no label",
        "A label is text, a whole number, or a list of these without |.",
    )


def untrained(splits: Mapping[str, Collection[str]], where: str) -> list[str]:
    """Classes of other splits that the training images lack, a line a split.

    Args:
        splits: the classes of each.
        where: the source, for messages.
    """
    trained = {name for split, names in splits.items() if canonical_split(split) == "train" for name in names}
    found = []
    for split, names in sorted(splits.items()):
        if trained and (extra := sorted(set(names) - trained)):
            found.append(
                f"{where}: {len(extra)} of {len(set(names))} classes of '{split}' have no training images, such as "
                f"'{extra[0]}'"
            )
    return found
