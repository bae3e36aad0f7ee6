"""Which rows of a cache the samples of a data set are: found by key, checked by content and class."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.backends.base import checksum
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Manifest
from kdcli.cache.reader import CacheReader
from kdcli.errors import Advice, IdentityError
from kdcli.types import Difference


class Samples(Protocol):
    """What the cache must know of a data set to find its rows. ``ImageData`` is one."""

    keys: KeyTable
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...
    @property
    def location(self) -> str:
        """Spec that opens the same data from anywhere."""
        ...

    def keys_in(self, locations: Sequence[str]) -> KeyTable:
        """What a cache made from ``locations`` calls the samples."""
        ...

    def sizes(self) -> Int64[np.ndarray, " n"]:
        """Encoded bytes per sample; -1 where only reading them tells."""
        ...

    def encoded(self, index: int) -> bytes:
        """The bytes a sample's identity is computed over."""
        ...


_IGNORED = re.compile(r"[@,]exif=ignore(,|\+\+|$)")
ROWS_AT_ONCE = 65_536
"""Rows looked at together: what is needed besides is then small, however many rows there are."""


def find_places(
    member: CacheReader, data: Samples, places: Int64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """Row in a cache of each of the samples at ``places``, by key; -1 where it is not there."""
    if len(places) == len(data) and member.keys == data.keys:
        return np.arange(len(data))
    keys = data.keys_in(member.manifest.locations)
    found = np.empty(len(places), np.int64)
    for start in range(0, len(places), ROWS_AT_ONCE):
        some = places[start : start + ROWS_AT_ONCE]
        found[start : start + len(some)] = member.keys.find(keys.select(some))
    return found


def require_same_exif(root: Path | str, manifest: Manifest, data: Samples) -> None:
    """Images that a cache saw as they are stored must be read so, and those that it saw upright, upright.

    Raises:
        IdentityError: ``data`` is read otherwise than all that the cache holds.
    """
    if not reads_alike(manifest, data):
        read = _exif(data.location)
        other = "apply" if read == "ignore" else "ignore"
        raise IdentityError(
            f"{root} was made with exif={other}, and {data.location} is read with exif={read}",
            Advice("other-exif", exif=other),
        )


def reads_alike(manifest: Manifest, data: Samples) -> bool:
    """Whether EXIF counts in ``data`` as it did for some of what a cache holds."""
    return _exif(data.location) in {_exif(location) for location in manifest.locations}


def _exif(location: str) -> str:
    return "ignore" if _IGNORED.search(location) else "apply"


def require_unchanged(
    member: CacheReader, data: Samples, rows: Int64[np.ndarray, " n"], check_content: bool = True
) -> None:
    """Samples that a cache holds must still be what they were.

    Args:
        member: the cache.
        data: the samples.
        rows: row of each in the cache; -1: not to be looked at.
        check_content: read the bytes of every sample, too; without it, only sizes are compared.

    Raises:
        IdentityError: naming the first sample that changed, or whose class name differs.
    """
    require_same_exif(member.layout.root, member.manifest, data)
    places = np.flatnonzero(rows >= 0)
    changed: dict[int, Difference] = {}
    same_content(member, rows[places], places, data.sizes(), data if check_content else None, changed)
    if changed:
        first = min(changed)
        raise IdentityError(
            f"{len(changed)} of {len(data)} images changed since they were cached, first {data.keys[first]}",
            "Restore the images, or make a new cache: outputs of two versions of an image do not mix.",
            [changed[first]],
        )
    require_same_class(member, data, places, rows[places])


def same_content(
    member: CacheReader,
    local: Int64[np.ndarray, " m"],
    places: Int64[np.ndarray, " m"],
    sizes: Int64[np.ndarray, " n"],
    data: Samples | None,
    changed: dict[int, Difference],
) -> Bool[np.ndarray, " m"]:
    """Which found rows still have the recorded bytes; rows without a record pass (they are missing, not wrong)."""
    if len(local) > ROWS_AT_ONCE:
        parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(local), ROWS_AT_ONCE)]
        return np.concatenate(
            [same_content(member, local[p], places[p], sizes, data, changed) for p in parts]
        )
    written = member.present(SAMPLES, local, [0])
    equal = np.ones(len(local), bool)
    rows, asked = local[written], places[written]
    recorded = member.gather(SAMPLES, "content_size", rows)
    same = (recorded == sizes[asked]) | (sizes[asked] < 0)  # -1: only the bytes tell
    for place, old in zip(asked[~same], recorded[~same], strict=True):
        changed[int(place)] = Difference("bytes", int(old), int(sizes[place]))
    if data is not None:
        for number, crc in zip(
            np.flatnonzero(same), member.gather(SAMPLES, "content_crc", rows[same]), strict=True
        ):
            now = checksum(data.encoded(int(asked[number])))
            if now != int(crc):
                same[number] = False
                changed[int(asked[number])] = Difference("crc32c", f"{int(crc):08x}", f"{now:08x}")
    equal[written] = same
    return equal


def require_same_class(
    member: CacheReader, data: Samples, places: Int64[np.ndarray, " m"], local: Int64[np.ndarray, " m"]
) -> None:
    """The same image must have the same class name on both sides, when both name the same classes.

    Raises:
        IdentityError: naming the first image that has another class.
    """
    cached, asked = member.manifest.data.class_names, data.class_names
    if cached is None or asked is None or not set(asked) <= set(cached):
        return  # without labels, or another labelling of the same images
    numbers, wrong = class_numbers(asked, cached), 0
    first: tuple[int, int, int] | None = None  # place, class in the cache, class asked for
    for start in range(0, len(places), ROWS_AT_ONCE):
        some = places[start : start + ROWS_AT_ONCE]
        ours, theirs = numbers[data.labels[some]], member.labels[local[start : start + len(some)]]
        found = np.flatnonzero((ours >= 0) & (theirs >= 0) & (ours != theirs))
        wrong += len(found)
        if first is None and len(found):
            first = int(some[found[0]]), int(theirs[found[0]]), int(ours[found[0]])
    if first is not None:
        raise IdentityError(
            f"{wrong} of {len(data)} samples have another class than when they were cached, "
            f"first {data.keys[first[0]]}",
            "Restore the labels, or cache the data set anew.",
            [Difference("class", cached[first[1]], cached[first[2]])],
        )


def class_numbers(names: tuple[str, ...], among: tuple[str, ...]) -> Int64[np.ndarray, " c1"]:
    """Number in ``among`` of each of ``names``, and -1 at the end, where label -1 finds it."""
    if names == among:  # two classes may share a name: then only their order tells them apart
        return np.asarray([*range(len(names)), -1], np.int64)
    number = {name: index for index, name in enumerate(among)}
    return np.asarray([*(number[name] for name in names), -1], np.int64)
