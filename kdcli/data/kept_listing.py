"""Samples and labels of a large source as they were found, in the user's cache folder for as long as nothing changes.

What is kept is only the answer to a question that is asked again: which files in which state, read how. Where any of
that differs, or the file is not whole, the source is read anew. It replaces the last answer for the same place.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np

from kdcli.cache.keytable import KeyTable
from kdcli.data.base import Listing
from kdcli.data.paths import FileStamp
from kdcli.files import atomic_write_bytes, make_folder, storage_errors
from kdcli.reading import parse_json, read_bytes

_VERSION: Final = 1
_BYTES: Final = 16 * 2**30


def kept_listing(
    kind: str, asked: Mapping[str, Any], stamps: Sequence[FileStamp], make: Callable[[], Listing]
) -> Listing:
    """What ``make`` gives, or gave when it was last asked the same of the same files.

    Args:
        kind: of the source: a folder's name.
        asked: which samples are meant and how they are read, as JSON.
        stamps: every file that the answer comes from, as it is now.
        make: finds the samples; what it raises is raised.

    Raises:
        StorageError: the user's cache folder cannot be read or written.
    """
    from platformdirs import user_cache_path

    place = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    states = [[each.path, each.size, each.modified, each.inode] for each in stamps]
    identity = hashlib.sha256(json.dumps([_VERSION, asked, states], sort_keys=True).encode()).hexdigest()
    file = user_cache_path("kd") / kind / f"{place}.listing"
    if (found := _kept(file, identity)) is not None:
        return found
    listing = make()
    make_folder(file.parent)
    atomic_write_bytes(file, _packed(listing, identity))
    return listing


def _packed(listing: Listing, identity: str) -> bytes:
    arrays = (listing.keys.offsets, listing.labels.astype(np.int64), listing.keys.blob)
    body = b"".join(array.tobytes() for array in arrays)
    names = None if listing.class_names is None else list(listing.class_names)
    head = {"identity": identity, "count": len(listing.keys), "names": names, "notes": list(listing.notes)}
    line = json.dumps(head).encode()
    whole = line + b" " * (-(len(line) + 10) % 8) + b"\n" + body  # numbers begin where numbers may
    return b"%08x " % google_crc32c.value(whole) + whole


def _kept(file: Path, identity: str) -> Listing | None:
    """The listing in ``file``, if it is of this identity, and whole."""
    with storage_errors(file):
        if not file.is_file():
            return None
        data = read_bytes(file, _BYTES)
    if data[:9] != b"%08x " % google_crc32c.value(data[9:]):
        return None
    end = data.index(b"\n")
    head = parse_json(data[9:end], file)
    if head["identity"] != identity:
        return None
    count = int(head["count"])
    numbers = np.frombuffer(data, np.int64, 2 * count + 1, end + 1)
    keys = KeyTable(np.frombuffer(data, np.uint8, offset=end + 1 + numbers.nbytes), numbers[: count + 1])
    names = None if head["names"] is None else tuple(head["names"])
    return Listing(keys, numbers[count + 1 :].copy(), names, tuple(head["notes"]))
