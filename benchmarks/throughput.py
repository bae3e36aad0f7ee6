"""How much of a teacher's speed is left when it also writes a cache. Used by cache.py.

Each rate is the median of several runs in one process, kd and its rival taking turns. The bare loop has the
same loader, decoder and forward, moves the same outputs to the host, and writes nothing.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdcli.cache.layout import load_manifest
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.extract.decoding import BatchRequest, Decoded, Decoder
from kdcli.geometry import Render
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.workers import worker_init

ARCHITECTURES = {"a": "resnet18", "b": "resnet34", "c": "mobilenetv3_large_100"}
SIZE, BATCH = 96, 64


def make_place(root: Path, rows: int) -> None:
    """Images as large as small photos, and three random teachers."""
    random = np.random.default_rng(0)
    for row in range(rows):
        folder = root / "img" / str(row % 10)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(random.integers(0, 255, (16, 16, 3)), np.ones((8, 8, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{row:05d}.jpg", quality=90)
    for name, architecture in ARCHITECTURES.items():
        torch.manual_seed(0)
        export_model(open_model(architecture, weights="random", image_size=SIZE), root / name, None)


def config(root: Path, cache: Path, names: str) -> CacheConfig:
    teachers = tuple(f"{name}=local-dir:{root / name}" for name in names)
    return CacheConfig(
        data=str(root / "img"), cache=cache, teacher=teachers, workers=1, batch_size=BATCH, block_rows=256
    )


def cached_rate(root: Path, names: str) -> float:
    """Images a second of the loop of cache-teachers."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        rate = cache_teachers(config(root, Path(folder) / "c.kd", names)).images_per_second
    assert rate is not None
    return rate


def requests(root: Path, manifest_of: Path) -> list[BatchRequest]:
    manifest = load_manifest(manifest_of)
    return [
        BatchRequest(block, block, 0, range(start, min(start + BATCH, rows.stop)), 1)
        for block in range(manifest.blocks)
        for rows in [manifest.rows_of(block)]
        for start in range(rows.start, rows.stop, BATCH)
    ]


def bare_rate(root: Path, sample: Path, names: str) -> tuple[float, float]:
    """Images a second of the bare loop, and of forward alone on batches that are decoded already."""
    manifest, data = load_manifest(sample), open_data(str(root / "img"))
    views = ViewSet.from_document(manifest.view_set)
    runners = [
        TeacherRunner(open_model(f"local-dir:{root / name}"), "cpu", "off", outputs()) for name in names
    ]
    renders = [Render.of(runner.model.preprocess) for runner in runners]
    start, count, kept = time.perf_counter(), 0, []
    loader = torch.utils.data.DataLoader(
        Decoder(data, views, manifest, list(dict.fromkeys(renders))),
        batch_size=None,
        sampler=requests(root, sample),
        num_workers=1,
        collate_fn=as_it_is,
        worker_init_fn=worker_init,
    )
    for decoded in loader:
        pixels = [decoded.pixels[render][0] for render in renders]
        for runner, seen in zip(runners, pixels, strict=True):
            {name: out.half().cpu() for name, out in runner(seen).items()}
        count += len(pixels[0])
        kept.append(pixels)
    bare = count / (time.perf_counter() - start)
    start = time.perf_counter()
    for pixels in kept:
        for runner, seen in zip(runners, pixels, strict=True):
            {name: out.half().cpu() for name, out in runner(seen).items()}
    return bare, count / (time.perf_counter() - start)


def as_it_is(decoded: Decoded) -> Decoded:
    return decoded


def outputs() -> tuple:
    from kdcli.outputs import parse_keep

    return parse_keep(["logits", "features"])


def figures(quick: bool) -> dict[str, dict[str, object]]:
    """The second and third row of the design's table of numbers.

    The limit of several teachers is their forward alone, one after the other, on pixels that are in memory:
    with teachers this large on two processors, decoding (one process) takes little of it.
    """
    rows, repeats = (192, 2) if quick else (768, 3)
    one: list[float] = []
    three: list[float] = []
    limit: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_place(root, rows)
        cache_teachers(config(root, root / "sample.kd", "a"))
        for _ in range(repeats):
            bare, _ = bare_rate(root, root / "sample.kd", "a")
            one.append(cached_rate(root, "a") / bare)
            bare, forward = bare_rate(root, root / "sample.kd", "abc")
            cached = cached_rate(root, "abc")
            three.append(cached / bare)
            limit.append(cached / forward)
    shape = {"goal": 0.95, "higher_is_better": True, "unit": "x images/s"}
    return {
        "cache_teachers_vs_bare_loop": {"value": statistics.median(one), **shape},
        "three_teachers_vs_bare_loop": {"value": statistics.median(three), **shape},
        "three_teachers_vs_forward_limit": {"value": statistics.median(limit), **shape},
    }


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(figures("--quick" in sys.argv), indent=1))
