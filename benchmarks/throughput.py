"""How much of a teacher's speed is left when it also writes a cache.

Each rate is the median of several runs in one process, kd and its rival taking turns. The bare loop has the
same loader, decoder and forward, moves the same outputs to the host, and writes nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import Figures, benchmark, of_turns
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
SAYS = {
    "cache_teachers_vs_bare_loop": (
        0.98,
        "one teacher, against the same loader and forward with nothing written",
    ),
    "three_teachers_vs_bare_loop": (0.98, "three teachers, against the same loader and forwards"),
    "three_teachers_vs_forward_limit": (
        0.95,
        "three teachers, against the forwards alone, on pixels in memory",
    ),
}
"""Goal and meaning of each figure."""


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


def figures(options: argparse.Namespace) -> Figures:
    """The second and third row of the design's table of numbers."""
    rows, turns = (192, 2) if options.quick else (768, 5)
    found: dict[str, list[float]] = {name: [] for name in SAYS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_place(root, rows)
        cache_teachers(config(root, root / "sample.kd", "a"))
        for _ in range(options.turns or turns):
            bare, _ = bare_rate(root, root / "sample.kd", "a")
            found["cache_teachers_vs_bare_loop"].append(cached_rate(root, "a") / bare)
            bare, forward = bare_rate(root, root / "sample.kd", "abc")
            cached = cached_rate(root, "abc")
            found["three_teachers_vs_bare_loop"].append(cached / bare)
            found["three_teachers_vs_forward_limit"].append(cached / forward)
    return {name: of_turns(found[name], goal, "x images/s", what) for name, (goal, what) in SAYS.items()}


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))
