"""Folders of small clips, and networks to show them to."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from test_clips import write


def make_clips(root: Path, count: int = 8) -> Path:
    """Two classes, a split in four."""
    for number in range(count):
        split, name = ("train", "test")[number % 4 == 3], ("run", "walk")[number // 4 % 2]
        write(root / split / name / f"{number}.mkv", 5 + number % 4, number)
    return root


def make_weights(file: Path, name: str = "test_resnet", seed: int = 0) -> Path:
    """A network of images with random weights."""
    torch.manual_seed(seed)
    save_file(timm.create_model(name, num_classes=2).state_dict(), file)
    return file
