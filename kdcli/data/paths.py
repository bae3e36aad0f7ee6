"""The files that ``SCHEME/REST`` means: one, or all that a folder holds or a pattern matches."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kdcli.data.base import Opening
from kdcli.errors import NotFoundError
from kdcli.files import beside, storage_errors


def find_file(opening: Opening) -> Path:
    """The absolute path of the file of ``SCHEME/FILE``, below the data root or here.

    Raises:
        NotFoundError: there is none; what lies beside it is suggested.
        StorageError: it cannot be looked at.
    """
    places = [root / opening.rest for root in (opening.data_root, Path()) if root is not None]
    for place in places:
        with storage_errors(place):
            if place.exists():
                return Path(os.path.normpath(place.absolute()))
    raise NotFoundError(
        f"there is no file {places[-1].absolute()}.{beside(places[-1])}",
        f"Check the path, or give --data-root; a folder of images in a folder called {opening.scheme} is written "
        f"folder/{opening.scheme}/...",
    )


@final
@dataclass(frozen=True, slots=True)
class Found:
    """Files.

    Attributes:
        place: the absolute file, folder or pattern that they were found by.
        base: the folder of all.
        names: their paths below it, sorted, with / between folders.
    """

    place: Path
    base: Path
    names: tuple[str, ...]


def find_files(opening: Opening, ending: str) -> Found:
    """The files that are meant.

    Args:
        opening: whose rest is a file, a folder, or a pattern with ``*``, ``?``, ``[...]`` and ``**``.
        ending: of the names of files in a folder.

    Raises:
        NotFoundError: there is none.
        StorageError: a folder cannot be read.
    """
    try:
        place = find_file(opening)
    except NotFoundError:
        if not glob.has_magic(opening.rest):
            raise
        return _matching(opening)
    if not place.is_dir():
        return Found(place, place.parent, (place.name,))
    with storage_errors(place):
        names = tuple(
            sorted(
                (Path(folder) / name).relative_to(place).as_posix()
                for folder, _, held in os.walk(place)
                for name in held
                if name.lower().endswith(ending) and not name.startswith(".")
            )
        )
    if not names:
        raise NotFoundError(
            f"there is no {ending} file in {place}", f"Give a {ending} file, or a folder of them."
        )
    return Found(place, place, names)


def _matching(opening: Opening) -> Found:
    for root in (opening.data_root, Path()):
        if root is None:
            continue
        place = Path(os.path.normpath(root.absolute() / opening.rest))
        parts = place.parts
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        base, pattern = Path(*parts[:fixed]), "/".join(parts[fixed:])
        with storage_errors(base):
            matched = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207  (names below the folder)
            names = [name for name in matched if (base / name).is_file()]
        if names:
            return Found(place, base, tuple(sorted(names)))
    raise NotFoundError(
        f"no file matches {opening.rest}", "Check the pattern, or give --data-root; quote it in a shell."
    )
