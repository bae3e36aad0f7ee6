"""``without=FILE``: samples that are left out by their keys, such as near-duplicates of a test set."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import KeyTable
from kdcli.console import console
from kdcli.data.base import Listing
from kdcli.data.spec import DataSpec
from kdcli.errors import BadDataError, NotFoundError, OutputExistsError, UsageError
from kdcli.files import atomic_write_text, storage_errors
from kdcli.reading import read_text


def leave_out(listing: Listing, file: Path, where: str) -> Listing:
    """The samples whose keys are not lines of ``file``.

    Args:
        listing: all samples.
        file: keys, one a line, in UTF-8; an empty file leaves nothing out.
        where: the data set, for messages.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it cannot be read.
        BadDataError: it is no file of text, too large, or names none of the samples.
    """
    with storage_errors(file):
        try:
            text = read_text(file, hint="Write one key a line.")
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{where}: there is no file {file.absolute()}",
                "kd data check --write-exclude FILE writes one, and kd audit as well.",
            ) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    keys = list(dict.fromkeys(line for line in lines if line))
    rows = listing.keys.find(KeyTable.from_strings(keys))
    missing = np.flatnonzero(rows < 0)
    if len(keys) and len(missing) == len(keys):
        raise BadDataError(
            f"{where}: {file} names none of its samples; its first line is {keys[0]}, a key is {listing.keys[0]}",
            "Give the file that was written for this data set, or leave without= out.",
        )
    if len(missing):
        console.warn(
            f"{where}: {len(missing)} of {len(keys)} keys in {file} are none of its samples, such as {keys[missing[0]]}"
        )
    stays = np.ones(len(listing.keys), bool)
    stays[rows[rows >= 0]] = False
    return listing.select(np.flatnonzero(stays))


def require_new(path: Path, data: str) -> None:
    """Refuse a place for ``--write-exclude``, before anything is read.

    Args:
        path: the new file.
        data: the data set that it is about.

    Raises:
        UsageError: that is several data sets.
        OutputExistsError: the file is there.
        NotFoundError: its folder is not.
    """
    if DataSpec.parse(data).members:
        raise UsageError(
            f"--write-exclude: {data} is several data sets, and without=FILE belongs to one",
            "Look at each of them.",
        )
    if os.path.lexists(path):
        raise OutputExistsError(f"--write-exclude {path} exists", "Remove it, or name a new file.")
    if not path.absolute().parent.is_dir():
        raise NotFoundError(
            f"--write-exclude {path}: there is no folder {path.absolute().parent}", "Make it first."
        )


def write_keys(path: Path, keys: Iterable[str]) -> None:
    """Write a file for ``without=``.

    Raises:
        BadDataError: a key does not fit on a line.
        StorageError, NoSpaceError: it cannot be written.
    """
    lines = tuple(keys)
    for key in lines:
        if "\n" in key or "\r" in key:
            raise BadDataError(f"the key {key!r} does not fit on a line of {path}", "Rename the image.")
    atomic_write_text(path, "".join(f"{key}\n" for key in lines))
    console.note(f"wrote {path}: {len(lines)} keys")


def lost_classes(
    labels: Int64[np.ndarray, " n"], class_names: Sequence[str] | None, rows: Collection[int]
) -> tuple[str, ...]:
    """Classes whose labelled images are all among ``rows``, so that none is left without these."""
    kept = labels[~np.isin(np.arange(len(labels)), list(rows))]
    return tuple((class_names or ())[label] for label in np.setdiff1d(labels, np.append(kept, -1)))
