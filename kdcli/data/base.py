"""What every source of images promises, and what the row-numbered ones share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.cache.shelf import Stage
from kdcli.data.decode import decode_image
from kdcli.data.photos import Picture, open_photo
from kdcli.data.spec import canonical_split
from kdcli.errors import NotFoundError, UsageError, nearest
from kdcli.types import DecodeMode


@final
@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """All samples of one split, in the plain string order of their keys.

    Attributes:
        keys: stable names of the samples.
        labels: indices into ``class_names``, -1 for samples without a label.
        class_names: of the whole source, so that all its splits agree; None without labels.
        notes: what a user should know about it, a line each: what was left out, what is odd.
    """

    keys: KeyTable
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def select(self, rows: Int64[np.ndarray, " m"]) -> "Listing":
        """Some of the samples, in that order."""
        return Listing(self.keys.select(rows), self.labels[rows], self.class_names, self.notes)


class ImageSource(ABC):
    """A place that images come from, by key. Small and picklable: the keys themselves live elsewhere.

    As it is here, the bytes of a sample are those of an image file.

    Attributes:
        clips: whether its samples are clips.
    """

    clips: bool = False

    @property
    @abstractmethod
    def text(self) -> str:
        """The canonical source part of a spec that reopens this from any working directory."""

    @abstractmethod
    def listing(self, split: str | None, task: str | None) -> Listing:
        """The samples of ``split`` (None: all) with the labels of ``task`` (None: the default).

        Raises:
            NotFoundError: there is no such split.
            UsageError: there is no such task.
        """

    @abstractmethod
    def encoded(self, key: str) -> bytes:
        """The bytes of a sample, over which its identity is computed."""

    def size(self, key: str) -> int:
        """Number of encoded bytes, cheaply; -1 where that needs decoding or the sample is gone."""
        return -1

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        """The upright RGB image in a sample's encoded bytes; of a clip, its first, middle and last frame in a row.

        Raises:
            BadDataError: naming the sample and the reason.
        """
        return decode_image(encoded, self.path(key))

    def photo(self, key: str, encoded: bytes) -> Picture:
        """The same for ``--decode scaled``: decoded as far as is needed, where :meth:`decode` takes image files.

        Raises:
            BadDataError: as :meth:`decode` does, now or when it is drawn.
        """
        if type(self).decode is ImageSource.decode:
            return open_photo(encoded, self.path(key))
        return self.decode(key, encoded)

    def picture(self, key: str, encoded: bytes, how: DecodeMode) -> Picture:
        """What views are drawn of: :meth:`photo` or :meth:`decode`, as ``--decode`` says; of a clip, all of it.

        Raises:
            BadDataError: as they do.
        """
        return self.photo(key, encoded) if how == "scaled" else self.decode(key, encoded)

    def path(self, key: str) -> str:
        """What a person calls the sample: its file, or ``source#key``."""
        return f"{self.text}#{key}"

    def random_cost(self) -> str:
        """What an image costs in random order, as measured, and what to do; empty where it costs little more."""
        return ""

    def keys_in(self, keys: KeyTable, sources: Collection[str]) -> KeyTable:
        """What a cache made from the data sets ``sources`` (texts of theirs) calls these samples."""
        return keys


@final
@dataclass(frozen=True, slots=True)
class Opening:
    """What a source is opened with.

    Attributes:
        scheme: what its kind is called here; ``SCHEME/REST`` reopens it.
        rest: what stands behind the slash.
        data_root: folder of relative paths; None: the working directory.
        download: whether it may be downloaded.
        options: values of the kind's own modifiers that were given.
        stage: where files of a store are brought to.
    """

    scheme: str
    rest: str
    data_root: Path | None = None
    download: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    stage: Stage = field(default_factory=Stage)


@final
@dataclass(frozen=True, slots=True)
class SourceKind:
    """All sources of the form ``SCHEME/REST``; kdcli/registry.py lists kd's own by scheme.

    Attributes:
        summary: what they are, in one line.
        open: opens one; raises NotFoundError, MissingExtraError, BadDataError or StorageError.
        names: every REST there is; empty where it may be anything.
        options: modifiers of its own, ``@KEY=VALUE``, with what they do.
    """

    summary: str
    open: Callable[[Opening], ImageSource]
    names: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


def pick_split(split: str, splits: Sequence[str], where: str) -> str:
    """The member of ``splits`` that a user means by ``split``; long forms and case do not matter.

    Raises:
        NotFoundError: there is none.
    """
    if split in splits:
        return split
    for name in splits:
        if canonical_split(name) == canonical_split(split):
            return name
    raise NotFoundError(
        f"{where} has no split '{split}'.{nearest(split, splits)}",
        f"Its splits are {', '.join(splits)}." if splits else "Leave split= out.",
    )


def pick_task(task: str | None, tasks: Sequence[str], where: str) -> str:
    """The label task that a user means; the first one is the default.

    Raises:
        UsageError: there is none of that name.
    """
    if task is None:
        return tasks[0]
    if task not in tasks:
        raise UsageError(
            f"{where} has no labels '{task}'.{nearest(task, tasks)}",
            f"Use labels= with {', '.join(tasks)} or none.",
        )
    return task


def numbered_listing(
    rows: Mapping[str, Int64[np.ndarray, " m"]],
    labels: Mapping[str, Int64[np.ndarray, " m"]],
    split: str | None,
    class_names: tuple[str, ...] | None,
    where: str,
    width: int = 7,
) -> Listing:
    """The listing of a source whose samples are numbered: keys are ``train/0000012``.

    Args:
        rows: numbers of the samples of each split, ascending.
        labels: their labels.
        split: what the user asked for; None for all splits.
        class_names: of the whole source.
        where: the source, for messages.
        width: digits of the number.
    """
    names = sorted(rows) if split is None else [pick_split(split, sorted(rows), where)]
    keys = KeyTable.from_strings(f"{name}/{row:0{width}d}" for name in names for row in rows[name].tolist())
    return Listing(keys, np.concatenate([labels[name] for name in names]).astype(np.int64), class_names)


def split_and_row(key: str) -> tuple[str, int]:
    """Undo the keys of :func:`numbered_listing`."""
    split, _, row = key.rpartition("/")
    return split, int(row)
