"""Making a cache in a bucket longer or deeper: a skeleton of it grows here, and is sent in the order of a local one.

Shapes first, then keys and labels, of which the longer ones begin with the shorter ones, the manifest last. Keys,
labels and manifest replace the very version that was read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcli.cache.admin.grow import GROWTH
from kdcli.cache.arrays import WHOLE_ARRAYS, whole_arrays
from kdcli.cache.layout import SAMPLES, Manifest, load_manifest, parse_manifest
from kdcli.cache.owned import CHUNK_BYTES, read_own
from kdcli.cache.store import Store
from kdcli.cache.stores.leases import Leases, Pace, probe
from kdcli.cache.stores.marks import MANIFEST, manifest_bytes
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.cache.stores.pull import Puller
from kdcli.cache.writer import CacheWriter
from kdcli.errors import ClaimedError


def fetch_contents(place: ObjectPlace, root: Path) -> None:
    """Fetch what the cache knows of its images, to compare them with those that are added."""
    with CacheWriter(root, load_manifest(root)) as writer:
        Puller(place, writer).run([SAMPLES], 1)


@contextmanager
def growing(place: ObjectPlace, root: Path) -> Iterator[None]:
    """The sole right to make a cache in a store grow; what its skeleton became within the block, it becomes.

    Args:
        place: where the cache is.
        root: its skeleton.

    Raises:
        ClaimedError: another process is making it grow, or did so meanwhile.
    """
    with Leases(place, probe(place), Pace()) as leases:
        if not leases.acquire(GROWTH):
            raise ClaimedError(
                f"{place.name} is being extended by {leases.holder(GROWTH)}",
                "Let it finish, then run this again.",
            )
        data, tag, _ = place.get(MANIFEST)
        old = parse_manifest(data, f"{place.name}/{MANIFEST}")
        _require(old == load_manifest(root), place)
        yield
        new = load_manifest(root)
        if new == old:
            return
        _send_arrays(place, Store(root, new), old)
        _require(leases.keep(GROWTH), place)
        _require(place.put(MANIFEST, manifest_bytes(new), tag) is not None, place)


def _send_arrays(place: ObjectPlace, store: Store, old: Manifest) -> None:
    keys = store.load_keys()
    for name, content in store.backend.metadata(store.manifest, keys, store.teachers).items():
        place.write(f"{store.data.name}/{name}", content)
    if store.manifest.rows == old.rows:
        return
    for array in whole_arrays(store.manifest, keys):
        path = store.chunk(SAMPLES, array, WHOLE_ARRAYS[array], 0, None)
        name = path.relative_to(store.layout.root).as_posix()
        _, tag, _ = place.get(name, CHUNK_BYTES)
        _require(place.put(name, read_own(path, CHUNK_BYTES), tag) is not None, place)


def _require(alone: bool, place: ObjectPlace) -> None:
    if not alone:
        raise ClaimedError(f"{place.name} was extended by another process meanwhile", "Run this again.")
