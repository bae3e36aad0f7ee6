"""View 0 as a cache keeps it (``pixels@eval``): read where it is what would be drawn, so that no image is decoded.

The pixels lie with the teacher that was shown them, but what they are is its render: they serve every teacher and
student of an equal one. Each unit says by what its pixels were drawn (:func:`drawn_by`); those of another
installation are not used, as its decoder or its resampling may differ. Images are still read and compared with what
the cache recorded of them: only decoding and resizing are left out.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any, Final, final

import google_crc32c
import numpy as np
from jaxtyping import Bool, Int64
from PIL import features

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES
from kdcli.cache.matching import Samples, find_places, reads_alike
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import ensure_verified
from kdcli.console import console
from kdcli.data.decode import decode_image
from kdcli.data.drawing import fixed_images, fixed_photo, show
from kdcli.data.photos import SCALES
from kdcli.data.views import Drawn, decode_of
from kdcli.geometry import Render
from kdcli.outputs import PIXELS
from kdcli.types import DecodeMode

DRAWN_BY: Final = "drawn_by"
"""Under which a unit's record of how it was made says by what its pixels were drawn."""
_CODECS: Final = ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "avif", "libtiff", "freetype2")
_PLUGINS: Final = ("pillow", "pillow-heif", "pillow-jxl-plugin")


@lru_cache(maxsize=64)
def drawn_by(target: Render, decode: DecodeMode = "exact") -> str:
    """What decodes and draws here: versions of the libraries, and what they make of fixed images.

    Args:
        target: what is drawn.
        decode: and of what.

    Returns:
        sha256, equal only where view 0 of every image comes out alike.
    """
    digest = hashlib.sha256(repr([*map(features.version, _CODECS), *map(_version, _PLUGINS)]).encode())
    for image in fixed_images():
        for how in ({"quality": 75}, {"quality": 95, "subsampling": 0, "progressive": True}):
            file = io.BytesIO()
            image.save(file, "JPEG", **how)
            digest.update(show(decode_image(file.getvalue(), "a fixed image"), target).tobytes())
    if decode == "scaled":
        for scale in SCALES:
            digest.update(fixed_photo().at(scale).tobytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@final
class KeptPixels:
    """View 0 of the rows of a cache, as some models are shown it. Picklable; workers map chunks themselves.

    Args:
        cache: where the pixels are.
        owners: per render, whose pixels they are in each member; a member that keeps none has an empty name.
        usable: rows whose pixels are there for all renders.
    """

    def __init__(
        self, cache: CacheSet, owners: Mapping[Render, Sequence[str]], usable: Bool[np.ndarray, " n"]
    ) -> None:
        self._cache, self._owners, self._usable = cache, owners, usable
        self._known: dict[int, tuple[Samples, KnownImages | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    @classmethod
    def find(
        cls, cache: CacheSet, renders: Iterable[Render], rows: Int64[np.ndarray, " m"] | None = None
    ) -> "KeptPixels | None":
        """What a cache keeps of view 0 as all of ``renders`` show it, checked like all that is read of a cache.

        Pixels that other versions drew are none; it is said.

        Args:
            cache: where to look.
            renders: what images are drawn as.
            rows: of interest; default: all.

        Raises:
            CorruptError: bytes of the pixels changed since they were written.
        """
        renders = list(dict.fromkeys(renders))
        usable = np.full(int(cache.offsets[-1]), rows is None)
        usable[[] if rows is None else rows] = True
        owners: dict[Render, list[str]] = {render: [] for render in renders}
        for member, start, stop in zip(cache.members, cache.offsets, cache.offsets[1:], strict=False):
            for render in renders:
                owner, found = _owner(member, render)
                owners[render].append(owner)
                usable[start:stop] &= found
        if not renders or not usable.any():
            return None
        for number, member in enumerate(cache.members):
            for owner in {owners[render][number] for render in renders} - {""}:
                ensure_verified(member, f"{owner}/{PIXELS}", cache.verify)
        return cls(cache, owners, usable)

    @property
    def decode(self) -> DecodeMode:
        """What its pixels were drawn of."""
        return decode_of(self._cache.view_set)

    def __len__(self) -> int:
        """How many images need no decoding."""
        return int(self._usable.sum())

    def tell(self, count: int, total: int, what: str) -> None:
        """Say what is not decoded."""
        names = dict.fromkeys(name for each in self._owners.values() for name in each if name)
        console.note(
            f"{what}: {count} of {total} are read as they are kept for {' and '.join(names)}, not decoded "
            f"({'; '.join(map(str, self._owners))})"
        )

    def shows(self, renders: Iterable[Render]) -> bool:
        """Whether it has all of these."""
        return self._owners.keys() >= set(renders)

    def draw(self, rows: Int64[np.ndarray, " b"], renders: Iterable[Render]) -> list[Drawn | None]:
        """View 0 of some rows (-1: of none); None where it has to be drawn.

        Args:
            rows: of the cache.
            renders: what to read it as; see :meth:`shows`.
        """
        places = np.flatnonzero((rows >= 0) & self._usable[rows])
        member_of = np.searchsorted(self._cache.offsets, rows[places], side="right") - 1
        drawn: list[Drawn | None] = [None] * len(rows)
        for number in np.unique(member_of).tolist():
            mine = places[member_of == number]
            local, member = rows[mine] - self._cache.offsets[number], self._cache.members[number]
            found = {r: member.gather(self._owners[r][number], PIXELS, local, 0) for r in renders}
            for place, row in enumerate(mine.tolist()):
                drawn[row] = {render: pixels[place] for render, pixels in found.items()}
        return drawn

    def among(self, data: Samples, what: str) -> "KnownImages | None":
        """The images of a data set whose key the cache knows, which is said; None where it knows none."""
        if id(data) not in self._known:  # what validates is asked for after every epoch
            self._known[id(data)] = data, self._among(data, what)
        return self._known[id(data)][1]

    def _among(self, data: Samples, what: str) -> "KnownImages | None":
        rows = np.full(len(data), -1, np.int64)
        for member, offset in zip(self._cache.members, self._cache.offsets, strict=False):
            places = np.flatnonzero(rows < 0)
            if len(places) and reads_alike(member.manifest, data):
                found = find_places(member, data, places)
                rows[places[found >= 0]] = found[found >= 0] + offset
        rows[~self._usable[rows]] = -1
        if count := int((rows >= 0).sum()):
            self.tell(count, len(data), what)
        return KnownImages(self, self._cache, rows) if count else None


@final
class KnownImages:
    """Images of a data set that may be those of a cache: their bytes tell.

    Args:
        kept: pixels of the cache.
        cache: what it recorded of its images.
        rows: row of each image of the data set that has the key of one, else -1.
    """

    def __init__(self, kept: KeptPixels, cache: CacheSet, rows: Int64[np.ndarray, " n"]) -> None:
        self._kept, self._cache, self._rows = kept, cache, rows

    def draw(
        self, positions: Int64[np.ndarray, " b"], encoded: Sequence[bytes], renders: Iterable[Render]
    ) -> list[Drawn | None]:
        """View 0 of images with these bytes; None where it has to be drawn."""
        rows = self._rows[positions]
        known = np.flatnonzero(rows >= 0)
        for place, size, crc in zip(known.tolist(), *self._cache.content(rows[known]), strict=True):
            if (len(encoded[place]), google_crc32c.value(encoded[place])) != (size, crc):
                rows[place] = -1
        return self._kept.draw(rows, renders)


def _owner(member: CacheReader, render: Render) -> tuple[str, Bool[np.ndarray, " n"]]:
    """The teacher of a cache that keeps most of view 0 of a render as it is drawn here, and of which rows."""
    best: tuple[str, Bool[np.ndarray, " n"]] = ("", np.zeros(member.manifest.rows, bool))
    odd, then = np.zeros(member.manifest.rows, bool), "an unknown version"
    for name, record in member.teachers.items():
        if PIXELS not in record.outputs or Render.of(record.preprocess) != render:
            continue
        part, samples = f"{name}/{PIXELS}", member.commits(SAMPLES)
        here = drawn_by(render, decode_of(member.manifest.view_set))
        found = np.zeros(member.manifest.rows, bool)
        for commit in member.commits(part).values():
            rows, recorded = member.manifest.rows_of(commit.block), samples.get((commit.block, 0))
            if commit.made.get(DRAWN_BY) != here:
                odd[rows.start : rows.stop] = True
                then = commit.made.get("versions", {}).get("pillow", then)
            elif (
                recorded is not None and recorded.content == commit.content
            ):  # images are compared with what was drawn
                found[rows.start : rows.stop] = True
        found[list(member.absent(part))] = False
        if found.sum() > best[1].sum():
            best = name, found
    if lost := int((odd & ~best[1]).sum()):
        console.warn(
            f"{member.layout.root}: other versions drew the pixels of {lost} images that it keeps as {render}: they "
            f"are decoded (Pillow {then}, here {_version('pillow')}, or its codecs)"
        )
    return best
