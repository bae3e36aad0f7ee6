"""How many images go through a teacher at once: what is asked for, and what the memory of the device takes."""

import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from kdcli.console import console
from kdcli.errors import DeviceError
from kdcli.extract.config import DEFAULT_BATCH, CacheConfig
from kdcli.extract.lanes import Lanes
from kdcli.models.compiling import require_compiler
from kdcli.outputs import PIXELS
from kdcli.runtime import pick_device

if TYPE_CHECKING:
    from kdcli.cache.provenance import TeacherRecord
    from kdcli.extract.teachers import Teacher
    from kdcli.extract.worker import Worker

FULL = 256
"""Images in a forward that fill a card; on a processor :data:`DEFAULT_BATCH` do."""


def as_they_fit(
    teachers: Mapping[str, "Teacher"], config: CacheConfig, held: Mapping[str, "TeacherRecord"], views: int
) -> "dict[str, Teacher]":
    """The teachers with the settings of their forwards: recorded ones where there are any, else those that fit.

    On a card, and on whatever device with ``--batch-size auto``, that is tried, before anything is recorded. All
    teachers that are new share one batch size, so that their images are decoded once.

    Args:
        teachers: opened, each with the settings asked for.
        config: what was asked for.
        held: what the cache has recorded of teachers.
        views: of the cache.

    Raises:
        DeviceError: the batch size that was asked for does not fit, and it names one that does; torch.compile does not
            work here.
    """
    found = dict(teachers)
    for name in teachers.keys() & held.keys():
        found[name] = _computing(found[name], dict(held[name].compute))
    device, asked = pick_device(config.device), config.batch_size
    new = [name for name in teachers if name not in held and _runs(teachers[name])]
    if new and config.compile:
        require_compiler(device)  # before anything is recorded that could not go on
    if not new or (device == "cpu" and asked != "auto"):
        return found
    most = _most(device, asked, views)
    room = min(fitting(_worker(teachers[name], device), most) for name in new)
    if room < (1 if asked == "auto" else asked):
        raise DeviceError(
            f"{asked} images of {', '.join(new)} at once do not fit into the memory of {device}",
            _fits(room, "--batch-size"),
        )
    rows = asked if asked != "auto" else room if views == 1 else min(room, DEFAULT_BATCH)
    folded = 1 if views == 1 else max(1, room // rows)
    settings = {"batch_size": rows, **({"views_per_forward": folded} if folded > 1 else {})}
    if asked == "auto":
        console.note(f"--batch-size auto: {rows} images" + (f" x {folded} views" if folded > 1 else ""))
    for name in new:
        found[name] = _computing(found[name], {**found[name].record.compute, **settings})
    return found


def _most(device: str, asked: int | Literal["auto"], views: int) -> int:
    """Images that a forward has at most: of a card at least :data:`FULL`, if views beside each other make so many."""
    full = DEFAULT_BATCH if device == "cpu" else FULL
    if asked == "auto":
        return full
    return asked * max(1, min(views - 1, full // asked))


def _runs(teacher: "Teacher") -> bool:
    return any(output.kind != PIXELS for output in teacher.plan.outputs)


def _computing(teacher: "Teacher", compute: dict[str, Any]) -> "Teacher":
    return replace(teacher, record=teacher.record.model_copy(update={"compute": compute}))


def _worker(teacher: "Teacher", device: str) -> "Worker":
    from kdcli.extract.worker import Worker

    # Compiling takes minutes, and less memory.
    return Worker.of(teacher, {**teacher.record.compute, "compile": False}, device)


def fitting(worker: "Worker", most: int) -> int:
    """The largest of ``most``, its half, its quarter, ... images that a device takes at once; 0: not even one.

    Raises:
        DeviceError: it fails otherwise than by its memory.
    """
    size = most
    while size:
        try:
            _try(worker, size)
        except DeviceError as error:
            if not _is_of_memory(error):
                raise
            size //= 2
        else:
            return size
    return 0


def _try(worker: "Worker", size: int) -> None:
    """As in a run, where the outputs of a batch are on their way down while the next one is computed."""
    lanes, kinds = (
        Lanes(worker.device),
        [output.name for output in worker.plan.outputs if output.kind != PIXELS],
    )
    pixels = torch.zeros((1, size, *worker.render.drawn(True), 3), dtype=torch.uint8)
    labels = torch.zeros(size, dtype=torch.int64)
    flights = []
    for _ in range(2):
        there = lanes.up(pixels), lanes.up(labels)
        lanes.arrive()
        derived, _ = worker.launch(*there, kinds)
        flights.append((there, derived, lanes.down([derived])))
    for *_, (_, event) in flights:
        event.synchronize()


def with_what_fits(error: DeviceError, workers: Mapping[str, "Worker"]) -> DeviceError:
    """An error of memory in the middle of a run, with the batch size that fits now; any other as it is."""
    if not _is_of_memory(error):
        return error
    room = min(fitting(worker, worker.batch_size * worker.views_per_forward) for worker in workers.values())
    return DeviceError(
        error.message,
        "Others may be using its memory (nvidia-smi): the same command goes on when it is free. "
        + _fits(room, "The batch size is recorded; of a new cache: --batch-size"),
    )


def _is_of_memory(error: DeviceError) -> bool:
    """Whether it is of memory; what the frames of the forward that failed have made is let go then."""
    if error.__cause__ is None or not error.message.startswith("out of memory"):
        return False
    traceback.clear_frames(error.__cause__.__traceback__)
    return True


def _fits(room: int, words: str) -> str:
    if not room:
        return "Not even one image fits: use a larger device, or --device cpu."
    return f"{words} {room} fits now, or auto finds it; --amp bf16 takes half the memory."
