"""A cache without images: keys, a numpy teacher, and the writer as the pipeline uses it."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.cache.commits import block_digest
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, DataIdentity, Manifest, Unit
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.writer import CacheWriter, content_digest, create_cache

VIEWS = {
    "train_views": 1,
    "crop_fraction": 1.0,
    "recipe": {"name": "imagenet"},
}


def manifest_of(keys: KeyTable, labels: np.ndarray, views: int = 2, block_rows: int = 32) -> Manifest:
    return Manifest(
        rows=len(keys),
        views=views,
        block_rows=block_rows,
        view_group=1,
        data=DataIdentity(
            spec="x", location="x", keys=keys.digest(), labels=block_digest(labels), class_names=("a", "b")
        ),
        view_set=VIEWS,
        created={},
    )


def record_of(name: str = "t", classes: int = 5, weights: str = "w", **changes: Any) -> TeacherRecord:
    fields: dict[str, Any] = {
        "name": name,
        "spec": "numpy:",
        "architecture": "numpy",
        "weights": weights,
        "keep": ("logits",),
        "dtype": "float16",
        "amp": "off",
        "declared_preprocess": {
            "size": [8, 8],
            "interpolation": "bilinear",
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "crop_fraction": 1.0,
        },
        "num_classes": classes,
        "num_features": 3,
        "class_names": None,
        "temperatures": (1.0,),
        "arrays": {
            "logits": {"row_shape": [classes], "dtype": "<f2"},
            "lse": {"row_shape": [1], "dtype": "<f4"},
        },
        "pixels": (1, 2, 3),
        "compute": {"batch_size": 8, "device": "cpu"},
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
    logits = np.stack([logits_of(unit.part, rows, view) for view in views], axis=1)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)).astype(np.float32)
    return {"logits": logits, "lse": lse}, content


def new_cache(root: Path, rows: int = 100, views: int = 2) -> Manifest:
    keys, labels = keys_of(rows), labels_of(rows)
    return create_cache(root, manifest_of(keys, labels, views), keys, labels)


def fill(root: Path, names: tuple[str, ...] = ("t",), rows: int = 100, pause: float = 0.0) -> int:
    """Fill what is missing, as a job would: claim, compute, publish. Returns the units written."""
    import time

    manifest = new_cache(root, rows)
    written = 0
    with CacheWriter(root, manifest) as writer:
        for name in names:
            writer.add_teacher(record_of(name))
        while True:
            missing = [unit for part in (SAMPLES, *names) for unit in writer.missing(part)]
            if not missing:
                break
            for unit in missing:
                if not writer.claims.acquire(unit):
                    continue
                if not writer.is_done(unit):
                    arrays, content = unit_arrays(manifest, unit)
                    time.sleep(pause)
                    written += writer.publish(unit, arrays, content, [], {"batch_size": 8}, 0.0)
                writer.claims.release([unit])
            time.sleep(0.005)
        for part in (SAMPLES, *names):
            writer.finish(part)
    return written


def payload(root: Path) -> dict[str, bytes]:
    """Every chunk file, by its path in the group."""
    group = root / "data.zarr"
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
    )
