"""A cache without images: keys, a numpy teacher, and the writer as the pipeline uses it."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.cache.filling import Filling
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES, BackendName, DataIdentity, Manifest, Segment, Unit, planned_manifest
from kdcli.cache.provenance import OutputRecord, TeacherRecord
from kdcli.cache.writer import CacheWriter, content_digest, create_cache

VIEWS = {
    "train_views": 1,
    "recipe": {"name": "imagenet"},
}


PARAMS = ("left", "top", "width", "height", "flip", "source_width", "source_height")


def manifest_of(
    keys: KeyTable,
    labels: np.ndarray,
    views: int = 2,
    block_rows: int = 32,
    backend: BackendName = "zarr",
    cache_id: str | None = None,
) -> Manifest:
    return planned_manifest(
        **({} if cache_id is None else {"cache_id": cache_id}),
        backend=backend,
        block_rows=block_rows,
        segments=(Segment(rows=len(keys), spec="x", location="x"),),
        view_groups=(1,) * views,
        data=DataIdentity(keys=keys.digest(), labels=block_digest(labels), class_names=("a", "b")),
        view_set={**VIEWS, "train_views": views - 1},
        param_names=PARAMS,
        created={},
    )


def outputs_of(classes: int = 5, temperatures: int = 1) -> dict[str, OutputRecord]:
    logits = {"logits": {"row_shape": [classes], "dtype": "<f2"}}
    stats = {"lse": {"row_shape": [temperatures], "dtype": "<f4"}}
    return {
        "logits": OutputRecord(kind="logits", arrays=logits),
        "stats": OutputRecord(kind="stats", arrays=stats),
    }


def record_of(name: str = "t", classes: int = 5, weights: str = "w", **changes: Any) -> TeacherRecord:
    fields: dict[str, Any] = {
        "name": name,
        "spec": "numpy:",
        "architecture": "numpy",
        "weights": weights,
        "dtype": "float16",
        "amp": "off",
        "declared_preprocess": {
            "size": [8, 8],
            "interpolation": "bilinear",
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "crop_fraction": 1.0,
            "crop_mode": "center",
        },
        "num_classes": classes,
        "num_features": 3,
        "class_names": None,
        "temperatures": (1.0,),
        "pixels": (1, 2, 3),
        "compute": {"batch_size": 8, "device": "cpu"},
        "outputs": outputs_of(classes, len(changes.get("temperatures", (1.0,)))),
    }
    return TeacherRecord(**{**fields, **changes})


def keys_of(rows: int) -> KeyTable:
    return KeyTable.from_strings(f"k{row:05d}" for row in range(rows))


def labels_of(rows: int) -> np.ndarray:
    return np.arange(rows) % 2


def logits_of(name: str, row: np.ndarray, view: int, classes: int = 5) -> np.ndarray:
    """What the numpy teacher says: any row and view can be checked on its own."""
    salt = sum(name.encode())
    return np.sin(salt + row[:, None] * 1.7 + view * 0.3 + np.arange(classes)).astype(np.float16)


def unit_arrays(manifest: Manifest, unit: Unit) -> tuple[dict[str, np.ndarray], str]:
    rows = np.arange(manifest.rows)[
        slice(manifest.rows_of(unit.block).start, manifest.rows_of(unit.block).stop)
    ]
    views = list(manifest.views_of(unit.group))
    sizes, crcs = rows + 100, rows * 7 + 1
    content = content_digest(sizes, crcs)
    if unit.part == SAMPLES:
        params = np.stack([np.stack([rows + view] * 7, axis=1) for view in views], axis=1).astype(np.int32)
        arrays: dict[str, np.ndarray] = {"params": params}
        if unit.group == 0:
            arrays |= {"content_size": sizes, "content_crc": crcs.astype(np.uint32)}
        return arrays, content
    logits = np.stack([logits_of(unit.teacher, rows, view) for view in views], axis=1)
    if unit.kind == "logits":
        return {"logits": logits}, content
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)).astype(np.float32)
    return {"lse": lse}, content


def new_cache(root: Path, rows: int = 100, views: int = 2, backend: BackendName = "zarr") -> Manifest:
    keys, labels = keys_of(rows), labels_of(rows)
    return create_cache(root, manifest_of(keys, labels, views, backend=backend), keys, labels)


def parts_of(names: tuple[str, ...]) -> list[str]:
    return [SAMPLES, *(f"{name}/{kind}" for name in names for kind in outputs_of())]


def fill(
    root: Path,
    names: tuple[str, ...] = ("t",),
    rows: int = 100,
    pause: float = 0.0,
    backend: BackendName = "zarr",
) -> int:
    """Fill what is missing, as a job would. Returns the units written."""
    with CacheWriter(root, new_cache(root, rows, backend=backend)) as writer:
        return complete(writer, names, pause)


def complete(writer: Filling, names: tuple[str, ...], pause: float = 0.0) -> int:
    """Claim, compute and publish until nothing is missing. Returns the units written."""
    written = 0
    for name in names:
        writer.add_teacher(record_of(name))
    while True:
        missing = [unit for part in parts_of(names) for unit in writer.missing(part)]
        if not missing:
            break
        for unit in missing:
            if not writer.claims.acquire(unit):
                continue
            if not writer.is_done(unit):
                arrays, content = unit_arrays(writer.manifest, unit)
                time.sleep(pause)
                written += writer.publish(unit, arrays, content, [], {"batch_size": 8}, 0.0)
            writer.claims.release([unit])
        time.sleep(0.005)
    for part in parts_of(names):
        writer.finish(part)
    return written


def payload(root: Path) -> dict[str, bytes]:
    """Every chunk file, by its path in the group."""
    group = next(root.glob("data.*"))
    return {
        str(path.relative_to(group)): path.read_bytes()
        for path in sorted(group.rglob("c.*"))
        if path.is_file()
    }


if __name__ == "__main__":
    import sys

    fill(
        Path(sys.argv[1]),
        tuple(sys.argv[2].split(",")),
        int(sys.argv[3]),
        float(os.environ.get("PAUSE", "0")),
        os.environ.get("BACKEND", "zarr"),  # type: ignore[arg-type]
    )
