"""Clips: how fast they are decoded, what bounds a cache of them, and an epoch on it against labels alone.

Videos (H.264, 320 x 240, 120 frames of moving photographs with noise) by one process. Decoding is kd's way to the
pixels of one view of 16 frames; beside it, in turns, the same by PyAV with every frame turned into RGB, as
torchvision's ``read_video`` did. Times are the processor's. The student is a resnet10t over 8 frames of 64 pixels, its
teacher a cached resnet18. Each value is the median over the turns, of ratios within one turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measuring import Figures, benchmark, of_turns, say
from skimage import data as photographs

from kdcli.console import console
from kdcli.data.clips import moments, open_clip
from kdcli.data.drawing import show
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.geometry import Render
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

WIDTH, HEIGHT, LENGTH, SHOWN = 320, 240, 120, 16
TEACHER, STUDENT, SIZE = "resnet18", "resnet10t", "8x64x64"


def save_videos(root: Path, count: int) -> None:
    """Crops that move over photographs, in four classes."""
    random, names = np.random.default_rng(0), ("astronaut", "chelsea", "coffee", "rocket")
    for number in range(count):
        name = names[number % len(names)]
        photo = np.tile(getattr(photographs, name)(), (2, 2, 1))
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            top, left = random.integers(0, 200, 2).tolist()
            for place in range(LENGTH):
                seen = photo[top + place : top + place + HEIGHT, left + 2 * place : left + 2 * place + WIDTH]
                noisy = np.clip(seen.astype(int) + random.integers(-6, 7, seen.shape), 0, 255)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy.astype(np.uint8), "rgb24")))
            container.mux(stream.encode(None))


def make_place(root: Path, videos: int) -> None:
    """Videos, a teacher of frames, and what it says about one training view of each."""
    save_videos(root / "videos", videos)
    torch.manual_seed(0)
    export_model(open_model(TEACHER, weights="random", num_classes=4, image_size=64), root / "teacher", None)
    cache_teachers(
        CacheConfig(
            data=f"video/{root}/videos", cache=root / "c.kd", views="eval+train:1", workers=0, batch_size=8,
            teacher=(f"a=frames:local-dir:{root}/teacher[size={SIZE}]",),
        )
    )  # fmt: skip


def by_kd(encoded: bytes) -> None:
    """View 0 of 16 frames at 112 pixels."""
    show(open_clip(encoded, "a video"), Render((SHOWN, 112, 112), "bilinear"))


def by_pyav(encoded: bytes) -> None:
    """The same, by turning all frames into RGB first."""
    with av.open(BytesIO(encoded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_image() for frame in container.decode(video=0)]
    for place in moments(0, len(frames), SHOWN):
        show(frames[place], Render((112, 112), "bilinear"))


def alone(encoded: bytes) -> None:
    """Decoding, and nothing else."""
    with av.open(BytesIO(encoded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def seconds(work: Callable[[bytes], None], videos: list[bytes]) -> float:
    """Of the processor, a video."""
    start = time.process_time()
    for encoded in videos:
        work(encoded)
    return (time.process_time() - start) / len(videos)


def forward_seconds(network: str, size: tuple[int, int, int]) -> float:
    """Of the processor, for a clip through a network of clips; in batches of 4."""
    torch.manual_seed(0)
    model = open_model(network, weights="random", num_classes=4, image_size=size)
    runner = TeacherRunner(model, "cpu", "off", (Output("logits"),))
    pixels = np.zeros((4, *size, 3), np.uint8)
    runner(pixels)
    start = time.process_time()
    runner(pixels)
    return (time.process_time() - start) / len(pixels)


def epoch(root: Path, out: Path, **own: Any) -> float:
    """Of the processor, for an epoch after a run's first, in the median: from its first batch to the next one's."""
    config = StudentConfig(
        data=f"video/{root}/videos", student=f"frames:{STUDENT}[size={SIZE}]", epochs=5, batch_size=8, workers=0,
        init="random", device="cpu", lr=1e-3, out=out, **own,
    )  # fmt: skip
    times: list[float] = []
    history = train_student(config, on_batch=lambda _: times.append(time.process_time())).history
    firsts = times[:: len(times) // len(history)]
    return statistics.median(after - before for before, after in pairwise(firsts[1:]))


def turn(root: Path, out: Path, videos: list[bytes], backwards: bool) -> dict[str, float]:
    cached = {"cache": (root / "c.kd",), "method": "kd", "teacher_view": "same"}
    todo: dict[str, Callable[[], float]] = {
        "kd": lambda: seconds(by_kd, videos),
        "pyav": lambda: seconds(by_pyav, videos),
        "decode": lambda: seconds(alone, videos),
        "labels": lambda: epoch(root, out / "labels", method="labels-only", recipe="imagenet"),
        "cached": lambda: epoch(root, out / "cached", **cached),
        "mc3": lambda: forward_seconds("torchvision/mc3_18", (SHOWN, 112, 112)),
        "frames": lambda: forward_seconds("frames:resnet18", (8, 224, 224)),
    }
    found = {name: todo[name]() for name in (reversed(todo) if backwards else todo)}
    say(", ".join(f"{name} {value:.4f}" for name, value in found.items()) + " s")
    return {
        "clip_frames_per_second_core": LENGTH / found["kd"],
        "clip_view_vs_all_frames_rgb": found["pyav"] / found["kd"],
        "clip_decode_share_of_view": found["decode"] / found["kd"],
        "clip_view_vs_mc3_18": found["kd"] / found["mc3"],
        "clip_view_vs_frames_resnet18": found["kd"] / found["frames"],
        "clip_epoch_vs_labels_only": found["cached"] / found["labels"],
    }


SAYS = {
    "clip_frames_per_second_core": (500, "frames/s", "decoded on the way to one view of 16 frames", True),
    "clip_view_vs_all_frames_rgb": (1, "x faster", "than PyAV with all frames turned into RGB", True),
    "clip_decode_share_of_view": (1, "of a view", "is spent in the decoder: that bounds it", False),
    "clip_view_vs_mc3_18": (1, "of a forward", "a view costs, of mc3_18 on the same core", False),
    "clip_view_vs_frames_resnet18": (
        1,
        "of a forward",
        "a view costs, of frames:resnet18, 8 frames of 224",
        False,
    ),
    "clip_epoch_vs_labels_only": (
        1.03,
        "x seconds",
        "an epoch with a cached teacher against labels only",
        False,
    ),
}
"""Goal, unit, meaning, and whether more is better."""


def figures(options: argparse.Namespace) -> Figures:
    """All of it."""
    console.quiet = True
    torch.set_num_threads(1)
    count, turns = (16, 1) if options.quick else (32, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_place(root, count)
        videos = [file.read_bytes() for file in sorted((root / "videos").rglob("*.mp4"))][:16]
        found = [turn(root, root / f"turn{n}", videos, n % 2 == 1) for n in range(options.turns or turns)]
    return {
        name: of_turns([each[name] for each in found], goal, unit, what, higher=higher)
        for name, (goal, unit, what, higher) in SAYS.items()
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm", "av", "pillow"))
