"""From a spec string to an :class:`ImageData`: a map-style data set with stable keys."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.console import console
from kdcli.data.base import ImageSource, Listing
from kdcli.data.concatenated import ConcatenatedSource, concatenate_keys, concatenate_labels
from kdcli.data.embedded import PIXEL_SETS, FoolboxSource, PixelSource
from kdcli.data.folder import FolderSource
from kdcli.data.glyphs import SCRIPTS, GlyphSource
from kdcli.data.spec import JOIN, NO_LABELS, SCHEMES, DataSpec
from kdcli.data.subset import choose
from kdcli.data.without import leave_out
from kdcli.errors import NotFoundError, nearest
from kdcli.files import storage_errors

__all__ = ["ImageData", "ImageSource", "Listing", "embedded_names", "open_data"]


@final
class ImageData:
    """Images with stable keys and integer labels.

    Holds packed keys and one label per row, no object per sample: cheap at a million rows and in the
    workers of a DataLoader, where it can be pickled (spawn) or inherited (fork).

    Attributes:
        spec: what it was opened from.
        source: where the images come from.
        keys: stable names of the samples, in plain string order unless selected otherwise.
        labels: indices into ``class_names``; -1 for samples without a label.
        class_names: None without labels.
    """

    def __init__(
        self,
        spec: DataSpec,
        source: ImageSource,
        keys: KeyTable,
        labels: Int64[np.ndarray, " n"],
        class_names: tuple[str, ...] | None,
    ) -> None:
        self.spec, self.source = spec, source
        self.keys, self.labels, self.class_names = keys, labels, class_names

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def location(self) -> str:
        """Spec text that reopens the whole data set from any working directory."""
        without = self.spec.without and str(Path(self.spec.without).absolute())
        return str(replace(self.spec, source=self.source.text, without=without))

    def keys_in(self, locations: Sequence[str]) -> KeyTable:
        """What a cache made from ``locations`` calls these samples, one key each."""
        return self.source.keys_in(self.keys, {DataSpec.parse(location).source for location in locations})

    def encoded(self, row: int) -> bytes:
        """The bytes of a sample, over which its identity is computed.

        Raises:
            BadDataError: the sample is gone.
            StorageError: it cannot be read.
        """
        return self.source.encoded(self.keys[row])

    def sizes(self) -> Int64[np.ndarray, " n"]:
        """Numbers of encoded bytes, cheaply; -1 where that needs decoding or the sample is gone."""
        return np.fromiter((self.source.size(key) for key in self.keys), np.int64, len(self))

    def decode(self, row: int, encoded: bytes) -> Image.Image:
        """The upright RGB image in the encoded bytes of a sample.

        Raises:
            BadDataError: naming the sample and the reason.
        """
        return self.source.decode(self.keys[row], encoded)

    def image(self, row: int) -> Image.Image:
        """The upright RGB image of a sample; raises like :meth:`encoded` and :meth:`decode`."""
        return self.decode(row, self.encoded(row))

    def path(self, row: int) -> str:
        """What a person calls the sample: its file, or ``source#key``."""
        return self.source.path(self.keys[row])

    def select(self, rows: Int64[np.ndarray, " m"]) -> "ImageData":
        """The samples ``rows``, in that order; ``spec`` and ``location`` stay those of the whole."""
        return ImageData(self.spec, self.source, self.keys.select(rows), self.labels[rows], self.class_names)


def open_data(spec: str | DataSpec, *, data_root: Path | None = None, download: bool = False) -> ImageData:
    """Open a data set.

    Args:
        spec: in the grammar of :mod:`kdcli.data.spec`.
        data_root: folder of relative folders and of ``torch/`` and ``hfds/`` data sets.
        download: allow ``torch/`` and ``hfds/`` data sets to be downloaded.

    Raises:
        UsageError: bad grammar, unknown class or task, or splits taken for classes.
        NotFoundError: there is no such source or split.
        BadDataError: no images, a file in place of a folder, labels needed and missing, keys of another data set.
        MissingExtraError: the source needs a package that is not installed.
        StorageError: it cannot be read.
    """
    parsed = DataSpec.parse(spec) if isinstance(spec, str) else spec
    if parsed.members:
        return _concatenate(
            parsed, [open_data(part, data_root=data_root, download=download) for part in parsed.members]
        )
    source = _open_source(parsed.source, data_root, download)
    listing = source.listing(parsed.split, None if parsed.labels == NO_LABELS else parsed.labels)
    if parsed.without is not None:
        listing = leave_out(listing, Path(parsed.without), str(parsed))
    rows, labels, class_names = choose(parsed, listing.labels, listing.class_names)
    keys = listing.keys if len(rows) == len(listing.keys) else listing.keys.select(rows)
    return ImageData(parsed, source, keys, labels, class_names)


def _concatenate(spec: DataSpec, parts: list[ImageData]) -> ImageData:
    labels, class_names = concatenate_labels(
        [part.labels for part in parts], [part.class_names for part in parts]
    )
    if class_names is None and any(part.class_names is not None for part in parts):
        console.warn(f"the data sets of {spec} name different classes, so their labels are left out")
    source = ConcatenatedSource([part.source for part in parts], [part.location for part in parts])
    return ImageData(spec, source, concatenate_keys([part.keys for part in parts]), labels, class_names)


def embedded_names() -> tuple[str, ...]:
    """Sources that come inside packages."""
    return (*PIXEL_SETS, "foolbox/imagenet", *(f"glyphs/{script}" for script in SCRIPTS))


def _open_source(text: str, data_root: Path | None, download: bool) -> ImageSource:
    scheme, _, rest = text.partition("/")
    if scheme == "torch":
        from kdcli.data.torchsets import TorchSource  # imports nothing heavy itself, but few need it

        return TorchSource.open(rest, data_root, download)
    if scheme == "hfds":
        from kdcli.data.hfds import HubSource

        return HubSource.open(rest, data_root, download)
    if text in PIXEL_SETS:
        return PixelSource(text)
    if text == "foolbox/imagenet":
        return FoolboxSource()
    if scheme == "glyphs" and rest in SCRIPTS:
        return GlyphSource(rest)
    return FolderSource.open(_find_folder(text, data_root))


def _find_folder(text: str, data_root: Path | None) -> Path:
    """The folder of ``folder/REL``, or of what only looks like a scheme.

    Raises:
        NotFoundError: nothing is there; near names of embedded sources are suggested.
    """
    scheme, _, rest = text.partition("/")
    wanted = [rest, text] if scheme == "folder" and rest else [text]
    roots = [data_root, Path()] if data_root else [Path()]
    for name in wanted:
        for root in roots:
            with storage_errors(root / name):
                if (root / name).exists():
                    return root / name
    if scheme != "folder":
        raise NotFoundError(
            f"unknown data set '{text}'.{nearest(text, embedded_names())}",
            f"Known: {', '.join(embedded_names())}; torch/NAME, hfds/NAME, or a folder.",
        )
    where = f" below {data_root} or {Path.cwd()}" if data_root else f" below {Path.cwd()}"
    raise NotFoundError(
        f"there is no folder '{rest}'{'' if Path(rest).is_absolute() else where}."
        + nearest(rest, (*embedded_names(), *(f"{known}/{rest.partition('/')[2]}" for known in SCHEMES[1:]))),
        f"Behind {JOIN}, a folder is written folder/PATH."
        if JOIN in rest
        else "Check the path, give --data-root, or use an embedded set such as sklearn/digits.",
    )
