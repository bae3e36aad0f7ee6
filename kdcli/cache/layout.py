"""Where everything lies in a cache, and how its rows are cut into blocks.

NAME.kd/
  manifest.json      what the cache is: :class:`Manifest`
  data.zarr/         the arrays, a plain Zarr v3 group: samples/, views/, teachers/<name>/
  commits/           what is done: one record per unit, one file per finished part
  claims/            what is being done, and by whom
  verified/          which part was checked in which state
  tmp/               everything that is not published yet
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli.cache.provenance import canonical_sha256
from kdcli.errors import BadDataError, CacheMissingError, CorruptError, StorageError
from kdcli.runtime import read_json

FORMAT: Final = 1
SAMPLES = "samples"
"""Name of the part that describes the samples themselves; every other part is a teacher."""

MAX_BLOCK_ROWS = 4096
BLOCK_BYTES = 16 * 2**20


@final
class DataIdentity(BaseModel):
    """Which samples a cache is about. ``location`` and ``spec`` tell where they were, not what they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    location: str
    keys: str = Field(description="sha256 over the keys in row order")
    labels: str | None = Field(description="sha256 over the labels in row order; null without labels")
    class_names: tuple[str, ...] | None

    def gate(self) -> dict[str, Any]:
        """The fields that must be equal for two data sets to be the same."""
        names = None if self.class_names is None else list(self.class_names)
        return {"keys": self.keys, "labels": self.labels, "class_names": names}


@final
class Manifest(BaseModel):
    """``manifest.json``: written once by whoever creates the cache, read by everybody."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    cache_id: str = Field(default_factory=lambda: secrets.token_hex(16))
    backend: Literal["zarr"] = "zarr"
    rows: int = Field(ge=1)
    views: int = Field(ge=1)
    block_rows: int = Field(ge=32, multiple_of=32)
    view_group: int = Field(ge=1, description="views that one task computes from one decode")
    data: DataIdentity
    view_set: dict[str, Any]
    created: dict[str, Any]

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be shorter than ``block_rows``."""
        return -(-self.rows // self.block_rows)

    @property
    def groups(self) -> int:
        """Number of view groups."""
        return -(-self.views // self.view_group)

    def rows_of(self, block: int) -> range:
        """Rows of one block."""
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.rows))

    def views_of(self, group: int) -> range:
        """Views of one group."""
        return range(group * self.view_group, min((group + 1) * self.view_group, self.views))


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """What is claimed, written and committed as one: a part (teacher), a block, a group of views."""

    part: str
    block: int
    group: int

    @property
    def stem(self) -> str:
        """File name of the unit's commit and claim, without suffix."""
        return f"{self.block:06d}-{self.group:04d}"

    def __str__(self) -> str:
        return f"{self.part} block {self.block} group {self.group}"


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Paths inside one cache."""

    root: Path

    @property
    def manifest(self) -> Path:
        """The manifest."""
        return self.root / "manifest.json"

    @property
    def group(self) -> Path:
        """The Zarr group."""
        return self.root / "data.zarr"

    @property
    def commits(self) -> Path:
        """Commit records."""
        return self.root / "commits"

    @property
    def created(self) -> Path:
        """Proof of the manifest and of the key and label arrays, written when the cache was made."""
        return self.commits / "created.json"

    @property
    def claims(self) -> Path:
        """Claims of running writers."""
        return self.root / "claims"

    @property
    def verified(self) -> Path:
        """Stamps of finished checks."""
        return self.root / "verified"

    @property
    def tmp(self) -> Path:
        """Unpublished files, on the same file system."""
        return self.root / "tmp"

    def teacher(self, name: str) -> Path:
        """Folder of one teacher's arrays."""
        return self.group / "teachers" / name

    def array(self, part: str, name: str) -> Path:
        """Folder of one array. View parameters belong to the samples but have a folder of their own."""
        if part != SAMPLES:
            return self.teacher(part) / name
        return self.group / ("views" if name == "params" else SAMPLES) / name

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
        raise StorageError(
            f"{root} is a file, not a cache folder", "Give the folder that cache-teachers made."
        )
    if not layout.manifest.is_file():
        if root.exists():
            raise CacheMissingError(
                f"{root} is not a kd cache (no manifest.json)", "Give the folder that kd cache-teachers made."
            )
        raise CacheMissingError(
            f"cache {root} does not exist", f"kd cache-teachers DATA --cache {root} --teacher SPEC"
        )
    restore = "Restore manifest.json, or make the cache again; kd never guesses what a cache is."
    try:
        document, proof = read_json(layout.manifest), read_json(layout.created)
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptError(f"{layout.manifest}: {where}: {first['msg']}", restore) from error
    except (BadDataError, FileNotFoundError) as error:
        raise CorruptError(f"{layout.manifest}: {error}", restore) from error
    if proof.get("manifest") != canonical_sha256(document):
        raise CorruptError(f"{layout.manifest} was edited after the cache was made", restore)
    return manifest


def choose_block_rows(rows: int, largest_row_bytes: int) -> int:
    """Rows per block: about 16 MB of the largest array, a multiple of 32, at least 16 blocks from 512 rows on.

    Args:
        rows: samples in the cache.
        largest_row_bytes: bytes of one row and view of the largest array.
    """
    by_size = BLOCK_BYTES // max(1, largest_row_bytes)
    by_count = rows // 16 if rows >= 512 else rows + 31
    return max(32, min(MAX_BLOCK_ROWS, by_size, by_count) // 32 * 32)
