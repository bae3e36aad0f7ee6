"""Whether a folder may become the output of a run. Importing this needs no torch."""

import os
from pathlib import Path
from typing import Final

from kdcli.cache.owned import require_outside_caches
from kdcli.errors import OutputExistsError, StorageError
from kdcli.files import holds_files, storage_errors
from kdcli.reading import require_inside

GRID: Final = "grid.json"
"""With ``--lr-grid``: its rates; marks the folder as kd's, as run.json does."""


def require_folder(out: Path) -> None:
    """Refuse an output that is no place for a run, before anything is opened.

    Raises:
        StorageError: it is a file, or cannot be written.
        UsageError: it is inside a cache.
        OutputExistsError: it holds something else; kd never removes what it did not make.
        BadDataError: a folder in it is a link that leads out of it.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"--out {out} is a file", "Give a folder; it is created when it is not there.")
    require_outside_caches(out)
    place = out
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"--out {out} cannot be a folder: {place} is a file", "Choose another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"--out {out} cannot be written: no permission in {place}", "Choose another --out."
        )
    with storage_errors(out):
        marked = any((out / marker).is_file() for marker in ("run.json", GRID))
        foreign = out.is_dir() and not marked and holds_files(out)
        for child in out.iterdir() if out.is_dir() else ():
            if child.is_symlink() and child.is_dir():
                require_inside(child, out, out)
    if foreign:
        raise OutputExistsError(
            f"--out {out} is not empty and holds no kd run",
            "Choose another folder; kd removes only its own files.",
        )
