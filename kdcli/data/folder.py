"""A folder of image files: ``[SPLIT/]CLASS/.../NAME.jpg``, or images without classes, or a labels.csv.

* Keys are posix paths below the folder, with the split's folder, in plain string order.
* Splits are sub folders (train, val, test, their long forms, or any other that is asked for by name).
* The class is the first sub folder below the split; class folders of all splits make one list of classes,
  so a class that one split lacks does not shift the labels of another.
* ``labels.csv`` in the folder has a column ``key`` and one column per further task (``labels=TASK``).
* Symbolic links are followed; hidden files are skipped. What else is left out is said (:mod:`kdcli.data.walk`), and
  refused where a class would vanish with it.
"""

import errno
import os
from pathlib import Path
from shlex import quote
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.console import counted
from kdcli.data.base import ImageSource, Listing, SourceKind, pick_split, pick_task
from kdcli.data.decode import bad_image
from kdcli.data.formats import ARCHIVES, EXTENSIONS, FRAMES, IMAGE_BYTES, TABLES, VIDEOS
from kdcli.data.labels_file import LABELS_FILE, LabelsFile
from kdcli.data.leftovers import leftovers, require_no_class_lost
from kdcli.data.names import require_distinct
from kdcli.data.spec import JOIN, SPLIT_NAMES, canonical_split, split_modifiers
from kdcli.data.tables import untrained
from kdcli.data.walk import Walk, sample_folders
from kdcli.errors import BadDataError, NotFoundError, UsageError, nearest
from kdcli.files import beside, storage_errors
from kdcli.reading import read_bytes
from kdcli.registry import SOURCES

CLASS_TASK = "class"
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.zst")


@final
class FolderSource(ImageSource):
    """Image files below ``root``, or others.

    Args:
        root: absolute path of the folder.
        endings: of the files that are samples.
        scheme: with its slash, where a data string of it needs one.
    """

    def __init__(self, root: Path, endings: frozenset[str] = EXTENSIONS, scheme: str = "") -> None:
        self._root, self._endings, self._scheme = root, endings, scheme
        self._things = "images" if endings is EXTENSIONS else "videos"

    @classmethod
    def open(cls, path: Path, endings: frozenset[str] = EXTENSIONS) -> "FolderSource":
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
            raise BadDataError(
                f"{root} is a file, not a folder of {'images' if endings is EXTENSIONS else 'videos'}",
                _opened(root) or f"Give its folder: {root.parent}",
            )
        return cls(root, endings)

    @property
    def text(self) -> str:
        """``folder//absolute/path``."""
        return f"folder/{self._root.as_posix()}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        """See :meth:`ImageSource.listing`."""
        with storage_errors(self._root):
            folders = sample_folders(self._root, self._endings)
            walk = Walk(self._root, self._split_prefix(split, folders), self._endings)
            keys = list(walk.keys())
            if not keys:
                raise self._nothing(walk)
            labels = self._labels_file()
            task = pick_task(task, (CLASS_TASK, *(labels.tasks if labels else ())), str(self._root))
            table = KeyTable.from_strings(keys)
            if task != CLASS_TASK and labels is not None:
                values, names, said = labels.labels(keys, walk.prefix, task)
                return Listing(table, values, names, (*leftovers(walk, labelled=False), *said))
            classes, said = self._classes(keys, walk.prefix, folders)
        if classes is not None:
            require_no_class_lost(walk, keys)
        elif labels is not None:
            said.append(
                f"{self._root}: {LABELS_FILE} is not used: choose its labels with @labels={'|'.join(labels.tasks)}"
            )
        notes = (*self._notes(folders, walk.prefix), *leftovers(walk, labelled=classes is not None), *said)
        return Listing(table, _class_labels(keys, walk.prefix, classes), classes, notes)

    def _nothing(self, walk: Walk) -> BadDataError:
        """The error for a folder without images, with what it has instead."""
        instead = [
            f"{counted(len(tally), things)}{which} ({tally.example})"
            for tally, things, which in (
                (walk.strange, "images", " of kinds that kd does not read"),
                (walk.nameless, "images", " without an ending such as .jpg in the name"),
                (walk.archives, "archives", " that kd does not look into"),
                (walk.videos, "videos", ""),
            )
            if len(tally)
        ]
        example = ".jpg" if self._endings is EXTENSIONS else ".mp4"
        but = f", but {', '.join(instead)}" if instead else ""
        return BadDataError(
            f"there are no {self._things} in {self._root / walk.prefix}{but}",
            _opened(self._root / (walk.archives.example or walk.videos.example))
            or f"Give the folder that holds CLASS/NAME{example}, or NAME{example} without classes; "
            f"{', '.join(each[1:] for each in sorted(self._endings))} are read, hidden files are not.",
        )

    def _labels_file(self) -> LabelsFile | None:
        path = self._root / LABELS_FILE
        return LabelsFile(path) if os.path.lexists(path) else None

    def _notes(self, folders: list[str], prefix: str) -> tuple[str, ...]:
        """What is to be said of a class that is called like a split."""
        split_like = [name for name in folders if name.lower() in SPLIT_NAMES]
        if prefix or not split_like:
            return ()
        return (f"{self._root}: the folder '{split_like[0]}' is taken as a class, not as a split",)

    def _split_prefix(self, split: str | None, folders: list[str]) -> str:
        """The split's folder and a slash; empty without splits."""
        split_like = [name for name in folders if name.lower() in SPLIT_NAMES]
        if split is not None:
            return self._asked_split(split, folders if split in folders else split_like, folders) + "/"
        kinds = {canonical_split(name) for name in split_like}
        nested = any(sample_folders(self._root / name, self._endings) for name in split_like)
        if split_like and (len(split_like) == len(folders) or len(kinds) > 1 or nested):
            first = min(split_like, key=lambda name: canonical_split(name) != "train")
            raise UsageError(
                f"{self._root} holds splits ({', '.join(split_like)}), not classes",
                f"Say which: {self._scheme}{self._root}@split={first}",
            )
        return ""

    def _asked_split(self, split: str, candidates: list[str], folders: list[str]) -> str:
        if candidates:
            return pick_split(split, candidates, str(self._root))
        found = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
        raise NotFoundError(
            f"{self._root} has no split '{split}'; its folders with {self._things}: {found or 'none'}",
            "Leave split= out to use the whole folder.",
        )

    def _classes(
        self, keys: list[str], prefix: str, folders: list[str]
    ) -> tuple[tuple[str, ...] | None, list[str]]:
        """Class folders of this split and of all others, None for images without classes; and what to say of them."""
        directly = next((key for key in keys if "/" not in key[len(prefix) :]), None)
        nested = next((key for key in keys if "/" in key[len(prefix) :]), None)
        if directly and nested:
            raise BadDataError(
                f"{self._root / prefix} has {self._things} with and without a class folder: {nested}, {directly}",
                "Move them all into class folders, or all out of them.",
            )
        if directly:
            return None, []
        splits = {prefix[:-1]: {key[len(prefix) :].split("/", 1)[0] for key in keys}}
        if prefix:
            others = [name for name in folders if name.lower() in SPLIT_NAMES and name != prefix[:-1]]
            splits |= {name: set(sample_folders(self._root / name, self._endings)) for name in others}
        names = sorted(set().union(*splits.values()))
        require_distinct(names, f"{self._root}{' (all splits)' if len(splits) > 1 else ''}")
        return tuple(names), untrained(splits, str(self._root))

    def encoded(self, key: str) -> bytes:
        """The bytes of the file."""
        path = self._root / key
        with storage_errors(path):
            try:
                return read_bytes(path, IMAGE_BYTES)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                    raise
                raise bad_image(str(path), "no such file (removed, or a link that leads nowhere)") from error
            except BadDataError as error:
                raise bad_image(str(path), error.message.removeprefix(f"{path} ")) from error

    def size(self, key: str) -> int:
        """Size of the file; -1 when it is gone."""
        try:
            return (self._root / key).stat().st_size
        except OSError:
            return -1

    def path(self, key: str) -> str:
        """Absolute path of the file."""
        return str(self._root / key)


def _opened(file: Path) -> str:
    """How to get at the images in a file; nothing of a kind that holds none."""
    name = file.name.lower()
    if name.endswith(VIDEOS):
        return FRAMES.format(quote(str(file)))
    if name.endswith(TABLES):
        return f"A table of paths is given as csv/{file}"
    if name.endswith(".parquet"):
        return f"Parquet with images in it is given as parquet/{file}"
    if not name.endswith(ARCHIVES):
        return ""
    place = quote(str(file.parent / file.name.partition(".")[0]))
    tool = (
        f"unzip {quote(str(file))} -d {place}"
        if name.endswith(".zip")
        else f"mkdir -p {place} && tar -xf {quote(str(file))} -C {place}"
    )
    shards = f"Shards with labels are given as tar/{file}. " if name.endswith(".tar") else ""
    return f"{shards}Unpack it, then give that folder: {tool if name.endswith(('.zip', *_TARS)) else place}"


def _class_labels(keys: list[str], prefix: str, classes: tuple[str, ...] | None) -> Int64[np.ndarray, " n"]:
    if classes is None:
        return np.full(len(keys), -1)
    index = {name: number for number, name in enumerate(classes)}
    return np.fromiter((index[key[len(prefix) :].split("/", 1)[0]] for key in keys), np.int64, len(keys))


def embedded_names() -> tuple[str, ...]:
    """Sources that there is a full list of: those that come inside packages."""
    return tuple(f"{scheme}/{name}" for scheme, kind in SOURCES.items() for name in kind.names)


def find_folder(text: str, data_root: Path | None) -> Path:
    """The folder of ``folder/REL``, or of what only looks like a scheme.

    Raises:
        NotFoundError: nothing is there; near names of embedded sources are suggested.
    """
    scheme, _, rest = text.partition("/")
    if "://" in rest:
        raise NotFoundError(
            f"folders of images are not read from a store ({rest.partition('://')[0]}://...)",
            "Write the images into tars or Parquet files there: tar/s3://BUCKET/PATH, parquet/s3://BUCKET/PATH",
        )
    wanted = [rest, text] if scheme == "folder" and rest else [text]
    roots = [data_root, Path()] if data_root else [Path()]
    for name in wanted:
        for root in roots:
            with storage_errors(root / name):
                if (root / name).exists():
                    return root / name
    data, modifiers = split_modifiers(text)
    if modifiers:
        raise NotFoundError(
            f"'{text}' is no data set, and a second @ begins no modifiers: they stand behind one, with commas between",
            f"Write {data}@{modifiers},MORE",
        )
    if scheme != "folder":
        raise NotFoundError(
            f"unknown data set '{text}'.{nearest(text, embedded_names())}",
            f"Known: {', '.join(embedded_names())}; torch/NAME, hfds/NAME, csv/FILE, tar/PATH, parquet/PATH; or a "
            "folder.",
        )
    where = f" below {data_root} or {Path.cwd()}" if data_root else f" below {Path.cwd()}"
    near = [beside(root / rest) for root in roots] + [nearest(rest, embedded_names())]
    raise NotFoundError(
        f"there is no folder '{rest}'{'' if Path(rest).is_absolute() else where}."
        + next(filter(None, near), ""),
        f"Behind {JOIN}, a folder is written folder/PATH."
        if JOIN in rest
        else "Check the path, give --data-root, or use an embedded set such as sklearn/digits.",
    )


FOLDER = SourceKind(
    "a folder of images: [SPLIT/]CLASS/NAME.jpg, or images alone, or with a labels.csv",
    lambda opening: FolderSource.open(find_folder(f"{opening.scheme}/{opening.rest}", opening.data_root)),
)
