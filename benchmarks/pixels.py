"""What ``pixels@eval`` saves: a second teacher over photographs of 1500 x 1000 pixels, with and without it.

    python benchmarks/pixels.py [--quick] [--json]

The photographs are crops of scikit-image's and matplotlib's sample photos, enlarged, with noise as of a sensor, saved
as JPEG of quality 90. The teacher is so small that decoding bounds its run. Each of the runs below is repeated, in
turns, and the median is told; the logits of every run must be equal to the bit. Without decode processes: decoding,
forward and writing share one core, so the ratio is of a core's work.
"""

import argparse
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from measuring import Figures, benchmark, of_turns, say
from PIL import Image

from kdcli.cache.reader import CacheReader
from kdcli.console import console
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.models.export import export_model
from kdcli.models.spec import open_model

PHOTOS = {"skimage": "data/*[a-z].[jp][pn]g", "matplotlib": "mpl-data/sample_data/grace_hopper.jpg"}
SIZE, SIDE, NETWORK, PATCH = (1500, 1000), 224, "test_vit", 56


def photos() -> list[Image.Image]:
    """Colour photographs of installed packages, larger than 200 pixels."""
    found = []
    for package, pattern in PHOTOS.items():
        spec = find_spec(package)
        assert spec is not None, f"{package} is not installed"
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.glob(pattern)):
            with Image.open(path) as image:
                if image.mode == "RGB" and min(image.size) > 200:
                    found.append(image.copy())
    return found


def write_images(folder: Path, count: int) -> int:
    """JPEGs of 1500 x 1000; their bytes in total."""
    folder.mkdir()
    sources, random, total = photos(), np.random.default_rng(0), 0
    for number in range(count):
        source = sources[number % len(sources)]
        share = random.uniform(0.6, 1.0)
        wide = share * min(source.width, source.height * 1.5)
        left = random.uniform(0, source.width - wide)
        top = random.uniform(0, source.height - wide / 1.5)
        box = (left, top, left + wide, top + wide / 1.5)
        pixels = np.asarray(source.resize(SIZE, Image.Resampling.BICUBIC, box), np.float32)
        noisy = np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(noisy).save(path, quality=90)
        total += path.stat().st_size
    return total


def run(root: Path, cache: str, teacher: str, keep: str) -> float:
    """Images a second of one run of cache-teachers in this process."""
    config = CacheConfig(
        data=str(root / "images"), cache=root / cache, teacher=(f"{teacher}=local-dir:{root / teacher}",),
        keep=tuple(keep.split(",")), workers=0, device="cpu",
    )  # fmt: skip
    rate = cache_teachers(config).images_per_second
    assert rate is not None
    return rate


def measure(count: int, repeats: int) -> Figures:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="kd-pixels-") as folder:
        root = Path(folder)
        size = write_images(root / "images", count)
        for seed in range(2):
            torch.manual_seed(seed)
            model = open_model(
                NETWORK, weights="random", num_classes=10, image_size=SIDE, arguments={"patch_size": PATCH}
            )
            export_model(model, root / f"t{seed}", None)
        rates: dict[str, list[float]] = {"decoded": [], "decoded, pixels kept": [], "read as kept": []}
        first: np.ndarray | None = None
        for number in range(repeats):
            names = (f"plain{number}.kd", f"kept{number}.kd")
            rates["decoded"].append(run(root, names[0], "t1", "logits"))
            rates["decoded, pixels kept"].append(run(root, names[1], "t0", "logits,pixels@eval"))
            rates["read as kept"].append(run(root, names[1], "t1", "logits"))
            for name in names:
                logits = CacheReader(root / name).gather("t1", "logits", np.arange(count))
                first = logits if first is None else first
                assert np.array_equal(first.view(np.uint16), logits.view(np.uint16)), name
        for name, values in rates.items():
            say(f"{name:22} {statistics.median(values):8.1f} images/s")
        say(f"{count} JPEGs of {size / count / 1e3:.0f} kB; a row of {SIDE * SIDE * 3 / 1e3:.1f} kB")
        ratios = [kept / plain for plain, kept in zip(rates["decoded"], rates["read as kept"], strict=True)]
        keeping = [
            kept / plain for plain, kept in zip(rates["decoded"], rates["decoded, pixels kept"], strict=True)
        ]
        what = f"a second teacher that reads kept pixels against decoding {count} JPEGs of 1500 x 1000"
        return {
            "kept_pixels_vs_decoding": of_turns(ratios, 5, "x images/s", what),
            "keeping_vs_decoding": of_turns(keeping, 0.95, "x images/s", "keeping pixels besides"),
        }


def figures(options: argparse.Namespace) -> Figures:
    """See the module."""
    torch.set_num_threads(1)
    console.quiet = True
    return measure(64, options.turns or 1) if options.quick else measure(512, options.turns or 5)


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))
