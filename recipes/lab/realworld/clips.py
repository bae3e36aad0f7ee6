"""Clips of actions: rendered ones of :mod:`lab.actions`, or drawn ones in their place."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from kdcli.files import make_folder, storage_errors
from lab.actions import WORLDS, render
from lab.realworld.shared import Room

_DRAWN = {"train": 6, "val": 3, "test": 3}  # clips of a class
_CLASSES = ("left", "right", "still")
_FRAMES, _SIDE = 4, 32


def prepare(room: Room, _: Path) -> dict[str, str]:
    """Write the clips that are not there yet.

    Raises:
        MissingExtraError: what renders them is not installed: nothing of such studies runs without.
        StorageError, NoSpaceError: the folder cannot be written.
    """
    worlds = room.images.worlds
    assert worlds is not None
    counts = room.settings.group("clips.of")
    for world in WORLDS:
        if room.tiny:
            _draw(worlds / world)
        else:
            render(worlds / world, world, counts)
    return {}


def _draw(folder: Path) -> None:
    """Folders of frames on which a square moves, as its class says."""
    with storage_errors(folder):
        for split, count in _DRAWN.items():
            for number, label in enumerate(_CLASSES):
                for clip in range(count):
                    place = folder / split / label / str(clip)
                    make_folder(place)
                    for frame, pixels in enumerate(_square(str(place.relative_to(folder.parent)), number)):
                        Image.fromarray(pixels).save(place / f"{frame}.png")


def _square(name: str, way: int) -> np.ndarray:
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    frames = random.integers(0, 60, (_FRAMES, _SIDE, _SIDE, 3), dtype=np.uint8)
    top, colour = random.integers(0, _SIDE - 8), random.integers(120, 256, 3)
    for frame in range(_FRAMES):
        left = 12 + (-3 * frame, 3 * frame, 0)[way]
        frames[frame, top : top + 8, left : left + 8] = colour
    return frames
