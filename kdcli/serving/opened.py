"""``open_cache``: what teachers gave, as arrays."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES
from kdcli.cache.shelf import Stage
from kdcli.errors import CacheMissingError, NotFoundError, nearest
from kdcli.options.fields import as_address

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from kdcli.serving.images import CachedImages, Item, Student


def open_cache(*paths: "str | os.PathLike[str]", stage_limit: float | None = None) -> "OpenCache":
    """Open a cache, or several as one.

    Args:
        paths: folders, or URLs of pushed caches: what is read of these is kept in $KD_STAGE, or in the user's cache
            folder.
        stage_limit: most GB that is kept there.

    Raises:
        CacheMissingError: one is not there.
        CorruptError, IdentityError: one is not what its manifest says, or they are of different teachers.
        UsageError: none is given, or one twice.
    """
    places = [Path(path) if isinstance(path, os.PathLike) else as_address(path) for path in paths]
    return OpenCache(CacheSet.open(places, stage=Stage.told(gigabytes=stage_limit)))


@final
class OpenCache:
    """Cached images and what each teacher gave for them; ``cache["gen"].logits``.

    Attributes:
        caches: the caches as kd reads them.
        rows: in ``caches`` of every image that was not dropped, in the order of ``keys``.
        keys: of the images.
        labels: [n] indices into ``class_names``; -1 without a label.
        class_names: None without labels.
        views: how many there are of each image, view 0 (evaluation) included.
    """

    def __init__(self, caches: CacheSet) -> None:
        self.caches = caches
        absent = [
            np.fromiter(member.absent(SAMPLES), np.int64) + offset
            for member, offset in zip(caches.members, caches.offsets, strict=False)
        ]
        self.rows: Int64[np.ndarray, " n"] = np.setdiff1d(
            np.arange(caches.offsets[-1]), np.concatenate(absent)
        )
        self.keys: KeyTable = caches.keys.select(self.rows)
        self.labels: Int64[np.ndarray, " n"] = caches.labels[self.rows]
        self.class_names = caches.class_names
        self.views = caches.view_count(self.rows)

    def __getitem__(self, teacher: str) -> "Outputs":
        if teacher not in self.caches.teachers:
            raise NotFoundError(
                f"there is no teacher '{teacher}' in the cache.{nearest(teacher, self)}",
                f"It has {', '.join(self) or 'none'}.",
            )
        return Outputs(self, teacher)

    def __iter__(self) -> Iterator[str]:
        return iter(self.caches.teachers)

    def __contains__(self, teacher: object) -> bool:
        return teacher in self.caches.teachers

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __repr__(self) -> str:
        teachers = ", ".join(f"{name}: {' '.join(self[name])}" for name in self)
        return f"<{len(self.rows)} cached images, {self.views} views; {teachers or 'no teachers'}>"

    def row(self, key: str) -> int:
        """Place of an image in ``keys`` and in every array.

        Raises:
            CacheMissingError: it is not cached.
        """
        (row,) = self.keys.find(KeyTable.from_strings([key]))
        if row < 0:
            raise CacheMissingError(f"there is no image '{key}' in the cache", "Look at list(cache.keys).")
        return int(row)

    def images(self, data: "str | os.PathLike[str] | None" = None, **options: Any) -> "CachedImages":
        """A map-style data set of torch; see :class:`~kdcli.serving.images.CachedImages`."""
        from kdcli.serving.images import CachedImages

        return CachedImages(self.caches, None if data is None else os.fspath(data), **options)

    def loader(
        self,
        data: "str | os.PathLike[str] | None" = None,
        *,
        student: "Student",
        batch_size: int = 64,
        seed: int = 0,
        workers: int | None = None,
        **options: Any,
    ) -> "DataLoader[Item]":
        """A DataLoader: every pass over it is an epoch, with the images, views and outputs that kd trains on.

        Args:
            data: where the images are; default: as the cache recorded.
            student: see :class:`~kdcli.serving.images.CachedImages`, as the options.
            batch_size: images a batch, as of ``kd train-student``.
            seed: of the order, its ``--data-seed``.
            workers: decode processes; default: one a processor, but one.
            options: of the data set.
        """
        from kdcli.serving.images import loader_of

        return loader_of(self.images(data, student=student, **options), batch_size, seed, workers)


@final
class Outputs:
    """What one teacher gave: arrays of view 0 by name, a row an image, in the type they are stored in.

    Attributes:
        teacher: its name.
    """

    def __init__(self, cache: OpenCache, teacher: str) -> None:
        self._cache, self.teacher = cache, teacher

    @property
    def logits(self) -> Shaped[np.ndarray, "n c"]:
        """Before softmax, of view 0."""
        return self["logits"]

    @property
    def features(self) -> Shaped[np.ndarray, "n d"]:
        """Pooled, of view 0."""
        return self["features"]

    def __getitem__(self, array: str) -> np.ndarray:
        return self.array(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.caches.teachers[self.teacher].array_specs())

    def __contains__(self, array: object) -> bool:
        return array in self._cache.caches.teachers[self.teacher].array_specs()

    def array(self, name: str, view: int = 0) -> Shaped[np.ndarray, "n ..."]:
        """All rows of an array, of one view.

        Raises:
            CacheMissingError: the cache does not keep it, or rows of it are not written.
            CorruptError: its bytes changed.
        """
        return self._read([name], self._cache.rows, view)[name]

    def tensor(self, name: str, view: int = 0) -> Shaped[Tensor, "n ..."]:
        """:meth:`array`, for torch."""
        return torch.from_numpy(self.array(name, view))

    def at(self, key: str, view: int = 0) -> dict[str, np.ndarray]:
        """Every array's row of one image.

        Raises:
            CacheMissingError: the image is not cached, or not this view of it.
        """
        rows = self._cache.rows[[self._cache.row(key)]]
        names = list(self._cache.caches.teachers[self.teacher].array_specs(of_all_views=view > 0))
        return {name: values[0] for name, values in self._read(names, rows, view).items()}

    def _read(self, names: list[str], rows: Int64[np.ndarray, " m"], view: int) -> dict[str, np.ndarray]:
        caches, views = self._cache.caches, self._cache.caches.view_count(rows)
        if unknown := [name for name in names if name not in self]:
            raise CacheMissingError(
                f"the cache keeps no array '{unknown[0]}' of '{self.teacher}'.{nearest(unknown[0], self)}",
                f"It has {', '.join(self)}.",
            )
        if not 0 <= view < views:
            raise CacheMissingError(
                f"there is no view {view}: the cache has {views} of each image, 0 to {views - 1}",
                "View 0 is the evaluation's, the others are training views; kd cache extend makes room for more.",
            )
        usable = caches.require({self.teacher: names}, rows, [view], allow_partial=None)
        if not usable.all():
            raise CacheMissingError(
                f"{int((~usable).sum())} images have no outputs of '{self.teacher}', first "
                f"{caches.keys[int(rows[~usable][0])]}",
                "Fill the cache, or read the others one by one: cache[teacher].at(key).",
            )
        return {name: caches.gather(self.teacher, name, rows, view) for name in names}
