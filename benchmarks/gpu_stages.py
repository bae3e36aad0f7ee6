"""Stages of benchmarks/gpu.py that look at the machine, at waits, and at teachers."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_place import Place
from gpu_waits import Waits
from measuring import Figures, figure, processor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kdcli.cache.layout import load_manifest
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.extract.decoding import BatchRequest, Decoder, decoded_batches
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.runtime import worker_count
from kdcli.training.train import train_student

EVERY_KIND = ("logits", "topk:5", "features", "pixels@eval")
"""What is kept of a teacher where every kind is; its maps besides."""
TAPS = {"resnet": "layer4", "vit": "blocks.5"}


@dataclass
class Found:
    """What a stage found: values of any form for its line, and figures with goals."""

    values: dict[str, Any]
    figures: Figures


# --- 1: the machine -------------------------------------------------------------------------------


def context(place: Place) -> Found:
    """Versions, device, memory for workers, the disk, and how fast JPEGs are decoded."""
    values: dict[str, Any] = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "device": device_name(place), "driver": driver(), "processor": processor(), "processors": os.cpu_count(),
        "dev_shm_gb": shutil.disk_usage("/dev/shm").total / 1e9, "fsync_ms": fsync_ms(place.root),
    }  # fmt: skip
    start = time.perf_counter()
    photos = place.photos()
    values["photos_made_s"] = time.perf_counter() - start
    for workers in dict.fromkeys((1, worker_count(None) or 1)):
        values[f"decode_images_per_s_{workers}_workers"] = decode_rate(place, photos, workers)
    return Found(values, {})


def device_name(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.cuda else processor()


def driver() -> str | None:
    """The driver's version, where nvidia-smi tells it."""
    program = shutil.which("nvidia-smi")
    command = [program or "true", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def fsync_ms(folder: Path) -> float:
    """Median milliseconds to write a page and have it on the disk."""
    taken = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(20):
            start = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def decode_rate(place: Place, photos: Path, workers: int) -> float:
    """Images a second of kd's decode processes, after their first batch."""
    sample = place.root / "decode.kd"
    place.cached(sample, tuple(place.scale.teachers)[:1], data=str(photos), dry_run=False, shard="0/1000")
    manifest, data = load_manifest(sample), open_data(str(photos))
    render = Render.of(place.model(next(iter(place.scale.teachers))).preprocess)
    decoder = Decoder(data, ViewSet.from_document(manifest.view_set), manifest, [render])
    size, count = place.scale.batches[0], min(place.scale.jpegs, 1024 * workers)
    rows = [range(start, min(start + size, count)) for start in range(0, count, size)]
    batches = decoded_batches(
        decoder, [BatchRequest(n, 0, 0, each, 1) for n, each in enumerate(rows)], workers
    )
    next(batches)
    start = time.perf_counter()
    done = sum(len(decoded.request.rows) for decoded in batches)
    shutil.rmtree(sample)
    return done / (time.perf_counter() - start)


# --- 2: does it work, and how often does it wait --------------------------------------------------


def smoke(place: Place) -> Found:
    """What devices are known to lack, every kind of output at every precision, and waits a batch and a step."""
    works = {"pin_empty": attempt(pin_empty)}
    for amp in ("off", "fp16", "bf16"):
        for name in place.scale.teachers:
            works[f"{name}_{amp}"] = attempt(lambda name=name, amp=amp: every_kind(place, name, amp))
    works["topk"] = attempt(lambda: learn_from_topk(place))
    size = place.scale.batches[0]
    caching = waits_between(place, lambda images: fill(place, images), size)
    training = waits_between(place, lambda images: train(place, images), size)
    values = {"uint16": uint16(place), "works": works, "waits_a_cached_batch": caching.places,
              "waits_a_step": training.places}  # fmt: skip
    figures = {
        "waits_a_cached_batch": figure(
            caching.total, 1, "waits", "the main loop's, a cached batch", higher=False
        ),
        "waits_a_step": figure(training.total, 1, "waits", "the main loop's, a training step", higher=False),
    }
    broken = {name for name, text in works.items() if text != "ok"} - (set() if place.cuda else {"pin_empty"})
    figures["broken"] = figure(
        len(broken), 0, "of all", "what does not work: " + ", ".join(broken), higher=False
    )
    return Found(values, figures)


def attempt(work: Callable[[], object]) -> str:
    """``ok``, or what went wrong: the stage goes on."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "ok"


def uint16(place: Place) -> dict[str, str]:
    """Which operations on unsigned 16-bit integers, as class numbers of top-k are stored, the device has."""
    values = torch.arange(64).to(torch.uint16).reshape(8, 8).to(place.device)
    rows = torch.tensor([1, 3], device=place.device)
    return {
        "index": attempt(lambda: values[rows]),
        "index_select": attempt(lambda: values.index_select(0, rows)),
        "index_put": attempt(lambda: values.clone().index_put_((rows,), values[:2])),
        "to_int64": attempt(values.long),
    }


def pin_empty() -> None:
    """Pinning of batches of which some tensors are empty."""
    labels = torch.zeros(4, dtype=torch.int64)
    pinned = Batch(labels, labels, teacher={"t": {"logits": torch.empty(4, 0)}}).pin_memory()
    if not pinned.labels.is_pinned():
        raise RuntimeError("a batch's labels are not pinned")


def every_kind(place: Place, name: str, amp: str) -> None:
    """Cache all that can be kept of a teacher."""
    cache, keep = place.root / f"kinds-{name}-{amp}.kd", (*EVERY_KIND, f"maps:{TAPS[name]}")
    place.cached(cache, (name,), data=place.memory(64), keep=keep, amp=amp, batch_size=16)


def learn_from_topk(place: Place) -> None:
    """A step in two pieces, and one with outputs held on the device: both index class numbers of 16 bits."""
    cache, images, name = place.root / "topk.kd", place.memory(64), next(iter(place.scale.teachers))
    place.cached(cache, (name,), data=images, keep=("topk:5",), batch_size=16)
    for number, fields in enumerate(({"accumulate": 2}, {"resident": resident(place)})):
        own = {
            "data": images,
            "cache": (cache,),
            "epochs": 1,
            "batch_size": 32,
            "workers": 0,
            "top_classes": 5,
        }
        train_student(place.student(place.root / f"topk-{number}", "topk-kl", **own, **fields))


def resident(place: Place) -> str:
    """Where --resident holds outputs: beside the student, which on a CPU is in memory."""
    return "gpu" if place.cuda else "ram"


def fill(place: Place, images: int) -> None:
    names = tuple(place.scale.teachers)[:1]
    place.cached(place.root / f"waits{images}.kd", names, data=place.memory(images), block_rows=4096)


def train(place: Place, images: int) -> None:
    own = {"epochs": 1, "batch_size": place.scale.batches[0], "cache": (place.root / f"waits{images}.kd",)}
    out = place.root / f"waits{images}"
    train_student(place.student(out, "distill-equal", data=place.memory(images), **own))


def waits_between(place: Place, work: Callable[[int], None], size: int) -> Waits:
    """What eight batches more wait for, each: beginning and end of a run cancel out."""
    counts = []
    for batches in (4, 12):
        with Waits.counted(place.cuda) as counted:
            work(batches * size)
        counts.append(counted)
    return (counts[1] - counts[0]).each(8)


# --- 3: CPU and device ----------------------------------------------------------------------------

TOLERANCE = {"off": 1e-4, "tf32": 3e-3, "bf16": 6e-2}
"""Largest difference as a share of the largest absolute value of a row."""


def against_cpu(place: Place) -> Found:
    """Logits, features, logsumexp and log-probabilities of the same images on the CPU and on the device."""
    figures: Figures = {}
    pixels = place.pixels(place.scale.compared)
    for name in place.scale.teachers:
        expected = derived(place, name, pixels, "off", "cpu")
        for setting, goal in TOLERANCE.items():
            found = derived(place, name, pixels, setting, place.device)
            for array, values in expected.items():
                worst = difference(found[array], values)
                what = f"{array} of {place.scale.teachers[name]} against the CPU's"
                figures[f"{name}_{array}_{setting}"] = figure(worst, goal, "of the row", what, higher=False)
    return Found({"images": len(pixels)}, figures)


def derived(
    place: Place, name: str, pixels: torch.Tensor, amp: str, device: str
) -> dict[str, np.ndarray[Any, Any]]:
    """What a cache in float32 would keep of a teacher, by array."""
    runner, plan = place.runner(name, amp, device), place.plan(name, "float32")
    labels = np.arange(len(pixels)) % 10
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for part, own in zip(pixels.split(64), np.split(labels, range(64, len(labels), 64)), strict=True):
        for arrays in plan.derive(runner(part), own).values():
            for array, values in arrays.items():
                found.setdefault(array, []).append(values)
    return {array: np.concatenate(values) for array, values in found.items()}


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest difference in any row, as a share of the row's largest absolute value."""
    rows = [values.astype(np.float64).reshape(len(values), -1) for values in (found, expected)]
    return float((np.abs(rows[0] - rows[1]).max(axis=1) / np.abs(rows[1]).max(axis=1)).max())


# --- 4: the forward -------------------------------------------------------------------------------


def forward(place: Place) -> Found:
    """F, the bare forward; what is left of it with normalising and deriving; and how busy the device is."""
    values: dict[str, Any] = {}
    figures: Figures = {}
    large, amp = place.scale.batches[1], place.best_amp
    for name in place.scale.teachers:
        for batch in place.scale.batches:
            for setting in ("off", amp):
                bare, ours = place.bare(name, batch, setting), derive_rate(place, name, batch, setting)
                values[f"{name}_{batch}_{setting}"] = {"F": bare, "teacher_and_derive": ours}
                if setting == amp:
                    what = f"{place.scale.teachers[name]}, {setting}: teacher and derive against F, {batch} images"
                    figures[f"{name}_{batch}_derive_vs_F"] = figure(ours / bare, 0.97, "x images/s", what)
        values[f"{name}_{large}_tf32"] = {"F": place.bare(name, large, "tf32")}
        share = busy_share(place, name)
        what = f"{place.scale.teachers[name]}, {amp}: share of cache-teachers in which the device computes"
        figures[f"{name}_busy"] = figure(share, 0.99, "of the time", what)
    first = next(iter(place.scale.teachers))
    values[f"{first}_{large}_{amp}_compile"] = attempt_rate(
        lambda: place.bare(first, large, f"{amp}+compile")
    )
    return Found(values, figures)


def attempt_rate(rate: Callable[[], float]) -> float | str:
    """Images a second, or why there are none."""
    found: list[float] = []
    told = attempt(lambda: found.append(rate()))
    return found[0] if found else told


def derive_rate(place: Place, name: str, batch: int, amp: str) -> float:
    """Images a second of a teacher and of what is kept of it, launched as cache-teachers does, on the device."""
    runner, plan = place.runner(name, amp), place.plan(name)
    pixels, labels = (
        place.pixels(batch).to(place.device),
        torch.zeros(batch, dtype=torch.int64).to(place.device),
    )
    columns = plan.columns_on(place.device)
    return place.rate_of(lambda: plan.launch(runner(pixels), labels, columns), batch)


def busy_share(place: Place, name: str) -> float:
    """Share of the time in which the device computes, from the first to the last kernel of cache-teachers."""
    wanted = DeviceType.CUDA if place.cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.cuda else [])]
    images = place.memory(32 * place.scale.batches[0])
    with removed(place.root / "busy.kd") as cache, profile(activities=activities) as found:
        place.cached(cache, (name,), data=images)
        place.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == wanted
    )
    busy = sum(stop - start for start, stop in united(spans))
    return float(busy / (max(stop for _, stop in spans) - spans[0][0]))


def united(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Spans, sorted by their start, with those that overlap made one."""
    start, stop = spans[0]
    for begin, end in spans:
        if begin > stop:
            yield start, stop
            start, stop = begin, end
        stop = max(stop, end)
    yield start, stop


# --- 5: caching -----------------------------------------------------------------------------------


def caching(place: Place) -> Found:
    """Images a second of cache-teachers against F: in memory, with training views, from JPEGs, two teachers."""
    values: dict[str, Any] = {}
    figures: Figures = {}
    names, batch, amp = tuple(place.scale.teachers), place.scale.batches[0], place.best_amp
    speed = {name: place.bare(name, batch, amp) for name in names}
    both = 1 / sum(1 / rate for rate in speed.values())
    first = names[0]
    cases: dict[str, tuple[tuple[str, ...], float, dict[str, Any]]] = {
        **{f"{name}_in_memory": ((name,), speed[name], {}) for name in names},
        "one_and_four_views": (
            (first,),
            speed[first],
            {"views": "eval+train:4", "data": place.memory(views(place))},
        ),
        "jpegs": ((first,), speed[first], {"data": str(place.photos())}),
        "two_teachers": (names, both, {}),
    }
    for case, (teachers, bound, fields) in cases.items():
        with removed(place.root / f"{case}.kd") as cache:
            rate = place.cached(cache, teachers, **fields)
        values[case] = {"images_per_s": rate, "F": bound, "share": rate / bound}
        if case.endswith("in_memory"):
            what = f"cache-teachers on images in memory against F, {batch} a batch, {amp}"
            figures[f"{case}_vs_F"] = figure(rate / bound, 0.95, "x images/s", what)
    return Found(values, figures)


def views(place: Place) -> int:
    """Images of the run with five views: a quarter, so that it takes as long as the others."""
    return place.scale.images // 4


@contextmanager
def removed(path: Path) -> Iterator[Path]:
    """A place that is empty again afterwards."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
