"""The step behind ``kd cache-teachers``: configuration in, :class:`CacheResult` out."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast, final

from kdcli.cache.claims import Patience
from kdcli.cache.filling import Filling
from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.spec import ClassSubset
from kdcli.data.without import lost_classes
from kdcli.errors import BadDataError, ClaimedError, DeviceError, StoppedEarly
from kdcli.extract.config import CacheConfig
from kdcli.extract.costs import CachePlan, places_of, plan_of, task_count
from kdcli.extract.opening import require_same_data
from kdcli.extract.places import opened
from kdcli.extract.prepare import Prepared, prepare, require_same_views
from kdcli.extract.recording import record_teacher
from kdcli.extract.result import CacheResult, TeacherProgress, payload_bytes, shapes
from kdcli.precision import told
from kdcli.runtime import Shard, StopFlag, parse_shard, pick_device, stop_signals, worker_count

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData


def cache_teachers(config: CacheConfig) -> CacheResult:
    """Run teachers over a data set and keep their outputs.

    What is done already is not done again; several identical jobs share the work. Returns when the
    cache (or the asked-for shard of it) is complete.

    Raises:
        KdError: see :mod:`kdcli.errors`; StoppedEarly after a signal, ClaimedError with ``wait=False``.
    """
    if config.engine is not None and not config.dry_run:
        from kdcli.extract.supervised import cache_with_workers

        return cache_with_workers(config)
    with stop_signals() as stop:
        try:
            return _cached(config, stop)
        except DeviceError as error:
            if not stop:
                raise
            # A signal to the whole group also ends compilers, and a scheduler's may take the device away.
            raise StoppedEarly(
                f"stopped by a signal; meanwhile: {error.message}", "Run the same command again to go on."
            ) from error


def _cached(config: CacheConfig, stop: StopFlag) -> CacheResult:
    """In this process."""
    shard = parse_shard(config.shard)
    with opened(config.cache) as place, ExitStack() as stack:
        prepared = prepare(config, place.root)
        plan = plan_of(prepared, place)
        if config.dry_run:
            return _planned(prepared, plan)
        plan.require_space(config.cache)
        manifest = prepared.manifest
        if not prepared.exists:
            manifest = place.create(manifest, prepared.data.keys, prepared.recorded_labels())
            # Another process may have been faster.
            require_same_data(config.cache, manifest, cast("ImageData", prepared.data))
            require_same_views(config.cache, manifest, prepared.views)
        writer = stack.enter_context(place.writer(manifest, config.claim_timeout))
        records = {name: record_teacher(writer, teacher) for name, teacher in prepared.teachers.items()}
        return _Run(prepared, writer, records, shard).complete(stop)


def _planned(prepared: Prepared, plan: CachePlan) -> CacheResult:
    """What a run would do, computed without writing anything."""
    manifest, parts = prepared.manifest, {}
    where = told(pick_device(prepared.config.device), *(record.amp for record in prepared.records.values()))
    console.note(f"cache {prepared.config.cache}: {', '.join(prepared.records)} would run {where}")
    for name, record in prepared.records.items():
        total = task_count(manifest, record)
        done = total - plan.tasks_missing[name]
        parts[name] = TeacherProgress(record.id, shapes(manifest, record), total, done, 0)
    size = sum(sum(plan.arrays[name].values()) for name in prepared.records)
    cache_id = manifest.cache_id if prepared.exists else None
    return CacheResult(cache_id, manifest.samples, manifest.views, parts, None, size, dry_run=True)


@final
class _Run:
    """One process completing one cache."""

    def __init__(
        self,
        prepared: Prepared,
        writer: Filling,
        records: Mapping[str, TeacherRecord],
        shard: Shard | None,
    ) -> None:
        self._prepared, self._config, self._data = prepared, prepared.config, prepared.data
        self._teachers, self._writer, self._records = prepared.teachers, writer, records
        self._shard = shard
        self._failed: dict[tuple[int, int], list[tuple[int, str]]] = {}

    def _parts(self) -> list[str]:
        """What this run is to complete: the samples, and the kinds asked for of its teachers."""
        asked = ((name, kind) for name, teacher in self._teachers.items() for kind in teacher.record.outputs)
        return [SAMPLES, *(f"{name}/{kind}" for name, kind in asked)]

    def _missing(self) -> list[Unit]:
        units = [unit for part in self._parts() for unit in self._writer.missing(part)]
        return [
            unit
            for unit in units
            if (self._shard is None or self._shard.owns(unit.block))
            and (unit.block, unit.group) not in self._failed
        ]

    def complete(self, stop: Any) -> CacheResult:
        """Work and wait until nothing is missing, then say what was done."""
        from kdcli.extract.kept import kept_pixels
        from kdcli.extract.pipeline import Resources, TaskRunner, open_workers

        for part in self._parts():
            self._writer.gather(part)
        missing = self._missing()
        runner = None
        if missing:
            self._say_plan(missing)
            workers = open_workers(self._prepared, self._records, {unit.teacher for unit in missing})
            runner = TaskRunner(
                self._writer,
                self._data,
                self._prepared.views,
                workers,
                Resources(
                    worker_count(self._config.workers),
                    stop,
                    self._config.grace,
                    kept=kept_pixels(
                        self._writer.store, [worker.render for worker in workers.values()], missing
                    ),
                ),
                drop_bad=self._config.bad_images == "drop",
            )
        patience = Patience()
        while missing and runner is not None:
            if all(self._writer.claims.is_live(unit) for unit in missing):
                self._require_wait(missing[0])  # without forking decode processes to find out
            else:
                runner.run(missing)
                self._failed.update(runner.failed)
            before, missing = missing, self._missing()
            if stop and missing:
                tasks = {(unit.block, unit.group) for unit in missing}
                raise StoppedEarly(
                    f"stopped by a signal with {len(tasks)} tasks left; all finished ones are kept",
                    "Run the same command again to go on.",
                )
            if missing == before:  # others are at the rest
                patience.wait(self._writer.claims.holder(missing[0]))
            else:
                patience = Patience()
        if self._failed:
            self._refuse_bad_images()
        for part in self._parts():
            self._writer.finish(part)
        self._tell_dropped()
        return self._result(runner)

    def _say_plan(self, missing: Sequence[Unit]) -> None:
        manifest, places = self._writer.manifest, {(unit.block, unit.group) for unit in missing}
        count = sum(len(manifest.rows_of(block)) * len(manifest.views_of(group)) for block, group in places)
        names = [name for name in self._records if any(unit.teacher == name for unit in missing)]
        where = told(pick_device(self._config.device), *(self._records[name].amp for name in names))
        console.note(
            f"cache {self._config.cache}: {count} of {manifest.samples * manifest.views} views of "
            f"{manifest.samples} images to run through "
            + (f"{', '.join(names)} {where}" if names else "no teacher: only to be looked at")
        )

    def _require_wait(self, unit: Unit) -> None:
        if not self._config.wait:
            raise ClaimedError(
                f"all remaining tasks are claimed by live writers, the first by {self._writer.claims.holder(unit)}",
                "Let them finish, or run without --no-wait.",
            )

    def _refuse_bad_images(self) -> None:
        bad = sorted({item for items in self._failed.values() for item in items})
        for row, reason in bad:
            path = self._data.path(row)
            console.note(f"bad image {path}: {reason.removeprefix(f'{path}: ')}")
        manifest = self._writer.manifest
        lost = sum(len(manifest.rows_of(block)) for block in {block for block, _ in self._failed})
        raise BadDataError(
            f"{len(bad)} images cannot be read, first {self._data.path(bad[0][0])}; nothing is cached of their blocks, "
            f"{lost} of {manifest.samples} images",
            "Repair or remove them, or run again with --bad-images drop.",
        )

    def _tell_dropped(self) -> None:
        """Say what the cache has no outputs of, whoever dropped it: images, and classes of which no image is left."""
        rows = self._writer.dropped()
        if not rows:
            return
        console.warn(
            f"{len(rows)} of {self._writer.manifest.samples} images cannot be read and are recorded as absent, first "
            f"{self._data.path(min(rows))}; kd cache info names them"
        )
        if lost := lost_classes(self._data.labels, self._data.class_names, rows):
            console.warn(
                f"all images of class {', '.join(lost)} cannot be read and are left out; restore them and make the "
                f"cache anew, or leave the class out with DATA@classes={ClassSubset('except', names=lost)}"
            )

    def _result(self, runner: Any) -> CacheResult:
        manifest = self._writer.manifest
        parts = {}
        for name, record in self._records.items():
            asked = {kind: record.outputs[kind] for kind in self._teachers[name].record.outputs}
            record = record.model_copy(update={"outputs": asked})
            written = 0 if runner is None else len(runner.written.get(name, ()))
            total = task_count(manifest, record)
            left = [unit for kind in asked for unit in self._writer.missing(f"{name}/{kind}")]
            done = total - len(places_of(left, name))
            parts[name] = TeacherProgress(record.id, shapes(manifest, record), total, done, written)
        rate = None
        if runner is not None and runner.images:
            rate = round(runner.images / runner.seconds, 2)
        elif all(part.done == part.total for part in parts.values()):
            console.note(f"cache {self._config.cache} is complete: nothing to compute")
        else:
            console.note(f"cache {self._config.cache}: nothing to compute in shard {self._shard}")
        size = sum(
            self._bytes(name, payload_bytes(manifest, record)) for name, record in self._records.items()
        )
        return CacheResult(manifest.cache_id, manifest.samples, manifest.views, parts, rate, size)

    def _bytes(self, name: str, sizes: Mapping[str, int]) -> int:
        """Bytes of the arrays that were asked for."""
        return sum(sizes[array] for array in self._teachers[name].record.array_specs())
