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

import os
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, final

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcli.cache.owned import read_own
from kdcli.cache.provenance import Digest, Text, seal, unseal
from kdcli.documents import from_document, shaped
from kdcli.errors import Advice, CacheMissingError, CorruptError, StorageError, UsageError
from kdcli.files import storage_errors, write_json
from kdcli.reading import parse_json

BackendName = Literal["zarr", "hdf5"]
FORMAT: Final = 2
SAMPLES = "samples"
"""Name of the part that describes the samples themselves; every other part is an output of a teacher."""

MAX_BLOCK_ROWS = 4096
BLOCK_BYTES = 16 * 2**20

ROWS: Final = 2**30
"""Most rows of a cache. What a manifest says is refused beyond these before anything is looped over or allocated."""
UNITS: Final = 2**22
"""Most units of a part: each is a record."""
CHUNKS: Final = 2**26
"""Most chunks of an array: each is a file."""
_RESTORE: Final = "Restore manifest.json, or make the cache again; kd never guesses what a cache is."


@final
class Segment(BaseModel):
    """Samples that were added together: how many, and where they were (not what they are)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1, le=ROWS)
    spec: Text
    location: Text


@final
class DataIdentity(BaseModel):
    """Which samples a cache is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Digest = Field(description="sha256 over the keys in row order")
    labels: Digest | None = Field(description="sha256 over the labels in row order; null without labels")
    class_names: tuple[Text, ...] | None

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        if (self.labels is None) != (self.class_names is None):
            raise ValueError("labels: there are labels if and only if there are class_names")
        names = self.class_names or ()
        if len(set(names)) < len(names):  # classes are matched by name
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"class_names: two classes are called '{twice}'")
        return self

    def gate(self) -> dict[str, Any]:
        """The fields that must be equal for two data sets to be the same."""
        names = None if self.class_names is None else list(self.class_names)
        return {"keys": self.keys, "labels": self.labels, "class_names": names}


class _Recipe(BaseModel, extra="allow"):
    name: Text


class _ViewSet(BaseModel, extra="forbid"):
    train_views: int = Field(ge=0, le=CHUNKS)
    recipe: _Recipe
    decode: Text = "exact"
    clips: bool = False


class _CreatedConfig(BaseModel, extra="allow"):
    buffer_gb: float = Field(1.0, gt=0)


class _Created(BaseModel, extra="allow"):
    versions: dict[str, Text] = {}
    config: _CreatedConfig = _CreatedConfig()
    merged_from: list[str] = []


@final
class Manifest(BaseModel):
    """``manifest.json``: written by whoever creates or extends the cache, read by everybody.

    Rows are numbered through all segments. A segment starts at a block of its own, so rows between the
    end of a segment and the next one are padding: they count, but hold no sample and have an empty key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = FORMAT
    cache_id: str = Field(pattern="^[0-9a-f]{32}$")
    backend: BackendName = "zarr"
    block_rows: int = Field(ge=32, le=2**20, multiple_of=32)
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=4096)
    view_groups: tuple[Annotated[int, Field(ge=1, le=CHUNKS)], ...] = Field(
        min_length=1,
        max_length=4096,
        description="how many views each group has; a task computes one group from one decode",
    )
    data: DataIdentity
    view_set: Annotated[dict[str, Any], shaped(_ViewSet)]
    param_names: tuple[Text, ...] = Field(
        min_length=1, max_length=4096, description="columns of the stored view parameters"
    )
    view_pixels: tuple[Annotated[int, Field(ge=0, le=255)], ...] = Field(
        (), description="a few pixels of views of fixed images"
    )
    claim_timeout: float = Field(
        600.0, gt=0, le=10**6, description="seconds that a silent writer keeps a claim"
    )
    created: Annotated[dict[str, Any], shaped(_Created)]

    @model_validator(mode="after")
    def _require_bounded(self) -> Self:
        sizes = (
            ("segments", "rows", self.rows, ROWS),
            ("block_rows", "units a part", self.blocks * self.groups, UNITS),
            ("view_groups", "chunks an array", self.blocks * self.views, CHUNKS),
        )
        for field, what, count, most in sizes:
            if count > most:
                raise ValueError(f"{field}: {count} {what}, at most {most} are possible")
        if (told := self.view_set["train_views"]) != self.views - 1:
            raise ValueError(
                f"view_set.train_views: {told}, but view_groups hold {self.views - 1} beside view 0"
            )
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, checked like any manifest; pydantic's own would keep what is derived."""
        return type(self)(**{**dict(self), **(update or {})})

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First row of each segment."""
        return tuple(accumulate(map(self._span, self.segments[:-1]), initial=0))

    @cached_property
    def _first_views(self) -> tuple[int, ...]:
        """First view of each group, and the number of views."""
        return tuple(accumulate(self.view_groups, initial=0))

    @property
    def rows(self) -> int:
        """N: rows of every array, padding between segments included."""
        return self._starts[-1] + self.segments[-1].rows

    @property
    def samples(self) -> int:
        """Rows that hold a sample."""
        return sum(segment.rows for segment in self.segments)

    @property
    def views(self) -> int:
        """V: view 0 and the training views."""
        return self._first_views[-1]

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
        return range(self._starts[number], self._starts[number] + self.segments[number].rows)

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
        return bisect_right(self._starts, block * self.block_rows) - 1

    def rows_of(self, block: int) -> range:
        """Rows of one block that hold samples."""
        stop = self.segment_rows(self.segment_of(block)).stop
        return range(block * self.block_rows, min((block + 1) * self.block_rows, stop))

    def views_of(self, group: int, kept: int | None = None) -> range:
        """Views of one group; of an array that keeps only the first ``kept`` views, those it keeps."""
        start, stop = self._first_views[group : group + 2]
        return range(start, stop if kept is None else max(start, min(stop, kept)))

    def groups_of(self, kept: int) -> int:
        """Number of groups of an array that keeps the first ``kept`` views."""
        return bisect_left(self._first_views[:-1], kept)

    def group_of(self, view: int) -> int:
        """The group of a view."""
        return bisect_right(self._first_views, view) - 1


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
    with storage_errors(root):
        if root.is_file():
            raise StorageError(f"{root} is a file, not a cache folder", Advice("file-for-cache"))
        if not os.path.lexists(layout.manifest):
            if root.exists():
                raise CacheMissingError(
                    f"{root} is not a kd cache (no manifest.json)", Advice("folder-for-cache")
                )
            raise CacheMissingError(f"cache {root} does not exist", Advice("make", cache=root))
    with storage_errors(layout.manifest):
        return parse_manifest(read_own(layout.manifest, hint=_RESTORE), layout.manifest)


def parse_manifest(data: bytes, source: object) -> Manifest:
    """The manifest in the bytes of ``source``.

    Raises:
        CorruptError: it is damaged or of an unknown format.
    """
    document = parse_json(data, source, CorruptError, _RESTORE)
    _require_format(document, source)
    return from_document(Manifest, unseal(document, source, _RESTORE), source, CorruptError, _RESTORE)


def planned_manifest(**fields: Any) -> Manifest:
    """The manifest of a cache that is to be made, with an id of its own, or to grow.

    Raises:
        UsageError: more rows, views or units than a cache can have.
    """
    try:
        return Manifest(**{"cache_id": secrets.token_hex(16), **fields})
    except ValidationError as refusal:
        first = refusal.errors()[0]
        where = "".join(f"{place}: " for place in first["loc"][:1])
        raise UsageError(
            f"no cache can be as this one is to be: {where}{first['msg']}",
            "Use larger blocks, fewer views, or several caches.",
        ) from refusal


def _require_format(document: Any, path: object) -> None:
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
    by_count = rows // 16 if rows >= 512 else rows + 31
    return max(32, min(MAX_BLOCK_ROWS, BLOCK_BYTES // max(1, largest_row_bytes), by_count) // 32 * 32)
