"""Small caches of every form: kinds, types, segments, view groups, absent rows, gaps. Their bytes are random."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np

from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import BackendName, DataIdentity, Manifest, Segment, Unit, planned_manifest
from kdcli.cache.provenance import OutputRecord
from kdcli.cache.writer import CacheWriter, content_digest, create_cache

OUTPUTS = {
    "logits": OutputRecord(kind="logits", arrays={"logits": {"row_shape": [5], "dtype": "<f2"}}),
    "topk": OutputRecord(
        kind="topk",
        top_k=3,
        arrays={
            "topk_values": {"row_shape": [3], "dtype": "<f4"},
            "topk_ids": {"row_shape": [3], "dtype": "<u2"},
        },
    ),
    "stats": OutputRecord(
        kind="stats",
        arrays={
            "lse": {"row_shape": [2], "dtype": "<f4"},
            "logp_max": {"row_shape": [], "dtype": "<f4"},
            "logp_label": {"row_shape": [], "dtype": "<f4"},
        },
    ),
    "features": OutputRecord(
        kind="features", eval_only=True, arrays={"features": {"row_shape": [4], "dtype": "<f4"}}
    ),
    "maps.layer.4": OutputRecord(
        kind="maps", tap="layer.4", arrays={"maps/layer.4": {"row_shape": [2, 3, 2], "dtype": "<f2"}}
    ),
    "maps.layer.4@pool2": OutputRecord(
        kind="maps",
        tap="layer.4",
        pool=2,
        arrays={"maps/layer.4@pool2": {"row_shape": [2, 2, 2], "dtype": "<f2"}},
    ),
    "pixels": OutputRecord(
        kind="pixels", eval_only=True, arrays={"pixels": {"row_shape": [8, 8, 3], "dtype": "|u1"}}
    ),
}


@dataclass(frozen=True)
class Form:
    """What a random cache looks like."""

    segments: tuple[int, ...] = (45,)
    view_groups: tuple[int, ...] = (1, 2)
    teachers: tuple[tuple[str, tuple[str, ...]], ...] = (("t", tuple(OUTPUTS)),)
    backend: BackendName = "zarr"
    labels: bool = True
    missing: float = 0.0
    seed: int = 0


def manifest_of(form: Form) -> tuple[Manifest, KeyTable, np.ndarray | None]:
    names: list[str] = []
    labels: list[int] = []
    for number, rows in enumerate(form.segments):
        padding = -len(names) % 32
        names += [""] * padding + [f"s{number}/ä{row:04d}.png" for row in range(rows)]
        labels += [-1] * padding + [row % 3 for row in range(rows)]
    keys = KeyTable.from_strings(names)
    numbers = np.asarray(labels, np.int64) if form.labels else None
    manifest = planned_manifest(
        backend=form.backend,
        block_rows=32,
        segments=tuple(Segment(rows=rows, spec="x", location="x") for rows in form.segments),
        view_groups=form.view_groups,
        data=DataIdentity(
            keys=keys.digest(),
            labels=None if numbers is None else block_digest(numbers),
            class_names=("a", "b", "ü") if form.labels else None,
        ),
        view_set={**tools.VIEWS, "train_views": sum(form.view_groups) - 1},
        param_names=tools.PARAMS,
        created={"at": "now"},
    )
    return manifest, keys, numbers


def random_values(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any bits, NaN of every kind among them."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    return np.frombuffer(random.bytes(count * kind.itemsize), kind).reshape(shape).copy()


def make(root: Path, form: Form, only: Iterable[int] | None = None) -> Manifest:
    """Write a cache of this form, or of some of its blocks. The same form and seed give the same bytes."""
    manifest, keys, labels = manifest_of(form)
    manifest = create_cache(root, manifest, keys, labels)
    with CacheWriter(root, manifest) as writer:
        for name, kinds in form.teachers:
            outputs = {kind: OUTPUTS[kind] for kind in kinds}
            classes = OUTPUTS["logits"].array_specs()["logits"].row_shape[0]
            writer.add_teacher(
                tools.record_of(name, classes, num_features=4, temperatures=(1.0, 2.0), outputs=outputs)
            )
        gaps = np.random.default_rng(form.seed)
        for part in writer.store.parts():
            for unit in writer.missing(part):
                keep = gaps.random() >= form.missing and (only is None or unit.block in only)
                if keep:
                    publish(writer, unit, form.seed)
            writer.finish(part)
    return manifest


def publish(writer: CacheWriter, unit: Unit, seed: int) -> None:
    rows, store = writer.manifest.rows_of(unit.block), writer.store
    salt = (seed, unit.block, unit.group, *unit.part.encode())
    random = np.random.default_rng(salt)
    absent = [row for row in rows if row % 17 == 5 and seed % 2]
    arrays: dict[str, Any] = {}
    for name, spec in store.arrays_in(unit.part, unit.group).items():
        views = (len(writer.manifest.views_of(unit.group, store.views(unit.part))),) if spec.per_view else ()
        values = random_values(random, (len(rows), *views, *spec.row_shape), spec.dtype)
        values[[row - rows.start for row in absent]] = spec.fill
        arrays[name] = values
    content = content_digest(np.arange(rows.start, rows.stop), np.arange(rows.start, rows.stop) + seed)
    notes = [(row, "truncated") for row in absent]
    assert writer.publish(unit, arrays, content, notes, {"batch_size": 8}, 0.5)
