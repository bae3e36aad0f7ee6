"""Where everything lies in a cache, and how its rows are cut into blocks.

NAME.kd/
  manifest.json      what the cache is: :class:`Manifest`
  data.zarr/         the arrays, a plain Zarr v3 group: samples/, views/, teachers/<name>/
                     (data.hdf5/ in a cache of the HDF5 backend)
  teachers/<name>/   teacher.json: who it is; <kind>.json: what is kept of it
  commits/           what is done: one record per unit, one file per finished part
  claims/            what is being done, and by whom
  verified/          which part was checked in which state
  tmp/               everything that is not published yet
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict, Field

from kdcli.cache.provenance import seal, unseal
from kdcli.documents import from_document
from kdcli.errors import Advice, BadDataError, CacheMissingError, CorruptError, StorageError
from kdcli.files import write_json
from kdcli.reading import read_json

BackendName = Literal["zarr", "hdf5"]
FORMAT: Final = 2
SAMPLES = "samples"
"""Name of the part that describes the samples themselves; every other part is an output of a teacher."""

MAX_BLOCK_ROWS = 4096
BLOCK_BYTES = 16 * 2**20


@final
class Segment(BaseModel):
    """Samples that were added together: how many, and where they were (not what they are)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1)
    spec: str
    location: str


@final
class DataIdentity(BaseModel):
    """Which samples a cache is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: str = Field(description="sha256 over the keys in row order")
    labels: str | None = Field(description="sha256 over the labels in row order; null without labels")
    class_names: tuple[str, ...] | None

    def gate(self) -> dict[str, Any]:
        """The fields that must be equal for two data sets to be the same."""
        names = None if self.class_names is None else list(self.class_names)
        return {"keys": self.keys, "labels": self.labels, "class_names": names}


@final
class Manifest(BaseModel):
    """``manifest.json``: written by whoever creates or extends the cache, read by everybody.

    Rows are numbered through all segments. A segment starts at a block of its own, so rows between the
    end of a segment and the next one are padding: they count, but hold no sample and have an empty key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = FORMAT
    cache_id: str = Field(default_factory=lambda: secrets.token_hex(16))
    backend: BackendName = "zarr"
    block_rows: int = Field(ge=32, multiple_of=32)
    segments: tuple[Segment, ...] = Field(min_length=1)
    view_groups: tuple[int, ...] = Field(
        min_length=1, description="how many views each group has; a task computes one group from one decode"
    )
    data: DataIdentity
    view_set: dict[str, Any]
    param_names: tuple[str, ...] = Field(min_length=1, description="columns of the stored view parameters")
    view_pixels: tuple[int, ...] = Field((), description="a few pixels of views of fixed images")
    created: dict[str, Any]

    @property
    def rows(self) -> int:
        """N: rows of every array, padding between segments included."""
        return sum(self._span(segment) for segment in self.segments[:-1]) + self.segments[-1].rows

    @property
    def samples(self) -> int:
        """Rows that hold a sample."""
        return sum(segment.rows for segment in self.segments)

    @property
    def views(self) -> int:
        """V: view 0 and the training views."""
        return sum(self.view_groups)

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one of each segment may be shorter than ``block_rows``."""
        return -(-self.rows // self.block_rows)

    @property
    def groups(self) -> int:
        """Number of view groups."""
        return len(self.view_groups)

    @property
    def locations(self) -> tuple[str, ...]:
        """Specs that open the samples again, from any working directory."""
        return tuple(segment.location for segment in self.segments)

    def _span(self, segment: Segment) -> int:
        return -(-segment.rows // self.block_rows) * self.block_rows

    def segment_rows(self, number: int) -> range:
        """Rows of the samples of one segment."""
        start = sum(self._span(segment) for segment in self.segments[:number])
        return range(start, start + self.segments[number].rows)

    def sample_rows(self) -> Int64[np.ndarray, " samples"]:
        """Rows that hold a sample, in order."""
        parts = [self.segment_rows(number) for number in range(len(self.segments))]
        return np.concatenate([np.arange(part.start, part.stop) for part in parts])

    def padding_rows(self) -> Int64[np.ndarray, " padding"]:
        """Rows that hold no sample, because the next segment starts at a new block; in order."""
        ends = [self.segment_rows(number).stop for number in range(len(self.segments) - 1)]
        parts = [np.arange(end, -(-end // self.block_rows) * self.block_rows) for end in ends]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def holds(self, block: int, group: int) -> bool:
        """Whether a unit is one of this manifest's; a cache that has grown since it was read has more."""
        return block < self.blocks and group < self.groups

    def segment_of(self, block: int) -> int:
        """Number of the segment that a block belongs to."""
        row = block * self.block_rows
        return max(n for n in range(len(self.segments)) if self.segment_rows(n).start <= row)

    def rows_of(self, block: int) -> range:
        """Rows of one block that hold samples."""
        stop = self.segment_rows(self.segment_of(block)).stop
        return range(block * self.block_rows, min((block + 1) * self.block_rows, stop))

    def views_of(self, group: int, kept: int | None = None) -> range:
        """Views of one group; of an array that keeps only the first ``kept`` views, those it keeps."""
        start = sum(self.view_groups[:group])
        stop = start + self.view_groups[group]
        return range(start, stop if kept is None else max(start, min(stop, kept)))

    def groups_of(self, kept: int) -> int:
        """Number of groups of an array that keeps the first ``kept`` views."""
        return sum(1 for group in range(self.groups) if self.views_of(group, kept))

    def group_of(self, view: int) -> int:
        """The group of a view."""
        return next(group for group in range(self.groups) if view in self.views_of(group))


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """What is claimed, written and committed as one: a part, a block, a group of views.

    A part is the samples, or one kind of output of a teacher: ``resnet50/logits``.
    """

    part: str
    block: int
    group: int

    @property
    def stem(self) -> str:
        """File name of the unit's commit and claim, without suffix."""
        return f"{self.block:06d}-{self.group:04d}"

    @property
    def teacher(self) -> str:
        """The teacher's name; "samples" for the samples."""
        return self.part.partition("/")[0]

    @property
    def kind(self) -> str:
        """The kind of output; empty for the samples."""
        return self.part.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.part} block {self.block} group {self.group}"


@final
class Layout:
    """Paths inside one cache.

    Attributes:
        manifest: what the cache is.
        index: virtual data sets over the blocks of an HDF5 cache, for other tools; kd never reads it.
        teachers: records of the teachers.
        commits: commit records.
        claims: claims of running writers.
        verified: stamps of finished checks.
        tmp: unpublished files, on the same file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest, self.index = root / "manifest.json", root / "index.h5"
        self.teachers, self.commits = root / "teachers", root / "commits"
        self.claims, self.verified, self.tmp = root / "claims", root / "verified", root / "tmp"

    def data(self, backend: BackendName) -> Path:
        """Folder of the arrays."""
        return self.root / f"data.{backend}"

    def teacher(self, name: str) -> Path:
        """Record of one teacher."""
        return self.teachers / name / "teacher.json"

    def output(self, name: str, kind: str) -> Path:
        """Record of one kind of output of a teacher."""
        return self.teachers / name / f"{kind}.json"

    def commit(self, unit: Unit) -> Path:
        """Commit record of one unit."""
        return self.commits / unit.part / f"{unit.stem}.json"

    def compacted(self, part: str) -> Path:
        """All commit records of a finished part, one JSON document a line."""
        return self.commits / f"{part}.jsonl"

    def claim(self, unit: Unit) -> Path:
        """Claim of one unit."""
        return self.claims / unit.part / f"{unit.stem}.json"


def load_manifest(root: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        CacheMissingError: there is no cache at ``root``.
        StorageError: ``root`` is a file, or cannot be read.
        CorruptError: the manifest is damaged or of an unknown format.
    """
    layout = Layout(root)
    if root.is_file():
        raise StorageError(f"{root} is a file, not a cache folder", Advice("file-for-cache"))
    if not layout.manifest.is_file():
        if root.exists():
            raise CacheMissingError(
                f"{root} is not a kd cache (no manifest.json)", Advice("folder-for-cache")
            )
        raise CacheMissingError(f"cache {root} does not exist", Advice("make", cache=root))
    restore = "Restore manifest.json, or make the cache again; kd never guesses what a cache is."
    try:
        document = read_json(layout.manifest)
    except BadDataError as error:
        raise CorruptError(error.message, restore) from error
    _require_format(document, layout.manifest)
    content = unseal(document, layout.manifest, restore)
    return from_document(Manifest, content, layout.manifest, CorruptError, restore)


def _require_format(document: Any, path: Path) -> None:
    found = document.get("format") if isinstance(document, dict) else None
    if isinstance(found, int) and found > FORMAT:
        message = f"{path}: the cache is of format {found}, this kd reads format {FORMAT}"
        raise CorruptError(message, Advice("update"))
    if isinstance(found, int) and found < FORMAT:
        raise CorruptError(
            f"{path}: the cache is of format {found}: its view 0 is one crop for all teachers, not what each one's "
            f"evaluation shows it (format {FORMAT})",
            Advice("new-format"),
        )


def write_manifest(layout: Layout, manifest: Manifest) -> None:
    """Publish ``manifest``, whole or not at all."""
    write_json(layout.manifest, seal(manifest.model_dump(mode="json")))


def choose_block_rows(rows: int, largest_row_bytes: int) -> int:
    """Rows per block: about 16 MB of the largest array, a multiple of 32, at least 16 blocks from 512 rows on.

    Args:
        rows: samples in the cache.
        largest_row_bytes: bytes of one row and view of the largest array.
    """
    by_size = BLOCK_BYTES // max(1, largest_row_bytes)
    by_count = rows // 16 if rows >= 512 else rows + 31
    return max(32, min(MAX_BLOCK_ROWS, by_size, by_count) // 32 * 32)
