"""What a run of cache-teachers would cost, to the byte; measuring.py adds the hours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from kdcli.cache.arrays import WHOLE_ARRAYS, sample_arrays
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.store import BACKENDS, Store
from kdcli.cache.writer import CacheWriter
from kdcli.console import size
from kdcli.errors import NoSpaceError
from kdcli.extract.config import CacheConfig
from kdcli.extract.prepare import Prepared, prepare
from kdcli.extract.result import payload_bytes
from kdcli.files import available_gb
from kdcli.runtime import worker_count

if TYPE_CHECKING:
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.extract.speeds import Measured


@final
@dataclass(frozen=True, slots=True)
class CachePlan:
    """What there is to do.

    Attributes:
        rows, views: of the cache.
        block_rows: rows per block.
        tasks: blocks x view groups that anything is missing of.
        images: image views to compute.
        arrays: bytes on disk of every array of every teacher when complete; "samples" for what is
            kept of the images themselves.
        bytes: all of these together.
        bytes_missing: of those, what is not written yet.
        free: bytes free where the cache lies or would lie.
        tasks_missing: of those tasks, the ones that each teacher has a part in.
        measured: speeds, if they were asked for.
    """

    rows: int
    views: int
    block_rows: int
    tasks: int
    images: int
    arrays: dict[str, dict[str, int]]
    bytes: int
    bytes_missing: int
    free: int
    tasks_missing: dict[str, int]
    measured: "Measured | None" = None

    @property
    def fits(self) -> bool:
        """Whether what is missing fits into the free space."""
        return self.bytes_missing <= self.free

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        return {
            "rows": self.rows,
            "views": self.views,
            "block_rows": self.block_rows,
            "tasks": self.tasks,
            "images": self.images,
            "arrays": self.arrays,
            "bytes": self.bytes,
            "bytes_missing": self.bytes_missing,
            "bytes_free": self.free,
            "fits": self.fits,
            "measured": None if self.measured is None else self.measured.document(),
        }

    def require_space(self, root: Path) -> None:
        """Refuse to begin what cannot be finished.

        Raises:
            NoSpaceError: fewer bytes are free than are still to be written.
        """
        if not self.fits:
            raise NoSpaceError(
                f"{root} needs {size(self.bytes_missing)} more, and {size(self.free)} are free there",
                "Free some space, choose another --cache, or keep less (--keep topk:32, --dtype float16).",
            )


def sample_bytes(manifest: Manifest, key_bytes: int) -> dict[str, int]:
    """Bytes on disk of what is kept of the images: keys, labels, content, view parameters."""
    backend = BACKENDS[manifest.backend]
    lengths = {"key_bytes": key_bytes, "key_offsets": manifest.rows + 1}
    if manifest.data.labels is not None:
        lengths["labels/class"] = manifest.rows
    sizes = {name: backend.file_size(length, WHOLE_ARRAYS[name]) for name, length in lengths.items()}
    for name, spec in sample_arrays(manifest).items():
        chunks = manifest.blocks * (manifest.views if spec.per_view else 1)
        sizes[name] = chunks * backend.file_size(manifest.block_rows, spec)
    return sizes


def count_bytes(
    manifest: Manifest, key_bytes: int, records: Mapping[str, "TeacherRecord"]
) -> dict[str, dict[str, int]]:
    """Bytes on disk of every array when complete, exactly; see :attr:`CachePlan.arrays`."""
    return {
        SAMPLES: sample_bytes(manifest, key_bytes),
        **{name: payload_bytes(manifest, record) for name, record in records.items()},
    }


def plan_of(prepared: "Prepared") -> CachePlan:
    """What a prepared run would do, from the commit records alone."""
    manifest, records = prepared.manifest, prepared.records
    missing, store = _missing(prepared)
    arrays = count_bytes(manifest, len(prepared.data.keys.blob), records)
    left = sum(_unit_bytes(manifest, records, unit) for unit in missing)
    if store is None:  # keys, labels: written as the cache is made
        left += sum(size for name, size in arrays[SAMPLES].items() if name in WHOLE_ARRAYS)
    tasks = {(unit.block, unit.group) for unit in missing}
    return CachePlan(
        rows=manifest.samples,
        views=manifest.views,
        block_rows=manifest.block_rows,
        tasks=len(tasks),
        images=sum(len(manifest.rows_of(b)) * len(manifest.views_of(g)) for b, g in tasks),
        arrays=arrays,
        bytes=sum(sum(sizes.values()) for sizes in arrays.values()),
        bytes_missing=left,
        free=free_bytes(prepared.root),
        tasks_missing={name: len(places_of(missing, name)) for name in records},
    )


def _missing(prepared: "Prepared") -> tuple[list[Unit], Store | None]:
    """Every unit that is not done; the store of a cache that is there."""
    manifest = prepared.manifest
    groups = {SAMPLES: manifest.groups}
    for name, record in prepared.records.items():
        for kind, output in record.outputs.items():
            groups[f"{name}/{kind}"] = manifest.groups_of(output.views(manifest.views))
    writer = CacheWriter(prepared.root, manifest) if prepared.exists else None
    units: list[Unit] = []
    for part, count in groups.items():
        if writer is not None and part in writer.store.parts():
            units += writer.missing(part, withdraw=False)
        else:
            units += [Unit(part, block, group) for block in range(manifest.blocks) for group in range(count)]
    return units, None if writer is None else writer.store


def _unit_bytes(manifest: Manifest, records: Mapping[str, "TeacherRecord"], unit: Unit) -> int:
    """Bytes of a unit's chunk files."""
    backend, rows = BACKENDS[manifest.backend], manifest.block_rows
    if unit.part == SAMPLES:
        specs, kept = sample_arrays(manifest), manifest.views
    else:
        output = records[unit.teacher].outputs[unit.kind]
        specs, kept = output.array_specs(), output.views(manifest.views)
    views = len(manifest.views_of(unit.group, kept))
    counts = {name: views if spec.per_view else int(unit.group == 0) for name, spec in specs.items()}
    return sum(counts[name] * backend.file_size(rows, spec) for name, spec in specs.items())


def task_count(manifest: Manifest, record: "TeacherRecord") -> int:
    """Tasks (blocks x view groups) that a teacher has a part in."""
    views = (output.views(manifest.views) for output in record.outputs.values())
    return manifest.blocks * manifest.groups_of(max(views))


def places_of(units: Iterable[Unit], teacher: str) -> set[tuple[int, int]]:
    """(block, group) of the units of one teacher."""
    return {(unit.block, unit.group) for unit in units if unit.teacher == teacher}


def plan_cache(config: CacheConfig, measured: bool = False) -> CachePlan:
    """What ``kd cache-teachers`` with this configuration would cost. Changes nothing.

    Args:
        config: as for :func:`~kdcli.extract.extract.cache_teachers`.
        measured: also run :data:`BATCHES` batches of each stage, and a temporary write.

    Raises:
        KdError: as cache_teachers refuses.
    """
    prepared = prepare(config)
    plan = plan_of(prepared)
    if not measured or not plan.tasks:
        return plan
    from kdcli.extract.pipeline import open_workers
    from kdcli.extract.speeds import measure

    workers = open_workers(prepared, prepared.records, prepared.records)
    place = prepared.root.absolute()
    while not place.is_dir():
        place = place.parent
    found = measure(
        prepared.data,
        prepared.views,
        prepared.manifest,
        workers,
        processes=worker_count(config.workers),
        place=place,
        images=plan.images,
        bytes_missing=plan.bytes_missing,
    )
    return replace(plan, measured=found)


def free_bytes(root: Path) -> int:
    """Bytes free where ``root`` is or would be."""
    return int(available_gb(root.absolute()) * 1e9)
