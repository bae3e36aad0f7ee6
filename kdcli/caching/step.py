"""The step behind ``kd cache-teachers``: configuration in, :class:`CacheResult` out."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from kdcli.cache.claims import wait_a_moment
from kdcli.cache.commits import block_digest
from kdcli.cache.layout import (
    SAMPLES,
    DataIdentity,
    Layout,
    Manifest,
    Unit,
    choose_block_rows,
    load_manifest,
)
from kdcli.cache.provenance import ArraySpec, TeacherRecord, as_pixels
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.cache.zarr_backend import CRC_BYTES
from kdcli.caching.outputs import OutputPlan, plan_outputs
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


@final
@dataclass(frozen=True, slots=True)
class TeacherProgress:
    """One teacher's part of the result: units in total, done now, written by this run."""

    id: str
    arrays: dict[str, dict[str, Any]]
    total: int
    done: int
    written: int


@final
@dataclass(frozen=True, slots=True)
class CacheResult:
    """What ``kd cache-teachers`` did. ``bytes`` are those of the named teachers' arrays on disk."""

    cache_id: str | None
    rows: int
    views: int
    teachers: dict[str, TeacherProgress]
    images_per_second: float | None
    bytes: int
    dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        teachers = {
            name: {
                "id": part.id,
                "arrays": part.arrays,
                "tasks": {"total": part.total, "done": part.done, "written": part.written},
            }
            for name, part in self.teachers.items()
        }
        document = {
            "cache_id": self.cache_id,
            "rows": self.rows,
            "views": self.views,
            "teachers": teachers,
            "images_per_second": self.images_per_second,
            "bytes": self.bytes,
        }
        return document | ({"dry_run": True} if self.dry_run else {})


def name_teachers(arguments: Sequence[str]) -> dict[str, str]:
    """Split ``[NAME=]SPEC`` arguments; a teacher without a name gets a slug of its spec.

    The slug is the last path component of the spec in lower case, without an ending such as
    ``.safetensors``, other characters than letters, digits, ``.``, ``_`` and ``-`` replaced by ``-``.

    Raises:
        UsageError: a bad or repeated name.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        head, equals, tail = argument.partition("=")
        if equals and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", head):
            name, spec = head, tail
        elif equals and not re.search(r"[:/@]", head):
            raise UsageError(
                f"'{head}' cannot name a teacher", "Names hold letters, digits, '.', '_' and '-': --teacher NAME=SPEC"
            )
        else:
            name, spec = slug(argument), argument
        if not spec:
            raise UsageError(f"--teacher {argument} has no spec", "Give --teacher NAME=SPEC.")
        if name in named:
            raise UsageError(f"two teachers are called '{name}'", "Name them: --teacher NAME=SPEC")
        named[name] = spec
    return named


def slug(spec: str) -> str:
    """The name of a teacher that was given none."""
    last = re.split(r"[/:]", spec.rstrip("/"))[-1]
    last = re.sub(r"\.(safetensors|onnx)$", "", last.split("@")[-1])
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-.") or "teacher"


@final
@dataclass(frozen=True, slots=True)
class _Teacher:
    """An opened teacher with what the cache is to know of it."""

    model: "Model"
    plan: OutputPlan
    record: TeacherRecord


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
    data = open_data(config.data, data_root=config.data_root, download=config.download)
    with stop_signals() as stop, ExitStack() as stack:
        existing = load_manifest(root) if Layout(root).manifest.is_file() else None
        teachers = {name: _open_teacher(name, spec, config, data) for name, spec in specs.items()}
        views = _view_set(config, next(iter(teachers.values())).model, existing)
        manifest = _manifest(config, data, views, teachers, existing)
        if config.dry_run:
            return _planned(root, manifest, teachers, existing)
        manifest = create_cache(root, manifest, data.keys, data.labels if data.class_names is not None else None)
        _require_same_data(root, manifest, data, views)
        writer = stack.enter_context(CacheWriter(root, manifest))
        records = {name: writer.add_teacher(teacher.record) for name, teacher in teachers.items()}
        return _Run(config, writer, data, views, teachers, records, shard).complete(stop)


def _open_teacher(name: str, spec: str, config: CacheConfig, data: "ImageData") -> _Teacher:
    import torch

    from kdcli.data.views import fingerprint
    from kdcli.models.spec import open_model
    from kdcli.models.network import weights_sha256

    model = open_model(spec)
    plan = plan_outputs(name, model, config.keep, config.dtype, config.temperatures, data.class_names)
    device = pick_device(config.device)
    preprocess = model.preprocess
    record = TeacherRecord(
        name=name,
        spec=model.spec,
        architecture=model.architecture,
        weights=weights_sha256(model.network),
        keep=plan.keep,
        dtype=config.dtype,
        amp=config.amp,
        declared_preprocess={**preprocess.document(), "crop_fraction": preprocess.crop_fraction},
        num_classes=model.num_classes,
        num_features=model.num_features,
        class_names=model.class_names,
        temperatures=plan.temperatures,
        arrays=plan.arrays,
        pixels=as_pixels(fingerprint(preprocess.size, preprocess.interpolation)),
        compute={
            "batch_size": config.batch_size,
            "device": device.split(":")[0],
            "threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "versions": versions(),
        },
    )
    return _Teacher(model, plan, record)


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
    teachers: Mapping[str, _Teacher],
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
    labelled = data.class_names is not None
    return Manifest(
        rows=len(data),
        views=views.count,
        block_rows=block_rows,
        view_group=max(1, min(views.count, by_buffer, by_pixels)),
        data=DataIdentity(
            spec=str(data.spec),
            location=data.location,
            keys=data.keys.digest(),
            labels=block_digest(data.labels.astype("<i8")) if labelled else None,
            class_names=data.class_names,
        ),
        view_set=views.document(),
        created={"versions": versions(), "config": config.identity()},
    )


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
            f"{root} is a cache of other data ({manifest.data.spec})",
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
    root: Path, manifest: Manifest, teachers: Mapping[str, _Teacher], existing: Manifest | None
) -> CacheResult:
    """What a run would do, computed without writing anything."""
    total = manifest.blocks * manifest.groups
    parts = {}
    for name, teacher in teachers.items():
        done = 0
        if existing is not None and Layout(root).teacher(name).is_dir():
            writer = CacheWriter(root, existing)
            writer.teachers[name].require_same(teacher.record, str(root))
            done = total - len(writer.missing(name, withdraw=False))
        parts[name] = TeacherProgress(teacher.record.id, _shapes(manifest, teacher.record), total, done, 0)
    size = sum(_payload_bytes(manifest, teacher.record.array_specs()) for teacher in teachers.values())
    return CacheResult(
        existing.cache_id if existing else None, manifest.rows, manifest.views, parts, None, size, dry_run=True
    )


def _payload_bytes(manifest: Manifest, arrays: Mapping[str, ArraySpec]) -> int:
    chunks = manifest.blocks * manifest.views
    return sum(chunks * (manifest.block_rows * spec.row_bytes + CRC_BYTES) for spec in arrays.values())


def _shapes(manifest: Manifest, record: TeacherRecord) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": [manifest.rows, manifest.views, *spec.row_shape], "dtype": np.dtype(spec.dtype).name}
        for name, spec in record.array_specs().items()
    }


@final
class _Run:
    """One process completing one cache."""

    def __init__(
        self,
        config: CacheConfig,
        writer: CacheWriter,
        data: "ImageData",
        views: "ViewSet",
        teachers: Mapping[str, _Teacher],
        records: Mapping[str, TeacherRecord],
        shard: Shard | None,
    ) -> None:
        self._config, self._writer, self._data, self._views = config, writer, data, views
        self._teachers, self._records, self._shard = teachers, records, shard
        self._failed: dict[tuple[int, int], list[tuple[int, str]]] = {}

    def _missing(self) -> list[Unit]:
        parts = [SAMPLES, *self._records]
        units = [unit for part in parts for unit in self._writer.missing(part)]
        return [
            unit
            for unit in units
            if (self._shard is None or self._shard.owns(unit.block)) and (unit.block, unit.group) not in self._failed
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
                self._workers({unit.part for unit in missing}),
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
        for part in (SAMPLES, *self._records):
            self._writer.finish(part)
        return self._result(runner)

    def _say_plan(self, missing: Sequence[Unit]) -> None:
        tasks = {(unit.block, unit.group) for unit in missing}
        names = [name for name in self._records if any(unit.part == name for unit in missing)]
        console.note(
            f"cache {self._writer.layout.root}: {len(tasks)} tasks to do for {', '.join(names) or 'the samples'} "
            f"({self._writer.manifest.rows} images, {self._writer.manifest.views} views)"
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

    def _workers(self, parts: set[str]) -> dict[str, Any]:
        """Teachers that have something to do, on the device, with the settings of the first run."""
        from kdcli.caching.pipeline import Worker
        from kdcli.models.teacher import TeacherRunner

        device = pick_device(self._config.device)
        workers = {}
        for name, record in self._records.items():
            if name not in parts:
                continue
            teacher, compute = self._teachers[name], record.compute
            if compute["batch_size"] != self._config.batch_size:
                console.note(f"teacher '{name}': going on with its recorded batch size {compute['batch_size']}")
            if compute["device"] != device.split(":")[0]:
                console.warn(
                    f"teacher '{name}' was begun on {compute['device']} and goes on on {device}: rows may differ in "
                    "their last bits"
                )
            model = teacher.model
            workers[name] = Worker(
                TeacherRunner(model, device, self._config.amp, teacher.plan.keep),
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
        total = manifest.blocks * manifest.groups
        parts = {}
        for name, record in self._records.items():
            written = runner.written[name] if runner is not None and name in runner.written else 0
            done = total - len(self._writer.missing(name))
            parts[name] = TeacherProgress(record.id, _shapes(manifest, record), total, done, written)
        rate = None
        if runner is not None and runner.images:
            rate = round(runner.images / runner.seconds, 2)
        else:
            console.note(f"cache {self._writer.layout.root} is complete: nothing to compute")
        size = sum(_payload_bytes(manifest, record.array_specs()) for record in self._records.values())
        return CacheResult(manifest.cache_id, manifest.rows, manifest.views, parts, rate, size)
