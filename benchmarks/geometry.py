"""Whether a cache holds what timm's own evaluation pipeline gives: real photos, every geometry, both precisions.

    python benchmarks/geometry.py [--quick] [--json]

Each network is saved by timm with a declared geometry, run by ``cache_teachers`` over more than 50 real images, a
third of them of odd shapes, and read back with zarr-python. Beside it runs the same network as timm would validate
it: ``create_model``, ``resolve_data_config``, ``create_transform``. Differences count in standard deviations of the
output (fp32), or in half steps of fp16, which is what storing a number may change (fp16). ``--quick`` takes one crop
and one filter.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch
import zarr
from measuring import Figures, benchmark, figure, say
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torchvision.transforms import functional as tv

from kdcli.demo.weights import export_pretrained_weights
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig

PHOTOS = {
    "foolbox": "data/imagenet_*.jpg",
    "skimage": "data/*[a-z].[jp][pn]g",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
    "sklearn": "datasets/images/*.jpg",
}
ODD = ((3, 1), (1, 4), (5, 2), (2, 3), (16, 9), (7, 8), (1, 1))
ARCHITECTURES = ("tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "no-classifier")
CROPS, FILTERS, SHAPES = (0.875, 0.95, 1.0), ("bicubic", "bilinear"), ((96, 96), (96, 128))
GEOMETRIES = ("center", "squash", "border", "whole", "shared")
ROUNDING = 1e-4
"""Of an output's standard deviation: what the order of additions may change in float32."""


@dataclass(frozen=True)
class Case:
    """A network with a declared geometry, and the option that a cache is made with."""

    architecture: str
    geometry: str
    crop: float
    filter: str
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.architecture}-{self.geometry}-{self.crop}-{self.filter}-{shape}".replace(".", "_")

    @property
    def option(self) -> str:
        return {"whole": "whole", "shared": f"shared:{self.crop}"}.get(self.geometry, "own")

    @property
    def output(self) -> str:
        return "features" if self.architecture == "no-classifier" else "logits"

    def network(self, weights: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        if self.architecture == "no-classifier":
            return timm.create_model("resnet10t", num_classes=0).eval()
        if self.architecture == "tf_efficientnet_lite0":
            return timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
        sized = {"img_size": self.shape} if "vit" in self.architecture else {}
        return timm.create_model(self.architecture, **sized).eval()

    def declare(self, network: torch.nn.Module) -> None:
        mode = self.geometry if self.geometry in ("center", "squash", "border") else "center"
        network.pretrained_cfg = dict(network.pretrained_cfg) | {
            "input_size": (3, *self.shape),
            "crop_pct": self.crop,
            "crop_mode": mode,
            "interpolation": self.filter,
            "fixed_input_size": False,
        }

    def see(self, network: torch.nn.Module, image: Image.Image) -> torch.Tensor:
        """The image as timm shows it; of a shared box, which timm does not have, as torchvision cuts it."""
        config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
        if self.geometry == "whole":
            config |= {"crop_mode": "squash", "crop_pct": 1.0}
        transform = create_transform(**config, is_training=False)
        if self.geometry != "shared":
            return transform(image)
        side = int(self.crop * min(image.size) + 0.5)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        mode = tv.InterpolationMode(self.filter)
        image = tv.resize(tv.crop(image, top, left, side, side), list(self.shape), mode)
        return tv.normalize(tv.to_tensor(image), config["mean"], config["std"])


def save_photos(folder: Path) -> list[Image.Image]:
    """Real images as RGB, then crops of them in odd shapes; saved without loss, in the order of their names."""
    images = []
    for package, pattern in PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            say(f"{package}'s images are left out: it is not installed")
            continue
        for file in sorted(Path(spec.origin).parent.glob(pattern)):
            image = Image.open(file)
            if image.mode in ("RGB", "L"):
                images.append(image.convert("RGB"))
    for number in range(0, len(images), 2):
        image, (wide, high) = images[number], ODD[number // 2 % len(ODD)]
        unit = min(image.width / wide, image.height / high)
        box = (
            number,
            number // 3,
            min(image.width, number + int(wide * unit)),
            number // 3 + int(high * unit),
        )
        images.append(image.crop((*box[:3], min(image.height, box[3]))))
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:03}.png")
    return images


def cases(quick: bool) -> Iterator[list[Case]]:
    """Those that one call of cache-teachers can run: the same geometry option, shape and outputs."""
    crops, filters = (CROPS[1:2], FILTERS[:1]) if quick else (CROPS, FILTERS)
    for geometry, shape, crop in product(GEOMETRIES, SHAPES, crops):
        for names in (ARCHITECTURES[:-1], ARCHITECTURES[-1:]):
            yield [Case(*each, shape) for each in product(names, (geometry,), (crop,), filters)]


@torch.inference_mode()
def by_timm(case: Case, network: torch.nn.Module, images: Sequence[Image.Image]) -> np.ndarray:
    batch = torch.stack([case.see(network, image) for image in images])
    return torch.cat([network(part) for part in batch.split(32)]).numpy()


def by_kd(case: Case, cache: Path) -> np.ndarray:
    group = zarr.open_group(cache / "data.zarr", mode="r")
    return np.asarray(group[f"teachers/{case.name}/{case.output}"])[:, 0]


def compare(group: list[Case], root: Path, images: list[Image.Image], found: dict[str, list[float]]) -> None:
    networks = {case: case.network(root / "lite0") for case in group}
    teachers = []
    for case, network in networks.items():
        case.declare(network)
        save_for_hf(network, str(root / case.name), safe_serialization=True)
        teachers.append(f"{case.name}=local-dir:{root / case.name}")
    expected = {case: by_timm(case, network, images) for case, network in networks.items()}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory(dir=root) as place:
            cache = Path(place) / "cache.kd"
            cache_teachers(
                CacheConfig(
                    data=str(root / "photos"),
                    cache=cache,
                    teacher=tuple(teachers),
                    keep=(group[0].output,),
                    dtype=dtype,
                    eval_geometry=group[0].option,
                    batch_size=32,
                    workers=0,
                    device="cpu",
                )
            )
            for case, right in expected.items():
                judge(case, by_kd(case, cache), right, dtype, found)


def judge(case: Case, kd: np.ndarray, right: np.ndarray, dtype: str, found: dict[str, list[float]]) -> None:
    difference, spread = np.abs(kd.astype(np.float64) - right), float(right.std())
    agree = float((kd.argmax(1) == right.astype(kd.dtype).argmax(1)).mean())
    found["top1"].append(agree)
    allowed = ROUNDING * spread
    if dtype == "float16":
        allowed += np.spacing(np.abs(right).astype(np.float16)).astype(np.float64) / 2
    worst = float((difference / allowed).max())
    found[dtype].append(worst)
    if agree < 1 or worst > 1:
        say(f"{case.name} {dtype}: top-1 equal {agree:.3f}, {worst:.2f} of the rounding allowed")


def figures(options: argparse.Namespace) -> Figures:
    """How far any case is from timm's pipeline."""
    found: dict[str, list[float]] = {"top1": [], "float32": [], "float16": []}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        images = save_photos(root / "photos")
        export_pretrained_weights(root / "lite0")
        for group in cases(options.quick):
            first = group[0]
            say(f"{first.option}, {first.geometry} {first.crop}, {first.shape}: {len(group)} networks")
            compare(group, root, images, found)
    every = f"in {len(found['top1'])} geometries x networks x precisions, {len(images)} images"
    return {
        "top1_equal": figure(
            min(found["top1"]), 1.0, "of images", f"least share whose top-1 is timm's, {every}"
        ),
        "fp32_difference": figure(
            max(found["float32"]),
            1.0,
            f"x {ROUNDING:g} of the spread",
            "largest difference of outputs",
            higher=False,
        ),
        "fp16_difference": figure(
            max(found["float16"]),
            1.0,
            "of what rounding allows",
            "largest difference of outputs",
            higher=False,
        ),
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))
