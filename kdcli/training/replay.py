"""The cached side of a feed: views drawn again from what the cache recorded, and teacher outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import google_crc32c
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES
from kdcli.data.kept_pixels import KeptPixels
from kdcli.data.mixing import NO_PARTNER
from kdcli.data.sources import ImageData
from kdcli.data.views import Drawer, Drawn, Params, ViewSet
from kdcli.errors import BadDataError, IdentityError
from kdcli.methods.batch import indexable
from kdcli.types import Difference

_CHUNK = 65536
"""Rows whose parameters are looked at in one go: a cache of a million is not read into memory."""


@final
@dataclass(frozen=True, slots=True)
class ViewRule:
    """Which view of an image an epoch shows, to the student and to the teachers.

    Attributes:
        views: the cache's view set, or the live one.
        cached: number K of training views in the cache; None where nothing is cached.
        teacher_view: ``same``: the teachers' outputs are of the student's view, so epoch e shows view
            1 + e mod K, or view 0 where K is 0. ``eval``: they are of view 0, and the student's views
            never repeat.
    """

    views: ViewSet
    cached: int | None = None
    teacher_view: Literal["same", "eval"] = "same"

    def student(self, epoch: int) -> int:
        """View that the student sees in ``epoch`` (from 0)."""
        if self.cached is None or self.teacher_view == "eval":
            return 1 + epoch
        return 1 + epoch % self.cached if self.cached else 0

    @property
    def recorded(self) -> bool:
        """Whether the student's views are those of the cache, with their parameters recorded there."""
        return self.cached is not None and self.teacher_view == "same"

    def teacher(self, epoch: int) -> int:
        """View whose cached outputs are read in ``epoch`` (from 0)."""
        return 0 if self.teacher_view == "eval" else self.student(epoch)


@final
@dataclass(frozen=True, slots=True)
class Recording:
    """The cached side of a feed.

    Attributes:
        cache: where outputs are.
        rows: row in the cache of every sample of the data set.
        reads: arrays to gather: teacher -> names.
        kept: view 0 as the students see it, where the cache keeps it.
    """

    cache: CacheSet
    rows: Int64[np.ndarray, " n"]
    reads: Mapping[str, tuple[str, ...]]
    kept: KeptPixels | None = None

    def outputs(self, positions: Int64[np.ndarray, " b"], view: int) -> dict[str, dict[str, Tensor]]:
        """Teacher outputs for a view: teacher -> array -> [b, ...]."""
        rows = self.rows[positions]
        return {
            teacher: {
                name: indexable(torch.from_numpy(self.cache.gather(teacher, name, rows, view)))
                for name in names
            }
            for teacher, names in self.reads.items()
        }

    def params(self, positions: Int64[np.ndarray, " b"], view: int) -> Params:
        """Parameters of a view as they were recorded, [b, w]."""
        return self.cache.gather(SAMPLES, "params", self.rows[positions], view)

    def partner_rows(
        self, views: ViewSet, positions: Int64[np.ndarray, " b"], params: Params
    ) -> Int64[np.ndarray, " b"]:
        """Cache row that each view is mixed with; -1 for none. Recorded rows count within their own cache."""
        partners = views.partners(params)
        member = np.searchsorted(self.cache.offsets, self.rows[positions], side="right") - 1
        return np.where(partners == NO_PARTNER, NO_PARTNER, partners + self.cache.offsets[member])

    def places(self) -> Int64[np.ndarray, " m"]:
        """Position in the data set of every row of the cache; -1 for those that are not in it."""
        places = np.full(self.cache.offsets[-1], -1, np.int64)
        places[self.rows] = np.arange(len(self.rows))
        return places

    def check(self, data: ImageData, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes]) -> None:
        """Refuse an image whose bytes are not those that the teachers saw.

        Raises:
            IdentityError: naming the first one that differs.
        """
        sizes, crcs = self.cache.content(self.rows[positions])
        for position, found, size, crc in zip(positions, encoded, sizes, crcs, strict=True):
            if len(found) != size or google_crc32c.value(found) != crc:
                now = f"{len(found)}/{google_crc32c.value(found):08x}"
                raise IdentityError(
                    f"{data.path(int(position))} changed since the teachers saw it",
                    "Restore the image, or make a new cache for the changed data set.",
                    [Difference("bytes/crc32c", f"{size}/{crc:08x}", now)],
                )


def require_partners(recording: Recording, data: ImageData, views: ViewSet, shown: Sequence[int]) -> None:
    """Refuse data that lacks images which the cached views are mixed with.

    Args:
        recording: of the data.
        data: what the student trains on.
        views: the cache's.
        shown: views that the student will see.

    Raises:
        BadDataError: one is missing; it says how many.
    """
    if not views.mixes:
        return
    places, lost = recording.places(), set[int]()
    for view in shown:
        for start in range(0, len(data), _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, len(data)))
            rows = recording.partner_rows(views, positions, recording.params(positions, view))
            lost.update(rows[(rows != NO_PARTNER) & (places[rows] < 0)].tolist())
    if lost:
        raise BadDataError(
            f"the cached views are mixed with {len(lost)} images that are not in the training data, "
            f"first {recording.cache.keys[min(lost)]}",
            "Train on all the data that was cached, and complete the cache first; or cache this part by itself, "
            "in a --cache of its own.",
        )


@final
class Replay:
    """Draws cached views again: from the recorded parameters, so that no random code is run.

    Args:
        data: what the student trains on.
        recording: of the data.
        views: the cache's.
        drawer: for the student's input size.
    """

    def __init__(self, data: ImageData, recording: Recording, views: ViewSet, drawer: Drawer) -> None:
        self._data, self._recording, self._views, self._drawer = data, recording, views, drawer
        self._kept = None
        if recording.kept is not None and not views.train_views:  # view 0 is all that is shown
            self._kept = recording.kept.among(data, "images to train on")
        self._places = recording.places() if views.mixes else np.empty(0, np.int64)

    def draw(
        self, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes], view: int
    ) -> tuple[list[Drawn], Int64[np.ndarray, " b"], Params]:
        """The view of each image, the position of its partner (-1 for none), and the parameters.

        Raises:
            IdentityError: a partner changed since the teachers saw it.
            BadDataError: an image cannot be decoded, or a partner is not in the data.
        """
        params = self._recording.params(positions, view)
        partners = self._partners(positions, params)
        mixed = np.flatnonzero(partners >= 0)
        others = dict(zip(mixed.tolist(), self._read(partners[mixed], view), strict=True))
        decode = self._views.decode
        kept: Sequence[Drawn | None] = [None] * len(encoded)
        if self._kept is not None and view == 0:
            kept = self._kept.draw(positions, encoded, self._drawer.renders)
        drawn = []
        for place, (position, content, ready) in enumerate(
            zip(positions.tolist(), encoded, kept, strict=True)
        ):
            if ready is not None:
                drawn.append(ready)
                continue
            partner = None
            if place in others:
                other, other_params = others[place]
                partner = (self._data.picture(int(partners[place]), other, decode), other_params)
            drawn.append(
                self._drawer.replay(self._data.picture(position, content, decode), params[place], partner)
            )
        return drawn, partners, params

    def _partners(self, positions: Int64[np.ndarray, " b"], params: Params) -> Int64[np.ndarray, " b"]:
        if not self._views.mixes:
            return np.full(len(positions), NO_PARTNER, np.int64)
        rows = self._recording.partner_rows(self._views, positions, params)
        found = np.where(rows == NO_PARTNER, NO_PARTNER, self._places[rows])
        lost = np.flatnonzero((rows != NO_PARTNER) & (found < 0))
        if len(lost):
            key = self._recording.cache.keys[int(rows[lost[0]])]
            raise BadDataError(
                f"{self._data.path(int(positions[lost[0]]))} is mixed with {key}, which is not in the data",
                "Train on all the data that was cached.",
            )
        return found

    def _read(self, positions: Int64[np.ndarray, " m"], view: int) -> list[tuple[bytes, Params]]:
        """Checked bytes and recorded parameters of partners."""
        if not len(positions):
            return []
        encoded = self._data.encoded_at(positions)
        self._recording.check(self._data, positions, encoded)
        return list(zip(encoded, self._recording.params(positions, view), strict=True))
