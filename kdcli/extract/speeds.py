"""How fast decoding, forward and writing are here, each alone, and so what a run will be bound by."""

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from kdcli.cache.layout import Manifest
from kdcli.console import console, duration
from kdcli.data.kept_pixels import KeptPixels
from kdcli.extract.collecting import BATCHES as ON_DEVICE
from kdcli.extract.decoding import BatchRequest, Decoded, Decoder, decoded_batches
from kdcli.extract.lanes import Lanes
from kdcli.extract.publishing import WRITERS
from kdcli.files import storage_errors
from kdcli.outputs import PIXELS
from kdcli.runtime import worker_count

if TYPE_CHECKING:
    from kdcli.extract.prepare import Prepared
    from kdcli.extract.worker import Worker

BATCHES = 20
"""Batches that a measurement runs, after one to warm up."""
WRITE_BYTES = 256 * 2**20
"""Bytes that a measurement writes (and removes again), at most."""


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """Speeds on this machine, in image views a second unless said otherwise.

    Attributes:
        decode: of the decode processes alone.
        forward: of each teacher alone.
        write_mb: MB/s of files of a chunk's size, written and fsynced.
        write: the same in image views a second.
        bound: the slowest of decode, forward and write.
        hours: for all that is missing, if the three overlap perfectly.
    """

    decode: float
    forward: dict[str, float]
    write_mb: float
    write: float
    bound: str
    hours: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "decode_per_second": round(self.decode, 2),
            "forward_per_second": {name: round(rate, 2) for name, rate in self.forward.items()},
            "write_mb_per_second": round(self.write_mb, 1),
            "write_per_second": round(self.write, 2),
            "bound": self.bound,
            "hours": round(self.hours, 4),
        }


def measure(
    prepared: "Prepared", workers: Mapping[str, "Worker"], kept: KeptPixels | None, missing: tuple[int, int]
) -> Measured:
    """Run a few batches of each stage alone, and a temporary write.

    Args:
        prepared: images, views and cache, made or planned; a temporary file is written where it lies.
        workers: the teachers that have something to do.
        kept: pixels that need no decoding, if any.
        missing: image views, and bytes, that are not written yet.
    """
    images, bytes_missing = missing
    batches, decode = _decode_rate(prepared, workers, kept)
    forward = {name: _forward_rate(worker, prepared.manifest, batches) for name, worker in workers.items()}
    place = next(
        folder for folder in (prepared.root.absolute(), *prepared.root.absolute().parents) if folder.is_dir()
    )
    write_mb = _write_speed(place, bytes_missing)
    per_image = bytes_missing / max(1, images)
    together = 1 / sum(1 / rate for rate in forward.values()) if forward else float("inf")
    rates = {"decode": decode, "forward": together, "write": write_mb * 1e6 / max(1.0, per_image)}
    bound = min(rates, key=lambda name: rates[name])
    hours = images / rates[bound] / 3600
    console.note(f"measured: {bound}-bound, about {duration(hours * 3600)} for {images} image views")
    return Measured(decode, forward, write_mb, rates["write"], bound, hours)


def _requests(manifest: Manifest, batch_size: int, known: bool) -> Iterator[BatchRequest]:
    """Batches from the beginning of the cache on, as a run would ask for them; again from there if it ends."""
    count = 0
    while True:
        for block in range(manifest.blocks):
            for group in range(1 if known else manifest.groups):
                rows, views = manifest.rows_of(block), 1 if known else len(manifest.views_of(group))
                for start in range(rows.start, rows.stop, batch_size):
                    if count > BATCHES:
                        return
                    count += 1
                    yield BatchRequest(
                        0, block, group, range(start, min(start + batch_size, rows.stop)), views, known
                    )


def _decode_rate(
    prepared: "Prepared", workers: Mapping[str, "Worker"], kept: KeptPixels | None
) -> tuple[list[Decoded], float]:
    """A few decoded batches, and image views a second."""
    manifest, processes = prepared.manifest, worker_count(prepared.config.workers)
    renders = list(dict.fromkeys(worker.render for worker in workers.values()))
    size = min((worker.batch_size for worker in workers.values()), default=64)
    decoder = Decoder(prepared.data, prepared.views, manifest, renders, kept)
    first: list[Decoded] = []
    iterator = decoded_batches(decoder, list(_requests(manifest, size, kept is not None)), processes)
    first.append(next(iterator))  # starting processes is no part of a rate
    start, count = time.perf_counter(), 0
    for decoded in iterator:
        count += _views_in(decoded)
        if len(first) < 2:
            first.append(decoded)
    seconds = time.perf_counter() - start
    return first, count / seconds if count else float("inf")


def _views_in(decoded: Decoded) -> int:
    return len(decoded.request.rows) * decoded.request.views


def _forward_rate(worker: "Worker", manifest: Manifest, batches: Sequence[Decoded]) -> float:
    """Image views a second of one teacher, its outputs on the host as the cache would store them.

    As in a run, the device has the next batches before it is done with one.
    """
    lanes, forwards = Lanes(worker.device), []
    kept = {
        out.name: 1 if out.eval_only else manifest.views for out in worker.plan.outputs if out.kind != PIXELS
    }
    for decoded in batches:
        views = manifest.views_of(decoded.request.group)[: decoded.request.views]
        for some, kinds in worker.forwards(views, kept):
            pixels = decoded.pixels[worker.render][some.start - views.start : some.stop - views.start]
            forwards.append((pixels, decoded.labels, kinds))
    if not forwards:
        return float("inf")  # it keeps what was decoded
    flights: deque[tuple[Any, ...]] = deque()
    start, count = 0.0, 0
    for number in range(-1, BATCHES):  # the first one warms up
        pixels, labels, kinds = forwards[number % len(forwards)]
        there = lanes.up(pixels), lanes.up(labels)
        lanes.arrive()
        derived, _ = worker.launch(*there, kinds)
        flights.append((there, derived, *lanes.down([derived])))
        count += len(labels) * len(pixels)
        while len(flights) >= ON_DEVICE or (flights and number in (-1, BATCHES - 1)):
            flights.popleft()[-1].synchronize()
        if number < 0:
            start, count = time.perf_counter(), 0
    return count / (time.perf_counter() - start)


def _write_speed(place: Path, bytes_missing: int) -> float:
    """MB/s of chunk-sized files, each fsynced, in ``place``, by as many threads as a run writes with."""
    total = max(2**20, min(WRITE_BYTES, bytes_missing))
    piece, scratch = os.urandom(2**20), f".kd-plan-{os.getpid()}-{os.urandom(4).hex()}"
    files = [place / f"{scratch}-{number}.tmp" for number in range(WRITERS)]

    def write(file: Path) -> int:
        written = 0
        with file.open("wb") as stream:
            for _ in range(16):
                written += stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        return written

    written, start = 0, time.perf_counter()
    with storage_errors(place), ThreadPoolExecutor(WRITERS) as writers:
        try:
            while written < total:
                written += sum(writers.map(write, files))
            return written / 1e6 / (time.perf_counter() - start)
        finally:
            for file in files:
                file.unlink(missing_ok=True)
