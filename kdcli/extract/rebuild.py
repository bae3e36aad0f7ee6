"""Keys and labels of a cache, written again: from themselves where only their wrapping is damaged, else from
the data set. The digests in the manifest say whether they are the right ones."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Int64

from kdcli.cache.commits import block_digest
from kdcli.cache.damage import Damage
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, load_manifest
from kdcli.cache.matching import class_numbers
from kdcli.cache.store import Store
from kdcli.cache.writer import write_whole_arrays
from kdcli.console import console
from kdcli.errors import CorruptError, IdentityError, NotFoundError
from kdcli.extract.rerun import Sources
from kdcli.registry import recorded
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData

Value = TypeVar("Value")


def mend_wholes(root: Path, damages: Iterable[Damage], sources: Sources) -> None:
    """Write keys and labels again if one of them is damaged.

    Raises:
        IdentityError: the data set has other keys or labels than the cache; nothing was written.
        NotFoundError: it is not to be had.
    """
    if not any(d.part == SAMPLES and d.remedy == "rewrite" and d.array for d in damages):
        return
    store = Store(root, load_manifest(root))
    keys, labels = _if_sound(store.load_keys), _if_sound(store.load_labels)
    if keys is None or labels is None:
        console.note(f"cache {root}: keys and labels from the data set")
        keys, labels = _from_data(store, sources)
    write_whole_arrays(store, keys, None if store.manifest.data.labels is None else labels)


def _if_sound(load: Callable[[], Value]) -> Value | None:
    try:
        return load()
    except CorruptError:
        return None


def _from_data(store: Store, sources: Sources) -> tuple[KeyTable, Int64[np.ndarray, " n"]]:
    """Keys and labels of all rows, in the order in which the cache grew."""
    manifest = store.manifest
    keys, labels = KeyTable.from_strings([]), np.empty(0, np.int64)
    for number, segment in enumerate(manifest.segments):
        data = _open(sources, segment.location)
        data = data.select(np.flatnonzero(keys.find(data.keys) < 0))
        padding = manifest.segment_rows(number).start - len(keys)
        nothing = KeyTable(np.empty(0, np.uint8), np.zeros(max(0, padding) + 1, np.int64))
        keys = KeyTable.concatenate([keys, nothing, data.keys])
        labels = np.concatenate([labels, np.full(max(0, padding), -1), _labels(store, data)])
    recorded, found = manifest.data, block_digest(labels.astype("<i8"))
    differences = [Difference("keys", recorded.keys, keys.digest())] if keys.digest() != recorded.keys else []
    if recorded.labels not in (None, found):
        differences.append(Difference("labels", recorded.labels, found))
    if differences:
        raise IdentityError(
            f"{store.layout.root}: its keys or labels are damaged, and the data set has others now",
            "Restore the data set as it was, or say where it is: --data SPEC",
            differences,
        )
    return keys, labels


def _open(sources: Sources, location: str) -> "ImageData":
    from kdcli.data.sources import open_data

    try:
        return open_data(sources.data or recorded(location), data_root=sources.data_root)
    except NotFoundError as error:
        raise NotFoundError(error.message, "Say where the images are now: --data SPEC") from error


def _labels(store: Store, data: "ImageData") -> Int64[np.ndarray, " n"]:
    """The labels of a data set as the class numbers of the cache."""
    cached, own = store.manifest.data.class_names, data.class_names
    if cached is None or own is None or not set(own) <= set(cached):
        return np.full(len(data), -1)  # other labels: the digest refuses them
    numbers: Int64[np.ndarray, " n"] = class_numbers(own, cached)[data.labels]
    return numbers
