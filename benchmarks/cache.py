"""How fast a cache is read: 256 random rows of 1000 fp16 logits, against the same rows read otherwise.

    python benchmarks/cache.py [--quick] [--json]

Everything of one figure runs in one process, in turns, each time on a new random batch; the value is the
median over the turns of the ratio of their medians. "Cold" is right after the files' pages were dropped
(posix_fadvise, no root needed). The memory figure reads caches of a thousand and of a million rows in
processes of their own; it is left out with --quick.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_tools as tools
from measuring import Figure, Figures, benchmark, figure, of_turns, parser_of, say

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.layout import SAMPLES, BackendName, Unit
from kdcli.cache.provenance import OutputRecord
from kdcli.cache.reader import CacheReader, disk_reads
from kdcli.cache.writer import CacheWriter, create_cache

CLASSES, BATCH = 1000, 256
Read = Callable[[np.ndarray], object]


def build(root: Path, values: np.ndarray, backend: BackendName = "zarr") -> None:
    """A cache of one teacher with these logits, through the real writer."""
    keys, labels = tools.keys_of(len(values)), tools.labels_of(len(values))
    manifest = create_cache(
        root, tools.manifest_of(keys, labels, views=1, block_rows=4096, backend=backend), keys, labels
    )
    logits = {"logits": {"row_shape": [values.shape[1]], "dtype": "<f2"}}
    outputs = {"logits": OutputRecord(kind="logits", arrays=logits)}
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t", values.shape[1], outputs=outputs))
        for block in range(manifest.blocks):
            inside = manifest.rows_of(block)
            arrays, content = tools.unit_arrays(manifest, Unit(SAMPLES, block, 0))
            writer.publish(Unit(SAMPLES, block, 0), arrays, content, [], {}, 0.0)
            arrays = {"logits": values[inside.start : inside.stop, None]}
            writer.publish(Unit("t/logits", block, 0), arrays, content, [], {}, 0.0)
        for part in (SAMPLES, "t/logits"):
            writer.finish(part)


def one_file(path: Path) -> np.ndarray:
    """One .npy of all rows, mapped by numpy."""
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


# --- warm ----------------------------------------------------------------------------------------


def seconds_of(read: Read, rows: int, draw: np.random.Generator, times: int) -> float:
    """Median seconds of one batch."""
    taken = []
    for _ in range(times):
        batch = draw.integers(0, rows, BATCH)
        start = time.perf_counter()
        read(batch)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compare(rivals: dict[str, tuple[Read, int, int]], seconds: float) -> dict[str, list[float]]:
    """Seconds per batch of each rival, turn by turn: name -> (read, batches a turn, rows to draw from)."""
    draw, found = np.random.default_rng(1), {name: list[float]() for name in rivals}
    for read, _, rows in rivals.values():
        seconds_of(read, rows, draw, 3)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(found["kd"]) < 5:
        for name, (read, times, rows) in rivals.items():
            found[name].append(seconds_of(read, rows, draw, times))
    return found


def h5py_rows(data: Any, batch: np.ndarray) -> np.ndarray:
    """What h5py does fastest: increasing rows without repetition in one call."""
    rows, places = np.unique(batch, return_inverse=True)
    values: np.ndarray = data[rows][places]
    return values


def write_files(folder: Path, values: np.ndarray) -> None:
    folder.mkdir()
    for row, value in enumerate(values):
        torch.save(torch.from_numpy(value.copy()), folder / f"{row}.pt")


def torch_rows(folder: Path, batch: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.load(folder / f"{row}.pt", weights_only=True) for row in batch.tolist()])


def warm_figures(root: Path, values: np.ndarray, files: int, seconds: float) -> dict[str, Figure]:
    rows = len(values)
    readers = {name: CacheReader(root / f"{name}.kd") for name in ("zarr", "hdf5")}
    one = one_file(root / "one.npy")
    group: Any = zarr.open_group(root / "zarr.kd/data.zarr", mode="r")["teachers/t/logits"]
    batch = np.random.default_rng(0).integers(0, files, BATCH)
    with h5py.File(root / "one.h5") as file:
        reads: dict[str, tuple[Read, int, int]] = {
            "kd": (lambda batch: readers["zarr"].gather("t", "logits", batch), 40, rows),
            "memmap": (lambda batch: one[batch], 40, rows),
            "hdf5": (lambda batch: readers["hdf5"].gather("t", "logits", batch), 40, rows),
            "zarr": (lambda batch: group.oindex[batch, 0], 1, rows),
            "h5py": (lambda batch: h5py_rows(file["logits"], batch), 4, rows),
            "torch": (lambda batch: torch_rows(root / "files", batch), 2, files),
        }
        for read, _, _ in reads.values():
            np.testing.assert_array_equal(np.asarray(read(batch)), values[batch])
        found = compare(reads, seconds)

    def faster(rival: str, goal: float, what: str, ours: str = "kd") -> Figure:
        ratios = [b / a for a, b in zip(found[ours], found[rival], strict=True)]
        say(f"{ours} {1000 * statistics.median(found[ours]):8.3f} ms, {rival} "
            f"{1000 * statistics.median(found[rival]):8.3f} ms a batch, {len(ratios)} turns")  # fmt: skip
        return of_turns(ratios, goal, "x rows/s", what)

    return {
        "gather_vs_memmap": faster("memmap", 0.5, "against `np.memmap` of one `.npy`, fancy indexing"),
        "hdf5_gather_vs_memmap": faster("memmap", 0.5, "the same for a cache of the HDF5 backend", "hdf5"),
        "gather_vs_zarr_oindex": faster("zarr", 100.0, "against zarr-python on the same files"),
        "gather_vs_h5py": faster(
            "h5py", 3.0, "against one contiguous data set, increasing unique rows in a call"
        ),
        "gather_vs_torch_files": faster("torch", 10.0, "against one `torch.save` file a sample"),
    }


# --- cold ----------------------------------------------------------------------------------------


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache. Pages that somebody maps stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on the disk yet stays, too
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cold_figures(root: Path, values: np.ndarray, turns: int) -> dict[str, Figure]:
    """Kd's first batch after the files were dropped, against tensorstore's on the very same files, and on
    the layout that suits it best: shards whose chunks are single rows."""
    try:
        import tensorstore
    except ImportError:
        say("cold_gather_vs_tensorstore is left out: pip install tensorstore")
        return {}
    rows, folder = len(values), root / "zarr.kd/data.zarr/teachers/t/logits"
    shards = tensorstore_of_rows(tensorstore, root / "rows.zarr", values)
    same = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    chunks = tensorstore.open(same, read=True).result()
    files = [path for place in (folder, root / "rows.zarr") for path in place.rglob("*") if path.is_file()]
    reads: dict[str, Read] = {
        "same files": lambda batch: chunks[batch, 0].read().result(),
        "a row a chunk": lambda batch: shards[batch].read().result(),
    }
    draw, found = np.random.default_rng(2), {name: list[float]() for name in ("kd", *reads)}
    for _ in range(turns):
        reader = CacheReader(root / "zarr.kd")
        reader.commits("t/logits")  # opening a cache is not what is measured
        reads["kd"] = lambda batch, reader=reader: reader.gather("t", "logits", batch)  # type: ignore[misc]
        for name in found:
            evict(files)
            batch, before = draw.integers(0, rows, BATCH), disk_reads()
            start = time.perf_counter()
            result = reads[name](batch)
            found[name].append(time.perf_counter() - start)
            np.testing.assert_array_equal(np.asarray(result), values[batch])
            if name == "kd" and disk_reads() == before:
                say("cold_gather_vs_tensorstore is left out: files cannot be dropped from memory here")
                return {}
        del reader, reads["kd"]
    for name, taken in found.items():
        say(f"cold, {name}: {1000 * statistics.median(taken):.1f} ms a batch, {len(taken)} turns")
    names = {
        "cold_gather_vs_tensorstore": (
            "same files",
            "a first batch against tensorstore, same files dropped from memory",
        ),
        "cold_gather_vs_tensorstore_rows": (
            "a row a chunk",
            "against its own best layout, shards of one-row chunks",
        ),
    }
    return {
        name: of_turns(
            [a / b for a, b in zip(found["kd"], found[rival], strict=True)], 1.3, "x time", what, higher=False
        )
        for name, (rival, what) in names.items()
    }


def tensorstore_of_rows(tensorstore: Any, path: Path, values: np.ndarray) -> Any:
    sharding = {"chunk_shape": [1, CLASSES], "codecs": [{"name": "bytes"}],
                "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}]}  # fmt: skip
    metadata = {
        "shape": list(values.shape),
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4096, CLASSES]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    store = tensorstore.open(spec, create=True).result()
    store.write(values).result()
    return store


# --- memory --------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def read_and_weigh(root: Path) -> None:
    """What a student's process does with a cache, then its memory that is no file's, on stdout."""
    cache, draw = CacheSet.open([root]), np.random.default_rng(3)
    rows = cache.keys.find(cache.keys)  # as a data set's keys are looked up
    cache.require({"t": ["logits"]}, rows, [0])
    for _ in range(500):
        cache.gather("t", "logits", rows[draw.integers(0, len(rows), BATCH)])
    print(anonymous_bytes())


def memory_figures(root: Path) -> dict[str, Figure]:
    if not Path("/proc/self/smaps_rollup").is_file():
        say("reader_memory_1m_rows is left out: no /proc/self/smaps_rollup")
        return {}
    sizes = {}
    for rows in (1_000, 1_000_000):
        values = np.random.default_rng(4).normal(size=(rows, 16)).astype(np.float16)
        build(root / f"{rows}.kd", values)
        command = [sys.executable, __file__, "--weigh", str(root / f"{rows}.kd")]
        weighed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sizes[rows] = int(weighed.stdout)
        say(f"reader of {rows} rows: {sizes[rows] / 2**20:.1f} MiB of anonymous memory")
    more = (sizes[1_000_000] - sizes[1_000]) / 2**20
    what = "anonymous memory of a reader, 1M rows above 1k rows"
    return {"reader_memory_1m_rows": figure(more, 64.0, "MiB", what, higher=False)}


# --- all -----------------------------------------------------------------------------------------


def figures(options: argparse.Namespace) -> Figures:
    """All of them; ``options.turns``: of each rival at least."""
    torch.set_num_threads(1)
    rows, files, seconds, turns = (20_000, 1_000, 6.0, 5) if options.quick else (100_000, 10_000, 20.0, 9)
    values = np.random.default_rng(0).normal(size=(rows, CLASSES)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for backend in ("zarr", "hdf5"):
            build(root / f"{backend}.kd", values, backend)  # type: ignore[arg-type]
        np.save(root / "one.npy", values)
        with h5py.File(root / "one.h5", "w") as file:
            file["logits"] = values
        write_files(root / "files", values[:files])
        found = cold_figures(root, values, options.turns or turns)
        found |= warm_figures(root, values, files, seconds)
        return found | ({} if options.quick else memory_figures(root))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--weigh", type=Path, help=argparse.SUPPRESS)
    if "--weigh" in sys.argv:
        read_and_weigh(parser.parse_args().weigh)
    else:
        benchmark(__doc__, figures, ("numpy", "zarr", "h5py", "tensorstore", "torch"), parser)
