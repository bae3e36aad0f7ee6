"""Making a cache in a bucket by whichever of its writers is first, and a skeleton of it for each of them.

The mark comes first and gives the cache its id, then keys and labels, which are never overwritten, then the manifest,
created if it is absent: who is too late takes the one that is there. A writer that was killed in between leaves what
the next one goes on with.
"""

import shutil
from pathlib import Path

from jaxtyping import Int64
from numpy import ndarray

from kdcli.cache.admin.moving import classifiers_in, start_cache
from kdcli.cache.arrays import WHOLE_ARRAYS, whole_arrays
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Manifest, load_manifest
from kdcli.cache.owned import CHUNK_BYTES, read_own
from kdcli.cache.store import Store
from kdcli.cache.stores.marks import (
    ELSEWHERE,
    MANIFEST,
    MARK,
    Mark,
    manifest_bytes,
    manifest_in,
    mark_in,
    require_no_other_things,
)
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.cache.stores.pull import described
from kdcli.cache.writer import create_cache
from kdcli.errors import Advice, IdentityError, OutputExistsError


def adopt(place: ObjectPlace, root: Path) -> bool:
    """Make an empty cache in a folder of what is in a store: its manifest, keys, labels and teachers, and no units.

    Args:
        place: where the cache is.
        root: a new folder.

    Returns:
        Whether there is one.

    Raises:
        CorruptError: what is there is no sound cache.
    """
    if manifest_in(place) is None:
        return False
    with described(place, root) as source:
        labels = None if source.manifest.data.labels is None else source.labels
        teachers = source.teachers.values()
        start_cache(
            root, source.manifest, source.keys, labels, teachers, classifiers_in([source.store], teachers)
        )
    return True


def found(
    place: ObjectPlace, root: Path, manifest: Manifest, keys: KeyTable, labels: Int64[ndarray, " n"] | None
) -> Manifest:
    """Make a cache in a store, and its skeleton in a folder; another writer may be faster.

    Args:
        place: where it is to be.
        root: a new folder.
        manifest: what it is to be; its ``cache_id`` is that of an earlier writer which was killed at this.
        keys: of the samples.
        labels: likewise; None for a data set without.

    Returns:
        What it is.

    Raises:
        OutputExistsError: other things are there, or a push that has not ended.
        IdentityError: a cache of other data is being made there.
    """
    cache_id = _mark(place, manifest.cache_id)
    if cache_id is not None:
        create_cache(root, manifest.model_copy(update={"cache_id": cache_id}), keys, labels)
        store = Store(root, load_manifest(root))
        for name in whole_arrays(store.manifest, keys):
            _put_whole(place, store, name)
        if place.put(MANIFEST, manifest_bytes(store.manifest)) is not None:
            return store.manifest
        shutil.rmtree(root)
    adopt(place, root)
    return load_manifest(root)


def _mark(place: ObjectPlace, cache_id: str) -> str | None:
    """The id that the cache is to have; None where it has been made meanwhile."""
    require_no_other_things(place)
    if place.put(MARK, Mark(cache_id, "writers").to_bytes()) is not None:
        return cache_id
    theirs = mark_in(place)
    if manifest_in(place) is not None:
        return None
    if theirs is None or theirs.by != "writers":
        raise OutputExistsError(
            f"{place.name} holds what a push that has not ended has sent", Advice("push-unfinished")
        )
    return theirs.cache_id


def _put_whole(place: ObjectPlace, store: Store, name: str) -> None:
    path = store.chunk(SAMPLES, name, WHOLE_ARRAYS[name], 0, None)
    if place.put(path.relative_to(store.layout.root).as_posix(), read_own(path, CHUNK_BYTES)) is None:
        raise IdentityError(f"{place.name}: a cache of other images or labels is being made there", ELSEWHERE)
