"""A real cache in a second, for tests of its readers: small pictures and two tiny networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model

ARCHITECTURES = {"big": "resnet10t", "small": "mobilenetv3_small_050"}


def write_images(folder: Path, counts: Mapping[str, int], seed: int = 0, prefix: str = "") -> Path:
    """A folder of PNGs, one subfolder per class; each class has its own colour and much noise."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        colour = np.random.default_rng(number).uniform(40, 215, 3)
        for index in range(count):
            pixels = np.clip(rng.normal(colour, 60, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{prefix}{index:02d}.png")
    return folder


def write_teachers(folder: Path) -> dict[str, str]:
    """Random tiny networks as ``local-dir:`` models; their specs by name."""
    for seed, (name, architecture) in enumerate(ARCHITECTURES.items()):
        torch.manual_seed(seed)
        model = open_model(architecture, weights="random", num_classes=7, image_size=32)
        export_model(model, folder / name, [f"{name}{index}" for index in range(7)])
    return {name: f"local-dir:{folder / name}" for name in ARCHITECTURES}


def write_cache(path: Path, data: str, teachers: Mapping[str, str], **options: Any) -> Path:
    """Run the teachers over ``data`` in this process."""
    arguments = tuple(f"{name}={spec}" for name, spec in teachers.items())
    cache_teachers(CacheConfig(data=data, cache=path, teacher=arguments, workers=0, **options))
    return path
