"""``without=FILE``: samples that are left out by their keys, such as near-duplicates of a test set."""

from pathlib import Path

import numpy as np

from kdcli.cache.keytable import KeyTable
from kdcli.console import console
from kdcli.data.base import Listing
from kdcli.errors import BadDataError, NotFoundError
from kdcli.files import storage_errors


def leave_out(listing: Listing, file: Path, where: str) -> Listing:
    """The samples whose keys are not lines of ``file``.

    Args:
        listing: all samples.
        file: keys, one a line, in UTF-8; an empty file leaves nothing out.
        where: the data set, for messages.

    Raises:
        NotFoundError: there is no such file.
        StorageError: it cannot be read.
        BadDataError: it is no text, or names none of the samples.
    """
    with storage_errors(file):
        try:
            lines = [line.removesuffix("\r") for line in file.read_bytes().decode().split("\n")]
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{where}: there is no file {file.absolute()}", "kd audit --write-exclude FILE writes one."
            ) from error
        except UnicodeDecodeError as error:
            raise BadDataError(f"{file} is not text in UTF-8: {error}", "Write one key a line.") from error
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
    left = np.flatnonzero(stays)
    return Listing(listing.keys.select(left), listing.labels[left], listing.class_names)
