"""What benchmarks/gpu.py measures on: images in files and in memory, networks with random weights."""

import functools
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcli.data.base import (
    ImageSource,
    Listing,
    Opening,
    SourceKind,
    numbered_listing,
    pick_task,
    split_and_row,
)
from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.extract.outputs import OutputPlan, plan_outputs
from kdcli.models.export import export_model
from kdcli.models.spec import Model, open_model
from kdcli.models.teacher import TeacherRunner, normalise
from kdcli.outputs import parse_keep
from kdcli.training.config import StudentConfig

CLASSES = 1000
"""Of the data, and of the teachers."""
DISTINCT = 256
"""Different images; all others repeat them under other names."""
KEEP = ("logits", "features")
TEMPERATURES = (1.0, 2.0, 4.0, 5.0)
DTYPES = {"off": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        teachers: architectures, by the names that the caches know them by.
        student: architecture.
        side: input of all networks in pixels; images in memory are 8/7 of it, as a crop of .875 wants.
        jpegs, jpeg_size: image files, and their width and height.
        images: in memory.
        batches: of a forward.
        compared: images that CPU and device both compute.
        seconds: that one rate is measured.
        share: of the seconds that the stages are given on a GPU.
    """

    teachers: dict[str, str]
    student: str
    side: int
    jpegs: int
    jpeg_size: tuple[int, int]
    images: int
    batches: tuple[int, int]
    compared: int
    seconds: float
    share: float


FULL = Scale(
    {"resnet": "resnet50", "vit": "vit_base_patch16_224"}, "resnet18", 224, 8192, (500, 375), 16384, (64, 256),
    256, 1.5, 1.0,
)  # fmt: skip
SMALL = Scale(
    {"resnet": "test_resnet", "vit": "test_vit"}, "test_resnet", 32, 64, (100, 75), 128, (8, 16),
    16, 0.05, 0.5,
)  # fmt: skip


# --- images in memory -----------------------------------------------------------------------------


@functools.cache
def table(side: int) -> np.ndarray:
    """[DISTINCT, side, side, 3] uint8 that stay in memory: smooth shapes, and noise as of a sensor."""
    random = np.random.default_rng(0)
    rough = random.integers(0, 256, (DISTINCT, 8, 8, 3), dtype=np.uint8)
    smooth = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in rough]
    noise = random.integers(-8, 9, (side, side, 3), dtype=np.int16)
    return np.stack([(np.asarray(each, np.int16) + noise).clip(0, 255).astype(np.uint8) for each in smooth])


class Memory(ImageSource):
    """COUNT images of SIDE pixels; the bytes of each are its pixels."""

    def __init__(self, count: int, side: int) -> None:
        self._count, self._side = count, side
        table(side)  # before decode processes are forked: all share it

    @property
    def text(self) -> str:
        return f"gpu_place:MEMORY/{self._count}x{self._side}"

    def listing(self, split: str | None, task: str | None) -> Listing:
        pick_task(task, ("class",), self.text)
        rows = np.arange(self._count)
        names = tuple(f"c{number:04d}" for number in range(CLASSES))
        return numbered_listing({"train": rows}, {"train": rows % CLASSES}, split, names, self.text)

    def encoded(self, key: str) -> bytes:
        return table(self._side)[split_and_row(key)[1] % DISTINCT].tobytes()

    def size(self, key: str) -> int:
        return self._side**2 * 3

    def decode(self, key: str, encoded: bytes) -> Image.Image:
        return Image.frombytes("RGB", (self._side, self._side), encoded)


def open_memory(opening: Opening) -> Memory:
    count, _, side = opening.rest.partition("x")
    return Memory(int(count), int(side))


MEMORY = SourceKind("images in memory: COUNTxSIDE", open_memory)


# --- the place ------------------------------------------------------------------------------------


@dataclass
class Place:
    """A folder with all of it, each part made when it is first asked for.

    Attributes:
        root: the folder.
        device: cpu or cuda.
        scale: how large everything is.
        deadline: value of ``time.monotonic`` after which nothing more is begun.
        rates: bare forwards that were measured: images a second by (teacher, batch, setting).
    """

    root: Path
    device: str
    scale: Scale
    deadline: float
    rates: dict[tuple[str, int, str], float] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()

    @property
    def best_amp(self) -> str:
        """The precision that rates are measured in."""
        return "bf16"

    def memory(self, images: int | None = None) -> str:
        """Data text of the images in memory."""
        return f"gpu_place:MEMORY/{images or self.scale.images}x{self.scale.side * 8 // 7}"

    def photos(self) -> Path:
        """A folder of JPEGs in class folders."""
        folder = self.root / "photos"
        if folder.exists():
            return folder
        width, height = self.scale.jpeg_size
        crops = [Image.fromarray(each).resize((width, height)) for each in table(256)]

        def encode(image: Image.Image) -> bytes:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90)
            return file.getvalue()

        with ThreadPoolExecutor() as pool:
            files = list(pool.map(encode, crops))
        for number in range(self.scale.jpegs):
            place = folder / f"c{number % CLASSES:04d}" / f"{number:05d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(files[number % DISTINCT])
        return folder

    def teacher(self, name: str) -> str:
        """``NAME=SPEC`` of a teacher with random weights."""
        folder = self.root / name
        if not folder.exists():
            torch.manual_seed(0)
            model = open_model(self.scale.teachers[name], weights="random", image_size=self.scale.side)
            export_model(model, folder, None)
        return f"{name}=local-dir:{folder}"

    def model(self, name: str) -> Model:
        return open_model(self.teacher(name).partition("=")[2])

    def runner(self, name: str, amp: str, device: str | None = None) -> TeacherRunner:
        return TeacherRunner(self.model(name), device or self.device, amp, parse_keep(KEEP))  # type: ignore[arg-type]

    def plan(self, name: str, dtype: str = "float16") -> OutputPlan:
        """What is kept of a teacher, its log-probability of the label included."""
        model = self.model(name)
        classes = tuple(str(number) for number in range(model.num_classes))
        return plan_outputs(name, model, parse_keep(KEEP), dtype, TEMPERATURES, classes)

    def pixels(self, count: int) -> torch.Tensor:
        """[count, side, side, 3] uint8 on the CPU."""
        rows = np.arange(count) % DISTINCT
        return torch.from_numpy(table(self.scale.side)[rows])

    # --- steps ---

    def cached(self, cache: Path, names: tuple[str, ...], **fields: Any) -> float:
        """Fill a cache; images (times views) a second."""
        own: dict[str, Any] = {
            "data": self.memory(), "teacher": tuple(self.teacher(name) for name in names), "keep": KEEP,
            "batch_size": self.scale.batches[0], "device": self.device, "amp": self.best_amp,
        }  # fmt: skip
        rate = cache_teachers(CacheConfig(**{**own, "cache": cache, **fields})).images_per_second
        assert rate is not None
        return rate

    @functools.cached_property
    def cache(self) -> Path:
        """The outputs of the first teacher for the images in memory."""
        path = self.root / "students.kd"
        self.cached(path, tuple(self.scale.teachers)[:1])
        return path

    def student(self, out: Path, method: str, **fields: Any) -> StudentConfig:
        own: dict[str, Any] = {
            "data": self.memory(), "student": self.scale.student, "image_size": self.scale.side,
            "batch_size": self.scale.batches[1], "device": self.device, "amp": self.best_amp, "out": out,
            "method": method,
        }  # fmt: skip
        return StudentConfig(**{**own, **fields})

    # --- the bare forward ---

    def rate_of(self, work: Callable[[], object], images: int) -> float:
        """Images a second of something that is done again and again, the device never waited for in between."""
        for _ in range(3):
            work()
        self.synchronize()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < self.scale.seconds:
            for _ in range(4):
                work()
            done += 4 * images
            self.synchronize()
        return done / (time.perf_counter() - start)

    def bare(self, name: str, batch: int, setting: str) -> float:
        """F: images a second of the network alone, on normalised images that are on the device already.

        With bf16 and fp16 weights and images are cast before: nothing that a precision needs is left to do.

        Args:
            name: the teacher.
            batch: images a forward.
            setting: off, tf32, bf16 or fp16; ``+compile`` behind it.
        """
        key = (name, batch, setting)
        if key not in self.rates:
            self.rates[key] = self._measure(*key)
        return self.rates[key]

    def _measure(self, name: str, batch: int, setting: str) -> float:
        precision, _, compiled = setting.partition("+")
        model = self.model(name)
        number = DTYPES[precision]
        network = model.network.eval().to(self.device, number).to(memory_format=torch.channels_last)
        forward: Callable[..., Any] = functools.partial(network.outputs, names=list(KEEP))
        if compiled:
            forward = torch.compile(forward)
        pixels = self.pixels(batch).to(self.device)
        with tf32(precision == "tf32"), torch.inference_mode():
            images = normalise(pixels, model.preprocess).to(number)
            return self.rate_of(lambda: forward(images), batch)


@contextmanager
def tf32(on: bool):  # type: ignore[no-untyped-def]
    """TF32 in matrix products and convolutions, or in neither."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
