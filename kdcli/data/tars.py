"""WebDataset's shards: ``tar/PATH``, a tar, a folder of them, or a pattern such as ``tar/train-*.tar``.

* A sample is the files of one name up to the first dot behind the last slash: ``01.jpg``, ``01.cls``, ``01.json``.
* A key is ``SHARD/MEMBER``: the tar's path below the folder, or below what of the pattern is no pattern, and the name
  of the image in it.
* Labels are the text of ``.cls`` files, or of others: ``label=txt``, ``label=json:FIELD``. Numbers need ``names=``, or
  a ``classes.txt`` beside the shards.
* A shard is of a split where a word of its path is one's name (``train-0001.tar``, ``val/0001.tar``).
* Hidden files are skipped. What is in a tar is not trusted: see :mod:`kdcli.data.tar_index`.
"""

import re
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from kdcli.cache.keytable import KeyTable
from kdcli.console import console, counted
from kdcli.data.base import ImageSource, Listing, Opening, SourceKind
from kdcli.data.decode import bad_image
from kdcli.data.formats import EXTENSIONS, IMAGE_BYTES
from kdcli.data.kept_listing import kept_listing
from kdcli.data.paths import FileStamp, Found, Reader
from kdcli.data.remote import find_here_or_there
from kdcli.data.tables import (
    CLASSES,
    NAMES,
    label_text,
    named,
    names_asked,
    numbered,
    rows_of,
    split_of,
    untrained,
)
from kdcli.data.tar_index import TarIndex, index_of
from kdcli.data.walk import SYSTEM
from kdcli.errors import BadDataError, UsageError, nearest
from kdcli.reading import parse_json

_CLASS: Final = "cls"
_LABEL_BYTES: Final = 2**20
_TEXT: Final = 1000
_FIELD: Final = "Choose other files: label=ENDING, or label=json:FIELD."
_ALLOWED: Final = "allowed"


@final
@dataclass(slots=True)
class _Shard:
    """A tar and what is in it.

    Attributes:
        name: its path below the folder.
        stamp: the file.
        index: where its files lie.
        samples: rows of the index by ending in lower case, by the name of the sample.
        images: the row of each sample's image.
    """

    name: str
    stamp: FileStamp
    index: TarIndex
    samples: dict[str, dict[str, int]]
    images: dict[str, int]


@final
class TarSource(ImageSource):
    """Shards of images.

    Args:
        text: what reopens it.
        found: the shards, and the modifiers of :data:`TAR` that were given.
    """

    def __init__(self, text: str, found: Found) -> None:
        self._text, self._where, self._base = text, found.where, found.base
        self._stamps, self._options = found.stamps, dict(found.options)
        self._near: dict[FileStamp, int] = {}  # behind what was last looked for in each

    @classmethod
    def open(cls, opening: Opening) -> "TarSource":
        """Open ``tar/REST``; nothing in a tar is read yet.

        Raises:
            NotFoundError: there is no such file.
            UsageError: ``repeats=`` is not allowed.
            StorageError: a file cannot be looked at.
        """
        found = find_here_or_there(opening, ".tar")
        if (repeats := opening.options.get("repeats", _ALLOWED)) != _ALLOWED:
            raise UsageError(
                f"repeats={repeats} is not {_ALLOWED}", f"Give repeats={_ALLOWED}, or leave it out."
            )
        return cls(f"{opening.scheme}/{found.place}", found)

    @property
    def text(self) -> str:
        """``tar//absolute/path``, or ``tar/URL``."""
        return self._text

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`; a task is what ``label=`` may be."""
        asked = {"text": self._text, "options": self._options, "split": split, "task": task}
        names = self._base / self._options.get("names", CLASSES)
        stamps = [*self._stamps.values(), *([FileStamp.of(names)] if names.is_file() else ())]
        return kept_listing("tars", asked, stamps, lambda: self._listing(split, task))

    def _listing(self, split: str | None, task: str | None) -> Listing:
        shards = []
        with console.progress(len(self._stamps), "shards", "reading what is in them") as bar:
            for name, stamp in self._stamps.items():
                shards.append(self._shard(name, stamp))
                bar.advance(1)
        splits = [split_of(shard.name) for shard in shards]
        chosen = [shards[row] for row in rows_of(splits, split, self._text)]
        keys = [f"{shard.name}/{shard.index.names[row]}" for shard in chosen for row in shard.images.values()]
        if not keys:
            raise BadDataError(
                f"there are no images in {self._text.partition('/')[2]}",
                f"{', '.join(each[1:] for each in sorted(EXTENSIONS))} are read, hidden files are not.",
            )
        self._require_different(chosen)
        order = np.argsort(np.array(keys, dtype=object), kind="stable")
        table = KeyTable.from_strings(keys[row] for row in order)
        label = task or self._options.get("label") or self._usual_label(shards)
        if label is None:
            note = f"{self._text} is used without labels: say which files hold them: {self._choices(shards)}"
            return Listing(table, np.full(len(keys), -1), None, (note,))
        asked = names_asked(self._options.get("names"), self._base, CLASSES)
        values = {shard.name: self._values(shard, label) for shard in (chosen if asked else shards)}
        if not any(any(each) for each in values.values()):
            raise UsageError(f"{self._text} has no labels '{label}'", f"Give {self._choices(shards)}.")
        mine = [value for shard in chosen for value in values[shard.name]]
        names = asked or named({value for each in values.values() for value in each}, self._text)
        labels, class_names = numbered(mine, names, self._text)
        classes: dict[str, set[str]] = {}
        for shard, name in zip(shards, splits, strict=True):
            classes.setdefault(name, set()).update(set(values.get(shard.name, ())) - {""})
        bare = mine.count("")
        notes = [f"{self._text}: {bare} of {counted(len(mine), 'images')} have no {label}"] if bare else []
        if not asked:
            notes += untrained(classes, self._text)
        return Listing(table, labels[order], class_names, tuple(notes))

    def _shard(self, name: str, stamp: FileStamp) -> _Shard:
        index, samples = index_of(stamp), dict[str, dict[str, int]]()
        for row, member in enumerate(index.names):
            *folders, file = member.split("/")
            if any(part.startswith(".") or part.lower() in SYSTEM for part in (*folders, file)):
                continue
            stem, _, ending = file.partition(".")
            files = samples.setdefault("/".join((*folders, stem)), {})
            if (ending := ending.lower()) in files:
                raise BadDataError(
                    f"{self._where}/{name}: {index.names[files[ending]]} and {member} differ only by case",
                    "Rename one of them, and write the tar again.",
                )
            files[ending] = row
        images = {
            sample: self._image(files, f"{self._where}/{name}: {sample}") for sample, files in samples.items()
        }
        return _Shard(
            name, stamp, index, samples, {sample: row for sample, row in images.items() if row is not None}
        )

    def _image(self, files: dict[str, int], where: str) -> int | None:
        """The row of a sample's image."""
        asked = self._options.get("image")
        endings = [each for each in files if (each == asked.lower() if asked else _is_image(each))]
        if len(endings) > 1:
            raise UsageError(
                f"{where} has {len(endings)} images: {', '.join(endings)}",
                f"Say which is meant by its ending: image={endings[0]}",
            )
        return files[endings[0]] if endings else None

    def _require_different(self, shards: list[_Shard]) -> None:
        """Refuse a sample that two shards have: a shard was copied, or their numbers begin anew."""
        if "repeats" in self._options:
            return
        seen: dict[str, str] = {}
        for shard in shards:
            for sample in shard.images:
                if sample in seen:
                    raise BadDataError(
                        f"{self._where}: the sample {sample} is in {seen[sample]} and in {shard.name}",
                        "Leave one of the shards out; if they are different images, say so: repeats=allowed",
                    )
                seen[sample] = shard.name

    # --- labels ---

    def _usual_label(self, shards: list[_Shard]) -> str | None:
        return (
            _CLASS if any(_CLASS in files for shard in shards for files in shard.samples.values()) else None
        )

    def _choices(self, shards: list[_Shard]) -> str:
        """What ``label=`` may be, by the first sample."""
        files = next((files for shard in shards for files in shard.samples.values() if len(files) > 1), {})
        rest = [each for each in files if not _is_image(each)]
        told = [f"label={each}{':FIELD' if each.endswith('json') else ''}" for each in rest]
        return " or ".join(told) or "shards with .cls or .json files beside the images"

    def _values(self, shard: _Shard, label: str) -> list[str]:
        """The label of each image, as text; empty where it has none."""
        ending, _, field = label.partition(":")
        if not field and ending.rpartition(".")[2] == "json":
            raise UsageError(f"label={label} names no field of the files", self._fields(shard, ending))
        rows = [shard.samples[sample].get(ending) for sample in shard.images]
        with shard.stamp.opened() as read:
            return ["" if row is None else self._value(shard, row, field, read) for row in rows]

    def _fields(self, shard: _Shard, ending: str) -> str:
        """Which fields the first of some JSON files has, for a hint."""
        row = next((files[ending] for files in shard.samples.values() if ending in files), None)
        fields: list[str] = []
        if row is not None and (size := int(shard.index.sizes[row])) <= _LABEL_BYTES:
            with shard.stamp.opened() as read:
                document = parse_json(read(int(shard.index.starts[row]), size), shard.index.names[row])
            fields = list(document)[:20] if isinstance(document, dict) else []
        return f"Give label={ending}:FIELD." + (f" Its fields are {', '.join(fields)}." if fields else "")

    def _value(self, shard: _Shard, row: int, field: str, read: Reader) -> str:
        where, size = f"{self._where}/{shard.name}/{shard.index.names[row]}", int(shard.index.sizes[row])
        if size > _LABEL_BYTES:
            raise BadDataError(f"{where} has {size} bytes; at most {_LABEL_BYTES} are read", _FIELD)
        data = read(int(shard.index.starts[row]), size)
        if field:
            document = parse_json(data, where)
            if not isinstance(document, dict):
                raise BadDataError(
                    f"{where} holds no fields", "Give label=json:FIELD where each .json is a mapping."
                )
            if field not in document:
                raise UsageError(
                    f"{where} has no field '{field}'.{nearest(field, document)}",
                    f"Its fields are {', '.join(list(document)[:20])}.",
                )
            return label_text(document[field], where)
        try:
            text = data.decode().strip()
        except UnicodeDecodeError as error:
            raise BadDataError(f"{where} is not text in UTF-8", "Write labels as text.") from error
        if len(text) > _TEXT or "\n" in text:
            raise BadDataError(
                f"{where} is no label: it has {counted(len(text), 'characters')} or several lines", _FIELD
            )
        return text

    # --- samples ---

    def _found(self, key: str) -> tuple[FileStamp, TarIndex, int] | None:
        for slash in re.finditer("/", key):
            stamp = self._stamps.get(key[: slash.start()])
            if stamp is not None:
                index = index_of(stamp)
                row = index.find(key[slash.end() :], self._near.get(stamp, 0))
                self._near[stamp] = row + 1
                return (stamp, index, row) if row >= 0 else None
        return None

    def encoded(self, key: str) -> bytes:
        """The bytes of the file in the tar."""
        if (found := self._found(key)) is None:
            raise bad_image(self.path(key), "no such file in the tar")
        stamp, index, row = found
        if index.sizes[row] > IMAGE_BYTES:
            raise bad_image(self.path(key), f"{index.sizes[row]} bytes; at most {IMAGE_BYTES} are read")
        with stamp.opened() as read:
            return read(int(index.starts[row]), int(index.sizes[row]))

    def size(self, key: str) -> int:
        """Size of the file; -1 when it is gone."""
        found = self._found(key)
        return -1 if found is None else int(found[1].sizes[found[2]])

    def path(self, key: str) -> str:
        """The tar's absolute path, and the image's in it."""
        return f"{self._where}/{key}"


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in EXTENSIONS


TAR = SourceKind(
    "WebDataset's shards: tar/PATH, a tar, a folder of them, or a pattern",
    TarSource.open,
    options={
        "label": "files of labels by their ending: cls, json:FIELD",
        "image": "ending of the image, where samples have several",
        "names": NAMES,
        "repeats": f"{_ALLOWED}: shards may have samples of the same name",
    },
)
