"""Anonymous memory of cache-teachers, rank-sources and train-student, by the number of rows.

    python benchmarks/memory.py [--quick] [--json]

Each step runs in a process of its own over N synthetic images (their pixels follow from the row number, so
a million need no disk), once with 1,000 rows and once with many; a thread samples Anonymous in
/proc/self/smaps_rollup (mapped pages of the cache do not count) and keeps the largest value. The figure is the
difference in MiB. cache-teachers computes four blocks; the rest of the cache is written by a numpy teacher.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from measuring import Figures, benchmark, figure, parser_of
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MIB = 2**20
STEPS = {"cache": "cache-teachers (four blocks)", "rank": "rank-sources", "train": "train-student (30 steps)"}


class SyntheticSource:
    """Images that follow from their row number."""

    text = "synthetic"

    def encoded(self, key: str) -> bytes:
        return key.encode() * 40

    def size(self, key: str) -> int:
        return len(key) * 40

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        return Image.fromarray(np.full((32, 32, 3), int(key[1:]) % 251, np.uint8))

    def path(self, key: str) -> str:
        return f"synthetic#{key}"


def synthetic_data(rows: int) -> object:
    from kdcli.cache.keytable import KeyTable
    from kdcli.data.sources import ImageData
    from kdcli.data.spec import DataSpec

    digits = np.char.zfill(np.arange(rows).astype("S7"), 7)
    blob = np.concatenate([np.full((rows, 1), ord("k"), np.uint8), digits.view(np.uint8).reshape(rows, 7)], 1)
    keys = KeyTable(np.ascontiguousarray(blob).reshape(-1), np.arange(rows + 1, dtype=np.int64) * 8)
    source = SyntheticSource()
    return ImageData(DataSpec("folder/synthetic"), source, keys, np.arange(rows) % 10, tuple("abcdefghij"))


def watch(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def fill(root: Path, rows: int) -> None:
    """Complete the cache that cache-teachers began, with random outputs, through the real writer."""
    from kdcli.cache.layout import SAMPLES, Unit, load_manifest
    from kdcli.cache.writer import CacheWriter, content_digest

    random, data = np.random.default_rng(0), synthetic_data(rows)
    with CacheWriter(root, load_manifest(root)) as writer:
        for part in writer.store.parts():
            for unit in writer.missing(part):
                inside = writer.manifest.rows_of(unit.block)
                count = len(inside)
                encoded = [data.encoded(row) for row in inside]
                from kdcli.cache.backends.base import checksum

                sizes = np.asarray([len(each) for each in encoded])
                crcs = np.asarray([checksum(each) for each in encoded])
                content = content_digest(sizes, crcs)
                if part == SAMPLES:
                    box = np.tile(np.asarray([0, 0, 32, 32, 0, 32, 32], np.int32), (count, 1, 1))
                    arrays = {"params": box, "content_size": sizes, "content_crc": crcs.astype(np.uint32)}
                else:
                    arrays = {
                        name: random.normal(size=(count, 1, *spec.row_shape)).astype(spec.dtype)
                        for name, spec in writer.specs(part).items()
                    }
                writer.publish(Unit(part, unit.block, unit.group), arrays, content, [], {}, 0.0)
            writer.finish(part)


class Enough(Exception):
    """Ends a training run after some steps."""


def run_step(step: str, rows: int, root: Path) -> int:
    """Peak of anonymous memory in bytes while a step runs."""
    import torch

    import kdcli.extract.opening as opening
    import kdcli.training.resolve as resolve
    from kdcli.extract.config import CacheConfig
    from kdcli.ranking.config import RankConfig
    from kdcli.training.config import StudentConfig

    torch.set_num_threads(1)
    data = None if step == "rank" else synthetic_data(rows)  # a ranking reads its labels from the cache
    opening._open = lambda *_: data  # the only stand-in: where the images come from
    resolve.open_data = lambda *_, **__: data
    peak, stop = [0], threading.Event()
    thread = threading.Thread(target=watch, args=(peak, stop))
    thread.start()
    try:
        if step == "cache":
            from kdcli.extract import cache_teachers

            shard = f"0/{max(1, -(-rows // 4096) // 4)}" if rows > 4096 else None
            cache_teachers(
                CacheConfig(data="synthetic", cache=root, teacher=(f"t=local-dir:{root.parent / 'net'}",),
                            shard=shard, workers=0, block_rows=None if rows < 4096 else 4096)
            )  # fmt: skip
        elif step == "rank":
            from kdcli.ranking import rank_sources

            rank_sources(RankConfig(cache=(root,)))
        else:
            from kdcli.training.train import train_student

            seen = []

            def count(_batch: object) -> None:
                seen.append(1)
                if len(seen) == 30:
                    raise Enough

            config = StudentConfig(data="synthetic", cache=(root,), method="distill-equal", student="test_resnet",
                                 image_size=32, epochs=1, workers=0, out=root.parent / f"run{rows}")  # fmt: skip
            with contextlib.suppress(Enough):
                train_student(config, on_batch=count)
    finally:
        time.sleep(0.1)
        stop.set()
        thread.join()
    return peak[0]


def make_net(folder: Path) -> None:
    import torch

    from kdcli.models.export import export_model
    from kdcli.models.spec import open_model

    torch.manual_seed(0)
    export_model(open_model("test_resnet", weights="random", num_classes=10, image_size=32), folder, None)


def measure(rows: int, steps: Iterable[str]) -> dict[str, float]:
    """MiB at the peak of each step, each in its own process."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_net(Path(folder) / "net")
        for step in steps:
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--rows",
                str(rows),
                "--root",
                f"{folder}/c.kd",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{step} with {rows} rows failed:\n{done.stderr[-2000:]}")
            found[step] = int(done.stdout.strip().splitlines()[-1]) / MIB
            if step == "cache":
                fill(Path(folder) / "c.kd", rows)
    return found


def figures(options: argparse.Namespace) -> Figures:
    """The difference in MiB of each step."""
    many = 50_000 if options.quick else 1_000_000
    few, lots = measure(1000, STEPS), measure(many, STEPS)
    found = {}
    for step, name in STEPS.items():
        what = f"largest anonymous memory of {name} at {many} rows above 1,000 ({few[step]:.0f} MiB)"
        found[f"memory_{step}"] = figure(lots[step] - few[step], 64, "MiB", what, higher=False)
    return found


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.step:
        print(run_step(own.step, own.rows, own.root))
    else:
        benchmark(__doc__, figures, ("torch", "numpy"), parser)
