"""Files of a source that lie in a store: ``tar/s3://BUCKET/PATH``, an object, a folder, or a pattern in quotes.

What matches is looked up whenever a data set is opened. Each object is brought whole to the stage
(:mod:`kdcli.cache.shelf`) once, by whichever process comes first, and is called by its URL and its edition there: a
changed object is another file. The ordinary source reads it, so keys, classes, splits and labels are those of the same
files in a folder. It stays where it is for as long as the process lives.
"""

import glob
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, Self, final

from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.places import Entry, Place
from kdcli.cache.stores.whole import bring
from kdcli.data.base import Opening
from kdcli.data.paths import FileStamp, Found, find_files
from kdcli.data.tables import CLASSES
from kdcli.errors import BadDataError, KdError, NotFoundError, UsageError

_FIRST: Final = {"hf": 3}
"""Parts of an address that are no path: a bucket; ``datasets/ORG/NAME``."""
_ODD: Final = re.compile(r"[\x00-\x1f\x7f\\]")


@final
@dataclass(frozen=True, slots=True)
class Objects:
    """An address, taken apart.

    Attributes:
        url: as it was typed, without a slash at its end.
        base: of the folder of all that it may mean; the address itself where it is no pattern.
        pattern: of their paths below it, part by part; empty where it is none.
    """

    url: str
    base: str
    pattern: tuple[str, ...]

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read an address; nothing is asked of a store.

        Raises:
            UsageError: it is none; what may be a password is not repeated.
            MissingExtraError: the package for such stores is not installed.
        """
        scheme, _, rest = url.rstrip("/").partition("://")
        if scheme in ("http", "https"):
            raise UsageError(
                f"data sets are not read from {scheme}://",
                "Fetch the files and give their folder; or give s3://, gs://, az://, file:// or hf://datasets/...",
            )
        if re.search(r"\?[^/]*=", rest):
            raise UsageError(
                f"this {scheme}:// address holds more than a bucket and a path",
                "Leave credentials out of it: they come from the environment.",
            )
        steps, first = rest.split("/"), _FIRST.get(scheme, 1)
        fixed = next((n for n, step in enumerate(steps) if n >= first and glob.has_magic(step)), len(steps))
        found = cls(f"{scheme}://{rest}", f"{scheme}://{'/'.join(steps[:fixed])}", tuple(steps[fixed:]))
        open_place(found.base)
        return found

    def find(self, ending: str) -> tuple[Place, dict[str, Entry]]:
        """The folder, and what is meant in it, by path below it, sorted.

        Args:
            ending: of the names of objects in a folder.

        Raises:
            NotFoundError: there is none.
            StorageError: the store refuses, or does not answer.
        """
        place = open_place(self.base)
        if self.pattern:
            found = {n: e for n, e in place.entries().items() if _matches(n.split("/"), self.pattern)}
            hint = (
                f"Check the pattern: it is compared with all that is below {place.name}; quote it in a shell."
            )
            what = f"no object matches {self.url}"
        else:
            above, _, name = self.base.rpartition("/")
            if above.count("/") >= 1 + _FIRST.get(self.base.partition(":")[0], 1):
                parent = open_place(above)
                if (entry := parent.entry(name)) is not None:
                    return parent, {name: entry}
            names = place.entries().items()
            found = {
                n: e for n, e in names if n.lower().endswith(ending) and not _is_hidden(n.rpartition("/")[2])
            }
            what, hint = (
                f"there is no {ending} object at {self.url}",
                f"Give a {ending} object, a folder of them, or a pattern.",
            )
        if not found:
            raise NotFoundError(what, hint)
        for name in found:
            if _ODD.search(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise BadDataError(f"{place.name} has an object {name!r}, which is no path", "Rename it.")
        return place, dict(sorted(found.items()))


def _matches(parts: list[str], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches, as :func:`glob.glob` finds files of a folder."""
    if not pattern or not parts:
        return not pattern and not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        if not rest:
            return not any(map(_is_hidden, parts))
        return _matches(parts, rest) or (not _is_hidden(parts[0]) and _matches(parts[1:], pattern))
    if _is_hidden(parts[0]) and not _is_hidden(first):
        return False
    return fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def is_remote(rest: str) -> bool:
    """Whether ``SCHEME/REST`` means objects in a store."""
    return re.match(r"[a-z][a-z0-9+.-]*://", rest) is not None


def find_here_or_there(opening: Opening, ending: str) -> Found:
    """The files that are meant, here or in a store; raises as :func:`find_files` and :func:`find_objects`."""
    return (find_objects if is_remote(opening.rest) else find_files)(opening, ending)


def find_objects(opening: Opening, ending: str) -> Found:
    """The files of a source in a store, brought here; see :func:`~kdcli.data.paths.find_files`.

    A file of class names comes along: ``names=``, or the usual one beside them.

    Raises:
        KdError: as :class:`Objects` and :func:`~kdcli.cache.stores.whole.bring` say.
    """
    objects, options = Objects.parse(opening.rest), dict(opening.options)
    place, found = objects.find(ending)
    asked = options.get("names")
    usual = place.entry(CLASSES) if asked is None else None
    if usual is not None:
        asked = CLASSES
    if asked is not None and not asked.isdecimal() and not Path(asked).is_absolute():
        entry = usual or place.entry(asked)
        if entry is None:
            raise NotFoundError(
                f"there is no object {place.name}/{asked}",
                "names= is one beside the shards, a file here by its absolute path, or how many classes there are.",
            )
        files = bring(place, {**found, asked: entry}, opening.stage)
        options["names"] = str(files[asked])
    else:
        files = bring(place, found, opening.stage)
    base = files[next(iter(found))].parent  # where nothing is but one edition of objects
    stamps = {name: FileStamp.of(files[name]) for name in found}
    for name, stamp in stamps.items():
        KdError.names[stamp.path] = f"{place.name}/{name}"
    return Found(objects.url, place.name, base, stamps, options)
