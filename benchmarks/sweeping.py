"""How long a sweep of four small students takes, against four lone runs.

Photographs as cameras make them (1600 x 1200 pixels, from scikit-image's) are decoded for students of 64 and 96
pixels: decoding takes most of the time, and a sweep does it once. Each ratio is of two neighbouring runs in one
process with the same loader; the value is the median over the turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from measuring import Figures, benchmark, of_turns, say
from PIL import Image

from kdcli.console import console
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student, train_students

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
WIDTH, HEIGHT = 1600, 1200
STUDENTS: dict[str, dict[str, Any]] = {
    "plain": {"method": "labels-only"},
    "equal": {"method": "distill-equal"},
    "hot": {"method": "distill-equal", "temperature": 4.0, "seed": 1},
    "large": {"method": "distill-equal", "image_size": 96, "lr": 3e-3},
}


def save_photos(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Random crops of photographs as JPEGs of ``size`` (width, height), one class a photograph."""
    random = np.random.default_rng(0)
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]
    for number in range(images):
        photo = photos[number % len(photos)]
        left, top = random.integers(0, photo.width // 3), random.integers(0, photo.height // 3)
        crop = photo.crop((left, top, left + photo.width // 2, top + photo.height // 2))
        own = folder / PHOTOS[number % len(photos)]
        own.mkdir(parents=True, exist_ok=True)
        crop.resize(size, Image.Resampling.BICUBIC).save(own / f"{number:05d}.jpg", quality=92)


def make_place(root: Path, images: int) -> None:
    """Photographs, and the cache of one small teacher."""
    save_photos(root / "photos", images, (WIDTH, HEIGHT))
    torch.manual_seed(0)
    export_model(
        open_model("test_resnet", weights="random", num_classes=4, image_size=64), root / "teacher", None
    )
    teacher = f"t=local-dir:{root / 'teacher'}"
    cache_teachers(CacheConfig(data=str(root / "photos"), cache=root / "c.kd", teacher=(teacher,), workers=1))


def configs(root: Path, out: Path, epochs: int) -> dict[str, StudentConfig]:
    fields: dict[str, Any] = {
        "data": str(root / "photos"), "cache": (root / "c.kd",), "student": "test_resnet", "image_size": 64,
        "epochs": epochs, "batch_size": 16, "workers": 1, "device": "cpu", "teacher_view": "eval",
    }  # fmt: skip
    return {name: StudentConfig(**{**fields, **own, "out": out / name}) for name, own in STUDENTS.items()}


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def figures(options: argparse.Namespace) -> Figures:
    """Time of the sweep as a share of that of the four runs."""
    console.quiet = True
    torch.set_num_threads(1)
    images, epochs, turns = (40, 1, 2) if options.quick else (192, 2, 5)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_place(root, images)
        for turn in range(options.turns or turns):
            together, alone = (configs(root, root / f"{kind}{turn}", epochs) for kind in ("sweep", "lone"))
            swept = seconds_of(lambda together=together: train_students(together))
            apart = seconds_of(lambda alone=alone: [train_student(config) for config in alone.values()])
            ratios.append(swept / apart)
            say(f"sweep {swept:.2f} s, four runs {apart:.2f} s")
    what = "a sweep of four small students against four lone runs, 1600 x 1200 JPEGs"
    return {"sweep_of_four_vs_four_runs": of_turns(ratios, 0.4, "x seconds", what, higher=False)}


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "pillow"))
