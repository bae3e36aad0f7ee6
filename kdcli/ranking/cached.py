"""Cached teachers as sources: nothing is run, rows are found by the keys of the images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.fingerprints import fingerprints
from kdcli.cache.shelf import Stage
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, CacheMissingError, NotFoundError
from kdcli.ranking.config import RankConfig
from kdcli.types import OutputKind

EVAL_VIEW = 0
_HASHED_AT_ONCE = 8192
_BOTH: tuple[OutputKind, ...] = ("features", "logits")


@final
@dataclass(frozen=True, slots=True, eq=False)
class CachedMaterial:
    """See :class:`~kdcli.ranking.material.Material`; images are in an order that the cache does not decide.

    Attributes:
        caches: where the outputs are.
        rows: of the images in the caches.
        data: where the images come from when ``--data`` names them.
        partial: whether rows that are not written are left out.
    """

    caches: CacheSet
    names: tuple[str, ...]
    kept: tuple[OutputKind, ...]
    rows: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...] | None
    data: ImageData | None
    partial: bool

    @property
    def cache_id(self) -> str:
        """The caches' identities, joined as training joins them."""
        return ",".join(self.caches.cache_ids)

    @property
    def location(self) -> str | None:
        """As the results of students have it, which are compared with this ranking's."""
        return None if self.data is None else self.data.location

    def id_of(self, name: str) -> str:
        """Identity of the teacher."""
        return self.caches.teachers[name].id

    def image(self, place: int) -> str:
        """By its key."""
        return f"image '{self.caches.keys[int(self.rows[place])]}'"

    def select(self, places: Int64[np.ndarray, " m"]) -> "CachedMaterial":
        """These images only, their bytes compared with what was cached where ``--data`` gives them."""
        rows, data = self.rows[places], self.data
        if data is not None:
            data = data.select(places)
            rows = self.caches.rows_of(data)
            reads = dict.fromkeys(self.names, self.kept)
            self.caches.require(reads, rows, [EVAL_VIEW], self.partial)
        return replace(self, rows=rows, labels=self.labels[places], data=data)

    def fingerprints(self, places: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """See :func:`~kdcli.cache.fingerprints.fingerprints`; only images with cached outputs are here."""
        return fingerprints(self.caches, self.rows[places])

    def gather(self, name: str, array: OutputKind) -> Float[np.ndarray, "n d"]:
        """Cached values on view 0."""
        return self.caches.gather(name, array, self.rows, EVAL_VIEW)


def open_cached(config: RankConfig, needed: OutputKind, wanted: Sequence[OutputKind]) -> CachedMaterial:
    """Find the labelled images, and the teachers to rank, in caches.

    Args:
        config: names them.
        needed: array without which there is no ranking.
        wanted: arrays to read where all teachers keep them.

    Raises:
        CacheMissingError: no cache, rows not cached yet, or ``needed`` was not kept.
        NotFoundError: a teacher named is not in the cache.
        BadDataError: no labels.
    """
    caches = CacheSet.open(config.cache, config.verify, Stage.told(gigabytes=config.stage_limit))
    names = _chosen_teachers(caches, config)
    caches.require_kept({name: [needed] for name in names})
    kept = tuple(
        array
        for array in _BOTH
        if array == needed
        or (array in wanted and all(caches.teacher(name).output_of(array) is not None for name in names))
    )
    rows, labels, class_names, data = _labelled_images(caches, config)
    reads = dict.fromkeys(names, kept)
    usable = np.flatnonzero(caches.require(reads, rows, [EVAL_VIEW], config.allow_partial))
    if not len(usable):
        raise CacheMissingError(
            f"none of the {len(rows)} labelled images has cached outputs", "Run kd cache-teachers to its end."
        )
    if len(usable) < len(rows):
        rows, labels, data = rows[usable], labels[usable], None if data is None else data.select(usable)
    del usable  # 8 bytes a row, and there may be millions
    order = _key_order(caches, rows)
    rows, labels, data = rows[order], labels[order], None if data is None else data.select(order)
    return CachedMaterial(caches, names, kept, rows, labels, class_names, data, config.allow_partial)


def _chosen_teachers(caches: CacheSet, config: RankConfig) -> tuple[str, ...]:
    for name in (*config.teacher, *config.exclude):
        caches.teacher(name)  # refuses a name that no cache has, with the nearest one
    names = sorted(set(config.teacher or caches.teachers) - set(config.exclude))
    if not names:
        raise NotFoundError("no teacher is left to rank", "Cache teachers first, or give fewer --exclude.")
    return tuple(names)


def _labelled_images(
    caches: CacheSet, config: RankConfig
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], tuple[str, ...] | None, ImageData | None]:
    """Rows, labels and class names: all labelled images of the cache, or those of ``--data``, which come along."""
    if config.data is None:
        rows = np.flatnonzero(caches.labels >= 0)
        if not len(rows):
            raise BadDataError(
                "the cache holds no labels to rank against",
                "Name the same images with labels: kd rank-sources --data DATA.",
            )
        return rows, *_by_name(caches.labels[rows], caches.class_names), None
    data = open_data(config.data, data_root=config.data_root, stage=Stage.told(gigabytes=config.stage_limit))
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise BadDataError(f"{config.data} has no labels to rank against", "Name labelled data with --data.")
    data = data.select(labelled)
    rows = caches.rows_of(data, check_content=False)
    return rows, *_by_name(data.labels, data.class_names), data


def _by_name(
    labels: Int64[np.ndarray, " n"], class_names: tuple[str, ...] | None
) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...] | None]:
    """Number classes by their names: in which order caches are given must not change a ranking either."""
    if class_names is None:
        return labels, None
    order = sorted(range(len(class_names)), key=class_names.__getitem__)  # two classes may share a name
    return np.argsort(order)[labels], tuple(class_names[label] for label in order)


def _key_order(caches: CacheSet, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Order by (a hash of) the keys: in which order images were cached must not change a ranking.

    Hashes take 8 bytes a row and are made in parts: a million keys at once would not stay within the
    memory goal.
    """
    hashes = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _HASHED_AT_ONCE):
        part = slice(start, start + _HASHED_AT_ONCE)
        hashes[part] = caches.keys.select(rows[part]).hashes()
    return np.argsort(hashes, kind="stable")
