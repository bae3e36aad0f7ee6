"""From a configuration to everything a run of cache-teachers needs, before anything is written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, cast, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.keytable import block_digest
from kdcli.cache.layout import (
    DataIdentity,
    Layout,
    Manifest,
    Segment,
    choose_block_rows,
    planned_manifest,
)
from kdcli.cache.owned import require_outside_caches
from kdcli.cache.pixels import as_pixels, require_same_pixels
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.console import console
from kdcli.errors import BadDataError, IdentityError, StorageError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.opening import open_held, open_new
from kdcli.extract.teachers import Teacher, describe_teacher, pixels_once, teacher_specs
from kdcli.geometry import EvalGeometry, Render
from kdcli.outputs import Output
from kdcli.runtime import pick_device, versions
from kdcli.types import differences

if TYPE_CHECKING:
    from kdcli.data.joined import Images
    from kdcli.data.sources import ImageData
    from kdcli.data.views import ViewSet
    from kdcli.models.spec import Model

DEFAULT_RECIPE = "imagenet"
PIXEL_BYTES = 64 * 2**20
"""Decoded pixels of one batch and group of views stay below this."""


@final
@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run works with.

    Attributes:
        config: what was asked for.
        data: the images, in the order of the cache's rows.
        views: what is drawn of them.
        teachers: opened, by name.
        manifest: of the cache; of one that is not there yet, what it will be.
        exists: whether it is there.
        root: folder of the cache, or of what this run has of it.
    """

    config: CacheConfig
    data: "Images"
    views: "ViewSet"
    teachers: dict[str, Teacher]
    manifest: Manifest
    exists: bool
    root: Path

    @property
    def records(self) -> dict[str, TeacherRecord]:
        """What is asked of each teacher."""
        return {name: teacher.record for name, teacher in self.teachers.items()}

    def recorded_labels(self) -> Int64[np.ndarray, " n"] | None:
        """The labels as a cache keeps them; None for a data set without labels."""
        return None if self.data.class_names is None else self.data.labels


def prepare(config: CacheConfig, root: Path) -> Prepared:
    """Open images and teachers and decide how the cache is cut; nothing is written.

    Args:
        config: what was asked for.
        root: folder of the cache, or of what this run has of it.

    Raises:
        KdError: see :mod:`kdcli.errors`.
    """
    from kdcli.data.sizes import require_kind, sample_sizes, tell_geometry
    from kdcli.data.views import ViewSet
    from kdcli.extract.fitting import as_they_fit
    from kdcli.models.spec import open_model

    specs = teacher_specs(config)
    if root.exists() and not root.is_dir():
        raise StorageError(f"{root} is a file, not a cache folder", "Give --cache another path.")
    require_outside_caches(root)
    # A typo is refused before models are loaded.
    ViewSet.parse(config.views or "eval", recipe=config.recipe or DEFAULT_RECIPE)
    held = CacheReader(root) if Layout(root).manifest.is_file() else None
    data = open_new(config) if held is None else open_held(config, held)
    models = placed({name: open_model(spec) for name, spec in specs.items()}, config, held)
    for name, model in models.items():
        require_kind(f"teacher '{name}'", model.preprocess, data, model.spec)
    known = {} if held is None else held.teachers
    existing = None if held is None else held.manifest
    views = replace(view_set_of(config, existing), clips=data.clips)
    teachers = pixels_once(
        {name: describe_teacher(name, model, config, data, known.get(name)) for name, model in models.items()}
    )
    teachers = as_they_fit(teachers, config, known, views.count)
    manifest = existing or new_manifest(config, cast("ImageData", data), views, teachers)
    if existing is not None:
        require_same_views(config.cache, existing, views)
        _require_room_for_clips(teachers, existing, config.cache)
        for name, teacher in teachers.items():
            if name in known:
                known[name].require_same(teacher.record, str(config.cache))
    if views.decode == "scaled":
        console.note(
            "JPEG photos are decoded at 1/2, 1/4 or 1/8 of their sides where a view needs no more: its pixels differ "
            "from those of --decode exact, and the cache says so (docs/caches.md)"
        )
    tell_geometry("teacher", {name: model.preprocess for name, model in models.items()}, sample_sizes(data))
    if config.min_accuracy is not None:
        _require_accuracy(config, data, teachers)
    return Prepared(config, data, views, teachers, manifest, existing is not None, root)


def _require_room_for_clips(teachers: Mapping[str, Teacher], manifest: Manifest, cache: object) -> None:
    """Refuse several clips in a view 0 that is drawn together with views of one."""
    several = [name for name, teacher in teachers.items() if teacher.record.preprocess.clips > 1]
    if several and manifest.views_of(0) != range(1):
        raise UsageError(
            f"view 0 of teacher '{several[0]}' shows several clips, and {cache} was made for one",
            "Cache it into another folder, where it is the first: --cache, --eval-geometry clips:N.",
        )


def placed(
    models: Mapping[str, "Model"], config: CacheConfig, held: CacheReader | None
) -> dict[str, "Model"]:
    """The models with the evaluation geometry asked for; without one, a cached teacher's is the recorded one."""
    known = {} if held is None else {name: record.preprocess for name, record in held.teachers.items()}
    if config.eval_geometry is None:
        return {
            name: replace(model, preprocess=EvalGeometry.of(known[name]).applied(model.preprocess))
            if name in known
            else model
            for name, model in models.items()
        }
    geometry = EvalGeometry.parse(config.eval_geometry)
    shared = (each.crop_fraction for each in known.values() if each.crop_mode == "shared")
    crop = next(shared, next(iter(models.values())).preprocess.crop_fraction)
    return {
        name: replace(model, preprocess=geometry.applied(model.preprocess, crop))
        for name, model in models.items()
    }


def view_set_of(config: CacheConfig, existing: Manifest | None) -> "ViewSet":
    """The views asked for; what was not asked for is the existing cache's, else the default."""
    from kdcli.data.views import ViewSet

    default = ViewSet(0, DEFAULT_RECIPE)
    if existing is not None:
        default = ViewSet.from_document(existing.view_set)
    return ViewSet.parse(
        config.views or str(default),
        recipe=config.recipe or default.recipe,
        decode=config.decode or default.decode,
    )


def new_manifest(
    config: CacheConfig,
    data: "ImageData",
    views: "ViewSet",
    teachers: Mapping[str, Teacher],
) -> Manifest:
    """What a cache that is not there yet will be."""
    records = [teacher.record for teacher in teachers.values()]
    largest = max(spec.row_bytes for record in records for spec in record.array_specs().values())
    block_rows = config.block_rows or choose_block_rows(len(data), largest)
    group = group_size(records, block_rows, config.buffer_gb)
    labelled = data.class_names is not None
    return planned_manifest(
        backend=config.backend or "zarr",
        block_rows=block_rows,
        segments=(Segment(rows=len(data), spec=str(data.spec), location=data.location),),
        view_groups=split_views(views.count, group, any(record.preprocess.clips > 1 for record in records)),
        data=DataIdentity(
            keys=data.keys.digest(),
            labels=block_digest(data.labels.astype("<i8")) if labelled else None,
            class_names=data.class_names,
        ),
        view_set=views.document(),
        param_names=views.param_names,
        view_pixels=as_pixels(views.pixels()),
        claim_timeout=config.claim_timeout or Manifest.model_fields["claim_timeout"].default,
        created={"versions": versions(), "config": config.identity()},
    )


def group_size(records: Iterable[TeacherRecord], block_rows: int, buffer_gb: float) -> int:
    """How many views one task may compute: what its outputs and its decoded pixels leave room for."""
    records = list(records)
    row_bytes = sum(spec.row_bytes for record in records for spec in record.array_specs().values())
    sizes = [render.drawn(True) for render in {Render.of(record.preprocess) for record in records}]
    batch_size = max(int(record.compute["batch_size"]) for record in records)
    by_buffer = int(buffer_gb * 1e9 // (block_rows * row_bytes))
    by_pixels = PIXEL_BYTES // (batch_size * sum(3 * prod(size) for size in sizes))
    return max(1, min(by_buffer, by_pixels))


def split_views(count: int, group: int, alone: bool = False) -> tuple[int, ...]:
    """Views per group: as many as ``group`` each, the rest in the last one; ``alone``: view 0 is the first."""
    if alone:
        return (1, *split_views(count - 1, group))
    return tuple(min(group, count - start) for start in range(0, count, group))


def require_same_views(root: Path | str, manifest: Manifest, views: "ViewSet") -> None:
    """Refuse to fill a cache with other views than it holds.

    Raises:
        IdentityError: naming each differing field, with the command that adds views.
    """
    recorded, asked = ({"decode": "exact", **told} for told in (manifest.view_set, views.document()))
    found = differences(recorded, asked, "views.")
    if not found:
        require_same_pixels(manifest.view_pixels, as_pixels(views.pixels()), root)
        return
    hint = "Leave --views, --recipe and --decode out to fill the recorded ones, or use another --cache."
    if [difference.field for difference in found] == ["views.train_views"] and views.count > manifest.views:
        hint = f"Add them: kd cache extend {quote(str(root))} --views {views}"
    raise IdentityError(f"{root} holds other views", hint, found)


# --- --min-accuracy: see that a teacher knows its trade before it runs for a week -------------------


def _require_accuracy(config: CacheConfig, data: "Images", teachers: Mapping[str, "Teacher"]) -> None:
    """Run every teacher on view 0 of some labelled images, and refuse one that gets too few right.

    A wrong preprocessing, a wrong class order or untrained weights show here at once. The images are
    the first ``min_accuracy_images`` of a fixed random order of the labelled ones; a teacher is right where its
    largest logit, over all of its classes, is that of the image's class.

    Raises:
        UsageError: the data has no labels, or a teacher knows other classes: there is nothing to compare.
        BadDataError: naming the teacher and its accuracy.
    """
    wanted = config.min_accuracy or 0.0
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise UsageError("--min-accuracy needs labelled images, and the data has none", "Leave it out.")
    order = np.random.Generator(np.random.Philox(key=[0, len(labelled)])).permutation(labelled)
    rows = np.sort(order[: config.min_accuracy_images])
    for name, teacher in teachers.items():
        if teacher.plan.label_columns is None:
            raise UsageError(
                f"--min-accuracy: teacher '{name}' has no logits of the classes of the data",
                "Leave --min-accuracy out, or check such teachers with kd eval-probe.",
            )
        right = _right(config, data, teacher, rows)
        share = right / len(rows)
        console.note(f"teacher '{name}': {share:.3f} of {len(rows)} labelled images right")
        if share < wanted:
            raise BadDataError(
                f"teacher '{name}' gets {share:.3f} of {len(rows)} labelled images right, less than "
                f"--min-accuracy {wanted:g}",
                "Check its weights, its class names and its preprocessing (mean, std, input size).",
            )


def _right(config: CacheConfig, data: "Images", teacher: "Teacher", rows: np.ndarray) -> int:
    """How many of ``rows`` a teacher gets right."""
    from kdcli.data.drawing import show
    from kdcli.models.teacher import TeacherRunner

    columns = teacher.plan.label_columns
    assert columns is not None  # checked by the caller
    target, size = Render.of(teacher.model.preprocess), int(teacher.record.compute["batch_size"])
    runner = TeacherRunner(teacher.model, pick_device(config.device), teacher.record.amp, [Output("logits")])
    right = 0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        pixels = [show(data.picture(row, data.encoded(row), "exact"), target) for row in batch.tolist()]
        logits = runner(np.stack(pixels))["logits"]
        right += int((logits.argmax(dim=1).cpu().numpy() == columns[data.labels[batch]]).sum())
    return right
