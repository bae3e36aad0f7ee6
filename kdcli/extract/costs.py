"""What a run of cache-teachers would cost, to the byte; speeds.py adds the hours."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from kdcli.cache.arrays import WHOLE_ARRAYS, array_extents
from kdcli.cache.filling import Filling
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.store import Store, stored_bytes
from kdcli.console import duration, size
from kdcli.documents import to_document
from kdcli.errors import NoSpaceError
from kdcli.extract.config import CacheConfig
from kdcli.extract.places import CachePlace, opened
from kdcli.extract.prepare import Prepared, prepare
from kdcli.geometry import Render
from kdcli.outputs import PIXELS
from kdcli.results import Result, Table
from kdcli.types import DecodeMode

if TYPE_CHECKING:
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.extract.speeds import Measured


@final
@dataclass(frozen=True, slots=True)
class CachePlan(Result):
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
        bytes_free: bytes free where the cache lies or would lie; None in a store.
        tasks_missing: of those tasks, the ones that each teacher has a part in.
        decode: what views are drawn of, see ``--decode``.
        kept: images that are not decoded, as the cache keeps their pixels.
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
    bytes_free: int | None
    tasks_missing: dict[str, int]
    decode: DecodeMode = "exact"
    kept: int = 0
    measured: "Measured | None" = None

    @property
    def fits(self) -> bool:
        """Whether what is missing fits into the free space."""
        return self.bytes_free is None or self.bytes_missing <= self.bytes_free

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        return to_document(
            self, "rows", "views", "block_rows", "tasks", "images", "arrays", "bytes", "bytes_missing", "bytes_free",
            "fits", "decode", "kept", "measured",
        )  # fmt: skip

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = [
            [teacher, array, size(count)]
            for teacher, arrays in self.arrays.items()
            for array, count in arrays.items()
        ]
        facts: list[list[object]] = [
            ["images x views", f"{self.rows} x {self.views}"],
            ["tasks to do", self.tasks],
            ["size when complete", size(self.bytes)],
            ["still to be written", size(self.bytes_missing)],
        ]
        if self.bytes_free is not None:
            facts.append(["free there", size(self.bytes_free)])
        if self.decode == "scaled":
            facts.append(["decoded", "scaled: large JPEG photos at 1/2, 1/4 or 1/8 of their sides"])
        if self.kept:
            facts.append(["read as kept, not decoded", f"{self.kept} images"])
        speed = self.measured
        if pixels := sum(sizes.get(PIXELS, 0) for sizes in self.arrays.values()):
            saved = "its decoding (--measure: how long)"
            if speed is not None and not self.kept:
                saved = f"{duration(self.rows / speed.decode)} of decoding"
            facts.append(
                [
                    f"{PIXELS}@eval",
                    f"{size(pixels)}; saves {saved} to each later teacher or student of the render",
                ]
            )
        if speed is not None:
            forward: list[list[object]] = [
                [f"forward {name}", f"{rate:.1f} views/s"] for name, rate in speed.forward.items()
            ]
            facts += [
                ["decode", f"{speed.decode:.1f} views/s"],
                *forward,
                ["write", f"{speed.write_mb:.0f} MB/s = {speed.write:.1f} views/s"],
                ["bound by", speed.bound],
                ["time", duration(speed.hours * 3600)],
            ]
        return (Table(("part", "array", "size"), rows), Table(("plan", ""), facts))

    def require_space(self, root: Path | str) -> None:
        """Refuse to begin what cannot be finished.

        Raises:
            NoSpaceError: fewer bytes are free than are still to be written; its document holds the plan's.
        """
        if self.bytes_free is not None and not self.fits:
            error = NoSpaceError(
                f"{root} needs {size(self.bytes_missing)} more, and {size(self.bytes_free)} are free there",
                "Free some space, choose another --cache, or keep less (--keep topk:32, --dtype float16).",
            )
            error.details = self.document()
            raise error


def plan_of(prepared: Prepared, place: CachePlace) -> CachePlan:
    """What a prepared run would do, from the commit records alone."""
    manifest, records = prepared.manifest, prepared.records
    store = Store(prepared.root, manifest, records)  # with what is asked for, whatever is there
    missing = _missing(place.writer(manifest) if prepared.exists else None, store)
    arrays: dict[str, dict[str, int]] = {SAMPLES: {}, **{name: {} for name in records}}
    for extent in array_extents(manifest, prepared.data.keys, records):
        arrays[extent.part.partition("/")[0]] |= stored_bytes(manifest, [extent])
    left = sum(_unit_bytes(store, unit) for unit in missing)
    if not prepared.exists:  # keys, labels: written as the cache is made
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
        bytes_free=place.free_bytes(),
        tasks_missing={name: len(places_of(missing, name)) for name in records},
        decode=prepared.views.decode,
    )


def _missing(writer: Filling | None, store: Store) -> list[Unit]:
    """Every unit that is not done."""
    units: list[Unit] = []
    for part in store.parts():
        if writer is not None and part in writer.store.parts():
            units += writer.missing(part, withdraw=False)
        else:
            units += [Unit(part, *place) for place in store.units_of(part)]
    return units


def _unit_bytes(store: Store, unit: Unit) -> int:
    """Bytes of a unit's chunk files."""
    manifest = store.manifest
    views = len(manifest.views_of(unit.group, store.views(unit.part)))
    specs = store.arrays_in(unit.part, unit.group).values()
    sizes = ((spec, store.backend.file_size(manifest.block_rows, spec)) for spec in specs)
    return sum(size * (views if spec.per_view else 1) for spec, size in sizes)


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
    with opened(config.cache) as place:
        prepared = prepare(config, place.root)
        plan, kept = plan_of(prepared, place), None
        if prepared.exists:
            from kdcli.extract.kept import kept_pixels

            store = Store(prepared.root, prepared.manifest, prepared.records)
            renders = [Render.of(record.preprocess) for record in prepared.records.values()]
            missing = _missing(place.writer(prepared.manifest), store)
            kept = kept_pixels(store, renders, missing, verify="never")
            plan = replace(plan, kept=0 if kept is None else len(kept))
        if not measured or not plan.tasks:
            return plan
        from kdcli.extract.pipeline import open_workers
        from kdcli.extract.speeds import measure

        workers = open_workers(prepared, prepared.records, prepared.records)
        found = measure(prepared, workers, kept, (plan.images, plan.bytes_missing))
        return replace(plan, measured=found)
