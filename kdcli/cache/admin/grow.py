"""Making a cache longer (samples) or deeper (views) without touching a byte of what it holds.

On disk the shapes grow first, then keys and labels, the manifest last. Each is one rename, and the longer
array begins with the shorter one, so a reader, a writer or a kill in between sees the old cache or the new
one, never a mixture. Nothing ever shrinks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.claims import Claims
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import Manifest, Segment, Unit, load_manifest, planned_manifest, write_manifest
from kdcli.cache.store import Store
from kdcli.cache.writer import CacheWriter, describe, write_whole_arrays
from kdcli.errors import ClaimedError

GROWTH = Unit("manifest", 0, 0)
"""What a process claims while it makes a cache grow: no unit of work, but claimed like one."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class NewSamples:
    """Samples that a cache is to hold besides.

    Attributes:
        keys: none of which the cache has.
        labels: class numbers of the cache, -1 = unlabelled.
        spec: what the data set was opened from.
        location: spec that opens it from anywhere; it may hold more samples than these.
    """

    keys: KeyTable
    labels: Int64[np.ndarray, " n"]
    spec: str
    location: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """A cache as it is to be: its manifest, and keys and labels of all rows."""

    manifest: Manifest
    keys: KeyTable
    labels: Int64[np.ndarray, " n"] | None


def has_grown_from(new: Manifest, old: Manifest) -> bool:
    """Whether a manifest is another one, or may be what that became: all it had, and more samples or views after."""
    own = {**dict(new), "segments": new.segments[: len(old.segments)], "data": old.data,
           "view_groups": new.view_groups[: len(old.view_groups)],
           "view_set": {**new.view_set, "train_views": old.views - 1}}  # fmt: skip
    same_data = new.rows > old.rows or new.data == old.data
    return same_data and new.data.class_names == old.data.class_names and own == dict(old)


@contextmanager
def sole_growth(root: Path) -> Iterator[Claims]:
    """The right to make a cache grow: only what is read of the cache within counts.

    Raises:
        ClaimedError: another process is making it grow.
    """
    with CacheWriter(root, load_manifest(root)) as writer:
        if not writer.claims.acquire(GROWTH):
            raise ClaimedError(
                f"{root} is being extended by {writer.claims.holder(GROWTH)}",
                "Let it finish, then run this again.",
            )
        yield writer.claims


def grown(
    store: Store, samples: NewSamples | None, groups: Sequence[int], view_set: dict[str, Any]
) -> Growth:
    """What a cache becomes; nothing is written.

    Args:
        store: the cache as it is.
        samples: what it is to hold besides; they start at a new block, the rows before it are padding.
        groups: sizes of the view groups to append.
        view_set: of all views, new ones included.
    """
    old, keys = store.manifest, store.load_keys()
    labels = None if old.data.labels is None else store.load_labels()
    segments = old.segments
    if samples is not None:
        padding = -old.rows % old.block_rows
        nothing = KeyTable(np.empty(0, np.uint8), np.zeros(padding + 1, np.int64))
        keys = KeyTable.concatenate([keys, nothing, samples.keys])
        if labels is not None:
            labels = np.concatenate([labels, np.full(padding, -1), samples.labels])
        segments = (*segments, Segment(rows=len(samples.keys), spec=samples.spec, location=samples.location))
    identity = {
        "keys": keys.digest(),
        "labels": None if labels is None else block_digest(labels.astype("<i8")),
    }
    changes = {
        "segments": segments,
        "view_groups": (*old.view_groups, *groups),
        "view_set": view_set,
        "data": old.data.model_copy(update=identity),
    }
    manifest = planned_manifest(**{**dict(old), **changes})
    return Growth(manifest, keys, labels)


def publish_growth(claims: Claims, old: Store, growth: Growth) -> None:
    """Make the cache what it is to be, in an order in which every step leaves a sound cache.

    Args:
        claims: of :func:`sole_growth`.
        old: the cache that ``growth`` was computed from.
        growth: what it is to be.

    Raises:
        ClaimedError: this process was taken for dead, and another one made the cache grow.
    """
    root, new = old.layout.root, Store(old.layout.root, growth.manifest)
    _require_sole(claims, old)
    new.write_metadata(growth.keys)
    if growth.manifest.rows > old.manifest.rows:
        write_whole_arrays(new, growth.keys, growth.labels)
    if new.layout.index.is_file():
        from kdcli.cache.hdf5_index import write_index

        write_index(new)
    _require_sole(claims, old)
    write_manifest(new.layout, growth.manifest)
    describe(root)  # a writer that still knew the shorter manifest may have added a teacher in between


def _require_sole(claims: Claims, old: Store) -> None:
    root = old.layout.root
    if not claims.owns(GROWTH) or load_manifest(root) != old.manifest:
        raise ClaimedError(f"{root} was extended by {claims.holder(GROWTH)} meanwhile", "Run this again.")
