"""The step behind ``kd cache-teachers``: configuration in, :class:`CacheResult` out."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from kdcli.cache.claims import wait_a_moment
from kdcli.cache.commits import block_digest
from kdcli.cache.layout import (
    SAMPLES,
    DataIdentity,
    Layout,
    Manifest,
    Segment,
    Unit,
    choose_block_rows,
    load_manifest,
)
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.caching.result import CacheResult, TeacherProgress, payload_bytes, shapes
from kdcli.caching.teachers import Teacher, name_teachers, open_teacher
from kdcli.config import CacheConfig
from kdcli.console import console
from kdcli.errors import (
    BadDataError,
    ClaimedError,
    IdentityError,
    StoppedEarly,
    StorageError,
    UsageError,
)
from kdcli.runtime import Shard, parse_shard, pick_device, stop_signals, versions, worker_count
from kdcli.types import differences

if TYPE_CHECKING:
    from kdcli.data.sources import ImageData
    from kdcli.data.views import ViewSet
    from kdcli.models.spec import Model

DEFAULT_RECIPE = "imagenet"
PIXEL_BYTES = 64 * 2**20
"""Decoded pixels of one batch and group of views stay below this."""


def cache_teachers(config: CacheConfig) -> CacheResult:
    """Run teachers over a data set and keep what they say.

    What is done already is not done again; several identical jobs share the work. Returns when the
    cache (or the asked-for shard of it) is complete.

    Raises:
        KdError: see :mod:`kdcli.errors`; StoppedEarly after a signal, ClaimedError with ``wait=False``.
    """
    from kdcli.data.sources import open_data
    from kdcli.data.views import ViewSet

    shard = parse_shard(config.shard)
    specs = name_teachers(config.teacher)
    root = config.cache
    if root.is_file():
        raise StorageError(f"{root} is a file, not a cache folder", "Give --cache another path.")
    # A typo is refused before models are loaded.
    ViewSet.parse(config.views or "eval", crop_fraction=1.0, recipe=config.recipe or DEFAULT_RECIPE)
    existing = load_manifest(root) if Layout(root).manifest.is_file() else None
    data = open_data(_data_spec(config, existing), data_root=config.data_root, download=config.download)
    with stop_signals() as stop, ExitStack() as stack:
        teachers = {name: open_teacher(name, spec, config, data) for name, spec in specs.items()}
        views = _view_set(config, next(iter(teachers.values())).model, existing)
        manifest = _manifest(config, data, views, teachers, existing)
        if config.dry_run:
            return _planned(root, manifest, teachers, existing)
        manifest = create_cache(
            root, manifest, data.keys, data.labels if data.class_names is not None else None
        )
        _require_same_data(root, manifest, data, views)
        writer = stack.enter_context(CacheWriter(root, manifest))
        records = {name: writer.add_teacher(teacher.record) for name, teacher in teachers.items()}
        return _Run(config, writer, data, views, teachers, records, shard).complete(stop)


def _data_spec(config: CacheConfig, existing: Manifest | None) -> str:
    if config.data is not None:
        return config.data
    if existing is None:
        raise UsageError(
            f"no data set is given, and there is no cache {config.cache} that recorded one",
            f"kd cache-teachers DATA --cache {config.cache} --teacher SPEC",
        )
    return existing.locations[0]


def _view_set(config: CacheConfig, first: "Model", existing: Manifest | None) -> "ViewSet":
    """The views asked for; what was not asked for is the existing cache's, else the default."""
    from kdcli.data.views import ViewSet

    default = ViewSet(0, first.preprocess.crop_fraction, DEFAULT_RECIPE)
    if existing is not None:
        default = ViewSet.from_document(existing.view_set)
    return ViewSet.parse(
        config.views or str(default),
        crop_fraction=config.eval_crop or default.crop_fraction,
        recipe=config.recipe or default.recipe,
    )


def _manifest(
    config: CacheConfig,
    data: "ImageData",
    views: "ViewSet",
    teachers: Mapping[str, Teacher],
    existing: Manifest | None,
) -> Manifest:
    if existing is not None:
        return existing
    arrays = [spec for teacher in teachers.values() for spec in teacher.record.array_specs().values()]
    largest = max(spec.row_bytes for spec in arrays)
    block_rows = config.block_rows or choose_block_rows(len(data), largest)
    pixels = sum(
        height * width * 3
        for height, width in {teacher.model.preprocess.size for teacher in teachers.values()}
    )
    by_buffer = int(config.buffer_gb * 1e9 // (block_rows * sum(spec.row_bytes for spec in arrays)))
    by_pixels = PIXEL_BYTES // (config.batch_size * pixels)
    from kdcli.data.views import PARAM_NAMES

    group = max(1, min(views.count, by_buffer, by_pixels))
    labelled = data.class_names is not None
    return Manifest(
        backend=config.backend or "zarr",
        block_rows=block_rows,
        segments=(Segment(rows=len(data), spec=str(data.spec), location=data.location),),
        view_groups=split_views(views.count, group),
        data=DataIdentity(
            keys=data.keys.digest(),
            labels=block_digest(data.labels.astype("<i8")) if labelled else None,
            class_names=data.class_names,
        ),
        view_set=views.document(),
        param_names=PARAM_NAMES,
        created={"versions": versions(), "config": config.identity()},
    )


def split_views(count: int, group: int) -> tuple[int, ...]:
    """Views per group: as many as ``group`` each, the rest in the last one."""
    return tuple(min(group, count - start) for start in range(0, count, group))


def _require_same_data(root: Path, manifest: Manifest, data: "ImageData", views: "ViewSet") -> None:
    """Refuse to fill a cache with another data set's outputs.

    Raises:
        IdentityError: naming each differing field.
    """
    labelled = data.class_names is not None
    asked = {
        "rows": len(data),
        "keys": data.keys.digest(),
        "labels": block_digest(data.labels.astype("<i8")) if labelled else None,
        "class_names": None if data.class_names is None else list(data.class_names),
    }
    recorded = {"rows": manifest.rows, **manifest.data.gate()}
    found = differences(recorded, asked)
    if found:
        raise IdentityError(
            f"{root} is a cache of other data ({manifest.segments[0].spec})",
            "Use another --cache for this data set; reading several caches together is what --cache CACHE "
            "--cache CACHE does.",
            found,
        )
    found = differences(manifest.view_set, views.document(), "views.")
    if found:
        raise IdentityError(
            f"{root} holds other views", "Ask for the recorded views, or use another --cache.", found
        )


def _planned(
    root: Path, manifest: Manifest, teachers: Mapping[str, Teacher], existing: Manifest | None
) -> CacheResult:
    """What a run would do, computed without writing anything."""
    parts = {}
    for name, teacher in teachers.items():
        total = done = _unit_count(manifest, teacher.record)
        missing = total
        if existing is not None and Layout(root).teacher(name).is_file():
            writer = CacheWriter(root, existing)
            writer.teachers[name].require_same(teacher.record, str(root))
            known = [kind for kind in teacher.record.outputs if kind in writer.teachers[name].outputs]
            there = {kind: teacher.record.outputs[kind] for kind in known}
            missing -= _unit_count(manifest, teacher.record.model_copy(update={"outputs": there}))
            missing += sum(len(writer.missing(f"{name}/{kind}", withdraw=False)) for kind in known)
        done = total - missing
        parts[name] = TeacherProgress(teacher.record.id, shapes(manifest, teacher.record), total, done, 0)
    size = sum(sum(payload_bytes(manifest, teacher.record).values()) for teacher in teachers.values())
    return CacheResult(
        existing.cache_id if existing else None,
        manifest.samples,
        manifest.views,
        parts,
        None,
        size,
        dry_run=True,
    )


def _unit_count(manifest: Manifest, record: TeacherRecord) -> int:
    """Units of a teacher when it is complete."""
    return sum(
        manifest.blocks * manifest.groups_of(output.views(manifest.views))
        for output in record.outputs.values()
    )


@final
class _Run:
    """One process completing one cache."""

    def __init__(
        self,
        config: CacheConfig,
        writer: CacheWriter,
        data: "ImageData",
        views: "ViewSet",
        teachers: Mapping[str, Teacher],
        records: Mapping[str, TeacherRecord],
        shard: Shard | None,
    ) -> None:
        self._config, self._writer, self._data, self._views = config, writer, data, views
        self._teachers, self._records, self._shard = teachers, records, shard
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
        from kdcli.caching.pipeline import TaskRunner

        missing = self._missing()
        runner = None
        if missing:
            self._say_plan(missing)
            runner = TaskRunner(
                self._writer,
                self._data,
                self._views,
                self._workers({unit.teacher for unit in missing}),
                drop_bad=self._config.bad_images == "drop",
                processes=worker_count(self._config.workers),
                stop=stop,
                grace=self._config.grace,
            )
        while missing and runner is not None:
            runner.run(missing)
            self._failed.update(runner.failed)
            missing = self._missing()
            if stop:
                raise StoppedEarly(
                    f"stopped by a signal with {len(missing)} tasks left; all finished ones are kept",
                    "Run the same command again to go on.",
                )
            if missing and all(self._writer.claims.is_live(unit) for unit in missing):
                self._wait(missing[0])
        if self._failed:
            self._refuse_bad_images()
        for part in self._parts():
            self._writer.finish(part)
        return self._result(runner)

    def _say_plan(self, missing: Sequence[Unit]) -> None:
        tasks = {(unit.block, unit.group) for unit in missing}
        names = [name for name in self._records if any(unit.teacher == name for unit in missing)]
        console.note(
            f"cache {self._writer.layout.root}: {len(tasks)} tasks to do for {', '.join(names) or 'the samples'} "
            f"({self._writer.manifest.samples} images, {self._writer.manifest.views} views)"
        )

    def _wait(self, unit: Unit) -> None:
        holder = self._writer.claims.holder(unit)
        if not self._config.wait:
            raise ClaimedError(
                f"all remaining tasks are claimed by live writers, the first by {holder}",
                "Let them finish, or run without --no-wait.",
            )
        console.detail(f"waiting for {holder}")
        wait_a_moment()

    def _workers(self, names: set[str]) -> dict[str, Any]:
        """Teachers that have something to do, on the device, with the settings of the first run."""
        from kdcli.caching.pipeline import Worker
        from kdcli.models.teacher import TeacherRunner

        device = pick_device(self._config.device)
        workers = {}
        for name, record in self._records.items():
            if name not in names:
                continue
            teacher, compute = self._teachers[name], record.compute
            if compute["batch_size"] != self._config.batch_size:
                console.note(
                    f"teacher '{name}': going on with its recorded batch size {compute['batch_size']}"
                )
            if compute["device"] != device.split(":")[0]:
                console.warn(
                    f"teacher '{name}' was begun on {compute['device']} and goes on on {device}: rows may differ in "
                    "their last bits"
                )
            model = teacher.model
            workers[name] = Worker(
                TeacherRunner(model, device, self._config.amp, teacher.plan.outputs),
                teacher.plan,
                (model.preprocess.size, model.preprocess.interpolation),
                compute["batch_size"],
                {"batch_size": compute["batch_size"], "device": device, "amp": self._config.amp},
            )
        return workers

    def _refuse_bad_images(self) -> None:
        bad = sorted({item for items in self._failed.values() for item in items})
        for row, reason in bad:
            console.note(f"bad image {self._data.path(row)}: {reason}")
        raise BadDataError(
            f"{len(bad)} images cannot be read, first {self._data.path(bad[0][0])}; everything else is cached",
            "Repair or remove them, or run again with --bad-images drop.",
        )

    def _result(self, runner: Any) -> CacheResult:
        manifest = self._writer.manifest
        parts = {}
        for name, record in self._records.items():
            asked = {kind: record.outputs[kind] for kind in self._teachers[name].record.outputs}
            record = record.model_copy(update={"outputs": asked})
            written = sum(runner.written[f"{name}/{kind}"] for kind in asked) if runner is not None else 0
            total = _unit_count(manifest, record)
            done = total - sum(len(self._writer.missing(f"{name}/{kind}")) for kind in asked)
            parts[name] = TeacherProgress(record.id, shapes(manifest, record), total, done, written)
        rate = None
        if runner is not None and runner.images:
            rate = round(runner.images / runner.seconds, 2)
        elif all(part.done == part.total for part in parts.values()):
            console.note(f"cache {self._writer.layout.root} is complete: nothing to compute")
        else:
            console.note(f"cache {self._writer.layout.root}: nothing to compute in shard {self._shard}")
        size = sum(
            self._bytes(name, payload_bytes(manifest, record)) for name, record in self._records.items()
        )
        return CacheResult(manifest.cache_id, manifest.samples, manifest.views, parts, rate, size)

    def _bytes(self, name: str, sizes: Mapping[str, int]) -> int:
        """Bytes of the arrays that were asked for."""
        return sum(sizes[array] for array in self._teachers[name].record.array_specs())
