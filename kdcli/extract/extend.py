"""``kd cache extend``: room for more views and more images in a cache, without rewriting what it holds."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.admin.grow import NewSamples, grown, publish_growth, sole_growth
from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import Manifest
from kdcli.cache.matching import class_numbers, require_unchanged
from kdcli.cache.reader import CacheReader
from kdcli.cache.store import Store
from kdcli.console import console, size
from kdcli.data.sources import ImageData
from kdcli.data.views import ViewSet
from kdcli.errors import IdentityError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.prepare import group_size, split_views
from kdcli.extract.result import payload_bytes
from kdcli.results import Result, Table
from kdcli.types import Difference


@final
@dataclass(frozen=True, slots=True)
class ExtendResult(Result):
    """What ``kd cache extend`` did.

    Attributes:
        cache_id: of the cache; growing does not change it.
        images: how many it held, and holds now.
        views: likewise.
        bytes: what its teachers' outputs will take more on disk, once they are filled in.
        fill: the command that fills them in; None where nothing was added.
        dry_run: nothing was written.
    """

    cache_id: str
    images: tuple[int, int]
    views: tuple[int, int]
    bytes: int
    fill: str | None
    dry_run: bool = False

    @property
    def is_new(self) -> bool:
        """Whether there was anything to add."""
        return self.images[0] != self.images[1] or self.views[0] != self.views[1]

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        document = {
            "cache_id": self.cache_id,
            "rows": self.images[1],
            "views": self.views[1],
            "added": {
                "images": self.images[1] - self.images[0],
                "views": self.views[1] - self.views[0],
                "bytes": self.bytes,
            },
            "fill": self.fill,
        }
        return document | ({"dry_run": True} if self.dry_run else {})

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = (
            ["images", *self.images],
            ["views", *self.views],
            ["teachers' bytes", "", f"+{size(self.bytes)}"],
        )
        return (Table(("", "before", "after"), rows),)


def extend_cache(
    root: Path, data: ImageData | None = None, views: str | None = None, dry_run: bool = False
) -> ExtendResult:
    """Make room for more images and more training views; ``kd cache-teachers`` fills it in.

    Running readers and writers go on with what they know. A killed run leaves the cache as it was, and
    running it again completes it.

    Args:
        root: the cache.
        data: images of which those that the cache lacks are added; it may be the new ones alone.
        views: all views that the cache is to hold, such as ``eval+train:8``.
        dry_run: write nothing.

    Raises:
        UsageError: nothing to add is named, or ``views`` is no description of views.
        IdentityError: images changed since they were cached, clips for images, new classes, or fewer views.
        ClaimedError: another process is extending the cache.
    """
    if data is None and views is None:
        raise UsageError(
            "there is nothing to extend by",
            "Name more images or views: kd cache extend CACHE DATA --views ...",
        )
    with nullcontext() if dry_run else sole_growth(root) as claims:
        held = CacheReader(root)
        view_set = held.manifest.view_set if views is None else _wanted_views(held.manifest, views)
        samples = None if data is None else _new_samples(held, data)
        growth = grown(held.store, samples, _new_groups(held.store, 1 + view_set["train_views"]), view_set)
        if claims is not None and growth.manifest != held.manifest:
            publish_growth(claims, held.store, growth)
        return _result(held, growth.manifest, dry_run)


def _wanted_views(manifest: Manifest, text: str) -> dict[str, Any]:
    """All views the cache is to hold: as many as asked for, made as the recorded ones are."""
    recorded = ViewSet.from_document(manifest.view_set)
    wanted = replace(
        ViewSet.parse(text, recipe=recorded.recipe, decode=recorded.decode), clips=recorded.clips
    )
    if wanted.count < recorded.count:
        raise IdentityError(
            f"the cache holds more views than --views {wanted}",
            f"Views are never taken away: ask for {recorded} or more.",
            [Difference("views.train_views", recorded.train_views, wanted.train_views)],
        )
    return wanted.document()


def _new_groups(store: Store, views: int) -> tuple[int, ...]:
    """Groups for the views that are new; groups that exist are never changed: units are numbered by them."""
    manifest = store.manifest
    size = max(manifest.view_groups)
    if store.teachers:
        recorded = manifest.created.get("config", {}).get("buffer_gb")
        default = CacheConfig.model_fields["buffer_gb"].default
        size = group_size(store.teachers.values(), manifest.block_rows, recorded or default)
    return split_views(views - manifest.views, size)


def _new_samples(held: CacheReader, data: ImageData) -> NewSamples | None:
    """The samples of ``data`` that the cache lacks; those that it has must be what they were."""
    clips, root = ViewSet.from_document(held.manifest.view_set).clips, held.layout.root
    if clips != data.clips:
        ours, theirs = ("clips", "images") if clips else ("images", "clips")
        raise IdentityError(
            f"{root} holds {ours}, and {data.location} {theirs}",
            f"Give them a cache of their own: kd cache-teachers {quote(data.location)} --cache NEW.kd --teacher SPEC",
        )
    labels = _labels_in(held, data)
    console.note(f"comparing {data.location} with {root}: every image that is in both is read")
    rows = held.keys.find(data.keys)
    require_unchanged(held, data, rows)
    new = np.flatnonzero(rows < 0)
    if not len(new):
        return None
    return NewSamples(data.keys.select(new), labels[new], str(data.spec), data.location)


def _labels_in(held: CacheReader, data: ImageData) -> Int64[np.ndarray, " n"]:
    """Labels of ``data`` in the cache's numbers; -1 throughout where it has none.

    Raises:
        IdentityError: a class that the cache does not have.
    """
    if data.class_names is None:
        return np.full(len(data), -1, np.int64)
    known, root = held.manifest.data.class_names, held.layout.root
    if known is None:
        raise IdentityError(
            f"{root} holds no labels, and {data.location} has some",
            f"Add its images without them, as in {quote(data.location)}@labels=none, or make a new cache.",
        )
    foreign = [name for name in data.class_names if name not in known]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise IdentityError(
            f"{data.location} has classes that {root} does not have: '{foreign[0]}'{more}",
            "The classes of a cache are fixed: make a new cache of all images, or leave these out with classes=.",
        )
    mapped: Int64[np.ndarray, " n"] = class_numbers(data.class_names, known)[data.labels]
    return mapped


def _result(held: CacheReader, manifest: Manifest, dry_run: bool) -> ExtendResult:
    old, records = held.manifest, list(held.teachers.values())
    sizes = [sum(sum(payload_bytes(m, record).values()) for record in records) for m in (old, manifest)]
    root = held.layout.root
    fill = None
    if manifest != old and not dry_run:
        caches = CacheSet.open([root])
        fill = str(caches.filling((), caches.members[0]))
    return ExtendResult(
        cache_id=old.cache_id,
        images=(old.samples, manifest.samples),
        views=(old.views, manifest.views),
        bytes=sizes[1] - sizes[0],
        fill=fill,
        dry_run=dry_run,
    )
