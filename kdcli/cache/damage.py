"""What is wrong with a cache, as values: what was looked at, what is damaged, what repair does about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from kdcli.cache.backends.base import Inspection
from kdcli.cache.commits import Commit, chunk_files
from kdcli.cache.layout import Manifest, Unit
from kdcli.cache.owned import repair_hint
from kdcli.cache.store import Store
from kdcli.documents import to_document
from kdcli.errors import Advice, CorruptError, KdError, named

Remedy = Literal["recompute", "rewrite", "remove", "restore"]
"""What repair does: run the teacher again, write what follows from the rest, take the file out, nothing."""
_RESTORE = {"manifest.json": "restore-manifest", "teacher.json": "restore-teacher"}


@final
@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what it should be.

    Attributes:
        file: the file, below the cache.
        reason: what is wrong with it.
        remedy: what repair does about it.
        part: part that it belongs to, if any.
        array: array of the part, for chunks.
        unit: the unit that is to be computed again.
        view: view of the chunk.
        rows: first and last row that cannot be relied on.
    """

    file: str
    reason: str
    remedy: Remedy
    part: str = ""
    array: str = ""
    unit: Unit | None = None
    view: int | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.unit is None or self.rows is None:
            return f"{self.file}: {self.reason}"
        name = f"{self.part.partition('/')[0]}/{self.array}" if self.array else f"record of {self.part}"
        view = "" if self.view is None else f" view {self.view}"
        return f"{name} block {self.unit.block}{view} (rows {self.rows[0]}-{self.rows[1]}): {self.reason}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **to_document(self, "file", "reason", "remedy"),
            "part": self.part or None,
            "array": self.array or None,
            "block": None if self.unit is None else self.unit.block,
            "group": None if self.unit is None else self.unit.group,
            **to_document(self, "view", "rows"),
        }


@final
@dataclass(frozen=True, slots=True)
class Gap:
    """Units of a part that nobody has computed yet: no damage."""

    part: str
    units: int
    total: int

    def __str__(self) -> str:
        return f"{self.part}: {self.units} of {self.total} units are not written yet"


@final
@dataclass(frozen=True, slots=True)
class Audit:
    """What a check of a cache found.

    Attributes:
        root: the cache.
        cache_id: of its manifest; None when that is damaged.
        damages: everything that is wrong.
        gaps: what is missing.
        litter: files below the cache that an interrupted writer left; they do no harm.
        files: how many files were read.
        bytes: how many bytes of arrays were read.
        records: the sound records by part.
    """

    root: Path
    cache_id: str | None
    damages: tuple[Damage, ...]
    gaps: tuple[Gap, ...] = ()
    litter: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0
    records: Mapping[str, dict[tuple[int, int], Commit]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing is damaged."""
        return not self.damages

    def require_ok(self) -> None:
        """Refuse a damaged cache.

        Raises:
            CorruptError: naming the first damage and how many there are.
        """
        if self.damages:
            hopeless = all(damage.remedy == "restore" for damage in self.damages)
            topic = _RESTORE.get(Path(self.damages[0].file).name, "restore-output")
            raise CorruptError(
                f"{self.root}: {summary(self.damages)}", Advice(topic) if hopeless else repair_hint(self.root)
            )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "cache": named(str(self.root)),
            **to_document(self, "cache_id", "ok"),
            "complete": self.ok and not self.gaps,
            "damages": to_document(self.damages),
            "missing": to_document(self.gaps),
            **to_document(self, "litter", "files", "bytes"),
        }


def summary(damages: tuple[Damage, ...] | list[Damage]) -> str:
    """The first damage, and how many more there are."""
    more = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
    return f"{damages[0]}{more}"


def rows_of(manifest: Manifest, block: int) -> tuple[int, int]:
    """First and last row of a block that hold samples."""
    rows = manifest.rows_of(block)
    return rows.start, rows.stop - 1


def chunk_damage(store: Store, commit: Commit) -> list[Damage]:
    """Read the files that a record vouches for, and say which are not as it says."""
    found = []
    for array, view, path, size, crc in chunk_files(store, commit):
        reason = _difference(store, path, size, crc)
        if reason:
            rows = rows_of(store.manifest, commit.block)
            file = str(path.relative_to(store.layout.root))
            found.append(Damage(file, reason, "recompute", commit.part, array, commit.unit, view, rows))
    return found


def _difference(store: Store, path: Path, size: int, crc: int) -> str:
    try:
        found = store.inspect(path)
    except KdError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return "the file is missing"
        if isinstance(error.__cause__, PermissionError):
            raise
        return error.message
    return _compared(found, size, crc)


def _compared(found: Inspection, size: int, crc: int) -> str:
    if found.size != size:
        return f"{found.size} bytes instead of {size}"
    if found.crc != crc:
        return f"crc32c is {found.crc:08x}, recorded {crc:08x}"
    return "" if found.sound else "its own checksum does not fit its bytes"
