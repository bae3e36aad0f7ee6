"""From a spec string to an :class:`ImageData`: a map-style data set with stable keys."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64
from PIL import Image

from kdcli.cache.keytable import KeyTable
from kdcli.cache.shelf import Stage
from kdcli.console import console
from kdcli.data.base import ImageSource, Listing, Opening, SourceKind
from kdcli.data.concatenated import ConcatenatedSource, concatenate_keys, concatenate_labels
from kdcli.data.folder import FolderSource, find_folder
from kdcli.data.photos import Picture
from kdcli.data.spec import NO_LABELS, DataSpec, Exif, require_option
from kdcli.data.stored import StoredSource
from kdcli.data.subset import choose, in_share
from kdcli.data.without import leave_out
from kdcli.options.common import DataOptions
from kdcli.registry import SOURCES
from kdcli.types import DecodeMode

__all__ = ["ImageData", "ImageSource", "Listing", "open_data", "open_source"]


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
        notes: see :class:`~kdcli.data.base.Listing`; those of the whole.
    """

    notes: tuple[str, ...] = ()

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
    def clips(self) -> bool:
        """Whether its samples are clips."""
        return self.source.clips

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

    def encoded_at(self, rows: Int64[np.ndarray, " b"]) -> list[bytes]:
        """:meth:`encoded` of several samples."""
        return [self.source.encoded(key) for key in self.keys.at(rows)]

    def sizes(self) -> Int64[np.ndarray, " n"]:
        """Numbers of encoded bytes, cheaply; -1 where that needs decoding or the sample is gone."""
        return np.fromiter((self.source.size(key) for key in self.keys), np.int64, len(self))

    def decode(self, row: int, encoded: bytes) -> Image.Image:
        """The RGB image in the encoded bytes of a sample, upright unless ``exif=ignore``.

        Raises:
            BadDataError: naming the sample and the reason.
        """
        return self.source.decode(self.keys[row], encoded)

    def picture(self, row: int, encoded: bytes, how: DecodeMode) -> Picture:
        """:meth:`decode` for views: what they are drawn of, as ``--decode`` says."""
        return self.source.picture(self.keys[row], encoded, how)

    def image(self, row: int) -> Image.Image:
        """The upright RGB image of a sample; raises like :meth:`encoded` and :meth:`decode`."""
        return self.decode(row, self.encoded(row))

    def path(self, row: int) -> str:
        """What a person calls the sample: its file, or ``source#key``."""
        return self.source.path(self.keys[row])

    def select(self, rows: Int64[np.ndarray, " m"]) -> "ImageData":
        """The samples ``rows``, in that order; ``spec`` and ``location`` stay those of the whole."""
        return ImageData(self.spec, self.source, self.keys.select(rows), self.labels[rows], self.class_names)


def open_data(
    spec: str | DataSpec,
    *,
    data_root: Path | None = None,
    download: bool = False,
    exif: Exif = "apply",
    stage: Stage | None = None,
) -> ImageData:
    """Open a data set.

    Args:
        spec: in the grammar of :mod:`kdcli.data.spec`.
        data_root: folder of relative folders and of ``torch/`` and ``hfds/`` data sets.
        download: allow ``torch/`` and ``hfds/`` data sets to be downloaded.
        exif: whether images are turned as their EXIF says, where ``spec`` does not say.
        stage: where files of a store are brought to; default: $KD_STAGE or the user's cache folder, without limit.

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
            parsed,
            [
                open_data(part, data_root=data_root, download=download, exif=exif, stage=stage)
                for part in parsed.members
            ],
        )
    parsed = replace(parsed, exif="ignore" if (parsed.exif or exif) == "ignore" else None)
    source = open_source(parsed, data_root, download, stage)
    if parsed.exif is not None:
        source = StoredSource(source)
    listing = _listing(source, parsed)
    if parsed.without is not None:
        listing = leave_out(listing, Path(parsed.without), str(parsed))
    rows, labels, class_names = choose(parsed, listing.labels, listing.class_names)
    keys = listing.keys if len(rows) == len(listing.keys) else listing.keys.select(rows)
    data = ImageData(parsed, source, keys, labels, class_names)
    data.notes = listing.notes
    for note in data.notes:
        console.warn(note)
    return data


def open_told(spec: str, options: DataOptions) -> ImageData:
    """See :func:`open_data`: a data set as the options of a command say."""
    return open_data(
        spec,
        data_root=options.data_root,
        download=options.download,
        exif=options.exif,
        stage=Stage.told(gigabytes=options.stage_limit),
    )


def _listing(source: ImageSource, spec: DataSpec) -> Listing:
    """The samples of the split: a share is drawn before anything else is left out, so that others complete it."""
    task = None if spec.labels == NO_LABELS else spec.labels
    if spec.split is None:
        return source.listing(None, task)
    listing = source.listing(spec.split.name, task)
    if not spec.split.shares:
        return listing
    rows = np.flatnonzero(in_share(listing.labels, spec.split, spec.seed))
    return listing.select(rows)


def _concatenate(spec: DataSpec, parts: list[ImageData]) -> ImageData:
    labels, class_names = concatenate_labels(
        [part.labels for part in parts], [part.class_names for part in parts]
    )
    if class_names is None and any(part.class_names is not None for part in parts):
        console.warn(f"the data sets of {spec} name different classes, so their labels are left out")
    source = ConcatenatedSource([part.source for part in parts], [part.location for part in parts])
    data = ImageData(spec, source, concatenate_keys([part.keys for part in parts]), labels, class_names)
    data.notes = tuple(note for part in parts for note in part.notes)
    return data


def open_source(
    spec: DataSpec, data_root: Path | None, download: bool, stage: Stage | None = None
) -> ImageSource:
    """Where the images of a data set that is one come from; raises like :func:`open_data`."""
    scheme, _, rest = spec.source.partition("/")
    kind: SourceKind = SOURCES.find(scheme)
    if kind.names and rest not in kind.names:
        return FolderSource.open(find_folder(spec.source, data_root))  # what only looks like a scheme
    options = dict(spec.own)
    for key in options:
        require_option(key, kind.options, str(spec))
    return kind.open(Opening(scheme, rest, data_root, download, options, stage or Stage()))
