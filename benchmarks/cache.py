"""How fast a cache is read: 256 random rows of 1000 fp16 logits, against the same bytes read otherwise.

    python benchmarks/cache.py [--quick] [--json]

Everything runs in one process on one machine, warm; medians. Figures are ratios of rows per second.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_tools as tools

from kdcli.cache.layout import SAMPLES, Unit
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter, create_cache

CLASSES, BATCH = 1000, 256


def build(root: Path, rows: int) -> None:
    """A cache with one teacher, through the real writer, and the same logits as one .npy and one .h5."""
    keys, labels = tools.keys_of(rows), tools.labels_of(rows)
    manifest = create_cache(
        root / "c.kd", tools.manifest_of(keys, labels, views=1, block_rows=4096), keys, labels
    )
    record = tools.record_of("t", CLASSES, arrays={"logits": {"row_shape": [CLASSES], "dtype": "<f2"}})
    values = np.random.default_rng(0).normal(size=(rows, CLASSES)).astype(np.float16)
    with CacheWriter(root / "c.kd", manifest) as writer:
        writer.add_teacher(record)
        for block in range(manifest.blocks):
            inside = manifest.rows_of(block)
            for part in (SAMPLES, "t"):
                unit = Unit(part, block, 0)
                arrays, content = tools.unit_arrays(manifest, Unit(SAMPLES, block, 0))
                if part == "t":
                    arrays = {"logits": values[inside.start : inside.stop, None]}
                writer.publish(unit, arrays, content, [], {}, 0.0)
        writer.finish("t")
    np.save(root / "one.npy", values)
    with h5py.File(root / "one.h5", "w") as file:
        file["logits"] = values


def rate(read: Callable[[np.ndarray], object], rows: int, seconds: float) -> float:
    """Median rows per second of random batches."""
    random = np.random.default_rng(1)
    taken, deadline = [], time.perf_counter() + seconds
    read(random.integers(0, rows, BATCH))
    while time.perf_counter() < deadline or len(taken) < 3:
        batch = random.integers(0, rows, BATCH)
        start = time.perf_counter()
        read(batch)
        taken.append(time.perf_counter() - start)
    return BATCH / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, seconds = (20_000, 1.5) if options.quick else (100_000, 5.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, rows)
        reader = CacheReader(root / "c.kd")
        one = np.load(root / "one.npy", mmap_mode="r")
        group = zarr.open_group(root / "c.kd/data.zarr", mode="r")["teachers/t/logits"]
        check = np.asarray([0, rows - 1, 17])
        np.testing.assert_array_equal(reader.gather("t", "logits", check), one[check])
        with h5py.File(root / "one.h5") as file:
            rivals: dict[str, Callable[[np.ndarray], object]] = {
                "kd": lambda batch: reader.gather("t", "logits", batch),
                "memmap": lambda batch: one[batch],
                "zarr": lambda batch: group.oindex[batch, 0],
                "h5py": lambda batch: [file["logits"][int(row)] for row in batch],
            }
            rates = {name: rate(read, rows, seconds) for name, read in rivals.items()}
    figures = {
        "gather_vs_memmap": {"value": rates["kd"] / rates["memmap"], "goal": 0.4},
        "gather_vs_zarr_oindex": {"value": rates["kd"] / rates["zarr"], "goal": 100.0},
        "gather_vs_h5py": {"value": rates["kd"] / rates["h5py"], "goal": 3.0},
    }
    for figure in figures.values():
        figure |= {"higher_is_better": True, "unit": "x rows/s"}
    machine = (
        f"{platform.machine()}, {rows} rows, Python {platform.python_version()}, zarr {zarr.__version__}"
    )
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine}))
        return
    print(machine)
    for name, value in rates.items():
        print(f"{name:8} {value:12.0f} rows/s  {1000 * BATCH / value:8.2f} ms per batch of {BATCH}")
    for name, figure in figures.items():
        print(f"{name:22} {figure['value']:8.2f}  goal {figure['goal']}")


if __name__ == "__main__":
    main()
