"""Many workers on one cache: what sharing costs, measured here and carried on to clusters.

    python benchmarks/scale.py [--quick] [--json] [--real 1,2,4,8,16] [--tasks N] [--seconds S] | --table [--rate R]

* The real run: N processes with a numpy teacher (it sleeps as long as a model would take) fill one cache by kd's own
  queue, claims, and records.
* Beside it the same work as events, with one server of files: it answers a call after so long, and so many a second.
  How many calls kd makes was counted by strace (file names and fsync, a task of one teacher: claim 27, publish and
  release 60; one found done 30, one found taken 47).
* The table: that model with the server of a cluster.
"""

import argparse
import heapq
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_tools as tools
import numpy as np
from measuring import Figures, benchmark, figure, parser_of
from torch.utils.data import Sampler  # noqa: F401 -- before the processes fork

from kdcli.cache.layout import SAMPLES, choose_block_rows
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.extract.decoding import TaskQueue
from kdcli.runtime import StopFlag

ROWS: Final = 32
"""Images of a block of the real run: its tasks are as short as it takes to see what sharing costs."""
PARTS: Final = (SAMPLES, *tools.parts_of(("t",))[1:])


# --- the real run ---------------------------------------------------------------------------------


def new_cache(root: Path, blocks: int) -> None:
    """An empty cache with so many tasks."""
    keys, labels = tools.keys_of(blocks * ROWS), tools.labels_of(blocks * ROWS)
    create_cache(root, tools.manifest_of(keys, labels, views=1, block_rows=ROWS), keys, labels)


def work(root: Path, seconds: float) -> tuple[int, float]:
    """One worker, until nothing is missing: as kdcli/extract/extract.py does it, without images.

    Returns:
        Tasks that it did, and the seconds that it slept as its teacher.
    """
    from kdcli.cache.layout import load_manifest

    manifest, done, slept = load_manifest(root), 0, 0.0
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t"))
        while missing := [unit for part in PARTS for unit in writer.missing(part)]:
            queue = TaskQueue(writer, {"t": 10**6}, missing, StopFlag(), time.monotonic)
            for request in queue:
                task = queue.tasks.pop(request.task)
                time.sleep(seconds)
                slept += seconds
                for unit in task.units:
                    arrays, content = tools.unit_arrays(manifest, unit)
                    writer.publish(unit, arrays, content, [], {}, 0.0)
                writer.claims.release(task.units)
                done += 1
            time.sleep(0.5 if all(writer.claims.is_live(unit) for unit in missing) else 0)
    return done, slept


def _worker(root: Path, seconds: float, start: Any, results: Any) -> None:
    start.wait()
    before = time.monotonic()
    done, slept = work(root, seconds)
    results.put((done, slept, time.monotonic() - before))


@dataclass(frozen=True)
class Real:
    """A real run: workers, tasks, and what part of their time they spent as teachers."""

    workers: int
    tasks: int
    seconds: float
    efficiency: float


def real(workers: int, tasks: int, seconds: float, folder: Path) -> Real:
    """Fill a cache by so many processes."""
    root = Path(tempfile.mkdtemp(dir=folder)) / "c.kd"
    new_cache(root, tasks)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    running = [context.Process(target=_worker, args=(root, seconds, start, results)) for _ in range(workers)]
    for each in running:
        each.start()
    time.sleep(0.3)
    begun = time.monotonic()
    start.set()
    found = [results.get() for _ in running]
    taken = time.monotonic() - begun
    for each in running:
        each.join()
    shutil.rmtree(root.parent)
    assert sum(done for done, _, _ in found) >= tasks  # samples and outputs of one may be two workers'
    return Real(workers, tasks, taken, tasks * seconds / workers / taken)


# --- the same work as events ----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a cache lies: how long a call takes, how many it serves a second, and how many kd makes.

    Attributes:
        claim, publish: calls of one task.
        done, taken: calls to find that a task is done, or another's.
        listing: calls of a look that opens no record; ``page``: names a call lists.
        record: calls to read a record; ``parse``: seconds of CPU for it.
    """

    name: str
    latency: float
    capacity: float
    claim: int = 27
    publish: int = 60
    done: int = 30
    taken: int = 47
    listing: int = 27
    page: int = 100
    record: int = 3
    parse: float = 0.0004


SHARED: Final = Place("shared disk", 0.0003, 20_000)
STREAMS: Final = 8
"""Records that are read at a time (kdcli/cache/commits.py)."""


class Fleet:
    """So many workers on one cache of so many tasks."""

    def __init__(self, place: Place, workers: int, tasks: int, seconds: float, in_order: bool) -> None:
        self.place, self.workers, self.seconds, self.in_order = place, workers, seconds, in_order
        self.state = np.zeros(tasks, np.int8)
        self.left, self.frontier = tasks, 0
        self.pointer = [0] * workers
        self.free_at = 0.0
        self.calls = 0.0
        self.draw = np.random.default_rng(0)

    def serve(self, now: float, calls: float) -> float:
        """When so many calls, one after the other, are answered."""
        self.calls += calls
        self.free_at = max(self.free_at, now) + calls / self.place.capacity
        return max(now + calls * self.place.latency, self.free_at)

    def next_task(self, worker: int) -> tuple[int | None, float]:
        """The task that a worker claims, and the calls that it makes for it."""
        calls, here = float(self.place.claim), self.pointer[worker]
        if self.in_order:
            tries = self.frontier - here
            near = min(tries, self.workers)
            calls += near * self.place.taken + (tries - near) * self.place.done
            here = self.frontier
        elif here >= len(self.state) or self.state[here]:
            known = len(self.state) - self.left
            calls += self.place.taken + self.place.listing + len(PARTS) * known / self.place.page
            open_tasks = np.flatnonzero(self.state == 0)
            here = (
                int(open_tasks[self.draw.integers(len(open_tasks))]) if len(open_tasks) else len(self.state)
            )
        if here >= len(self.state):
            return None, calls + min(self.workers, len(self.state)) * (
                0 if self.in_order else self.place.taken
            )
        self.state[here] = 1
        self.left -= 1
        self.frontier = max(self.frontier, here + 1)
        self.pointer[worker] = here + 1
        return here, calls

    def run(self) -> tuple[float, float]:
        """Seconds until the last record is there, and until the records are joined.

        A worker claims a task while it computes the one before, and publishes it while it computes the one after.
        """
        events: list[tuple[float, int, int, str]] = []
        ready, published = [0.0] * self.workers, [0.0] * self.workers
        count = 0
        for worker in range(self.workers):
            task, calls = self.next_task(worker)
            if task is not None:
                events.append((self.serve(0.0, calls), worker, worker, "start"))
        heapq.heapify(events)
        end = 0.0
        while events:
            now, _, worker, what = heapq.heappop(events)
            count += 1
            if what == "start":
                task, calls = self.next_task(worker)
                ready[worker] = self.serve(now, calls) if task is not None else float("inf")
                heapq.heappush(events, (now + self.seconds, self.workers + count, worker, "end"))
                continue
            start = max(now, ready[worker], published[worker])
            published[worker] = self.serve(now, self.place.publish)
            end = max(end, published[worker])
            if start < float("inf"):
                heapq.heappush(events, (start, self.workers + count, worker, "start"))
        records = len(PARTS) * len(self.state)
        calls = records * self.place.record
        joined = end + max(calls * self.place.latency / STREAMS, calls / self.place.capacity)
        joined += records * self.place.parse
        return end, joined


IMAGES: Final = (10**6, 10**7, 10**8, 10**9)
WORKERS: Final = (1, 8, 64, 512)


def table(rate: float) -> list[dict[str, Any]]:
    """Efficiency of fleets: the seconds without any cost of sharing over those of the model, joining included.

    Blocks are as kd makes them for a thousand fp16 logits, and with ``in order`` every worker tries every task.
    """
    found = []
    for images in IMAGES:
        rows = choose_block_rows(images, 2000)
        for workers in WORKERS:
            ideal, row = images / workers / rate, {"images": images, "workers": workers}
            for name, in_order in (("in order", True), ("now", False)):
                fleet = Fleet(SHARED, workers, -(-images // rows), rows / rate, in_order)
                end, joined = fleet.run()
                row |= {name: round(ideal / joined, 3), f"{name}, calls/s": round(fleet.calls / end)}
                row |= {f"{name}, joining": round((joined - end) / joined, 3)}
            found.append(row)
    return found


def compared(workers: Sequence[int], tasks: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Real runs beside the model of this machine: its processors serve the calls, at the rate of one worker's.

    Tasks are as long as all these workers can have them without waiting for a processor half of the time.
    """
    own = [work_alone(folder) for _ in range(3)]
    call = statistics.median(own) / (Place.claim + Place.publish)
    here = Place("this machine", call, (os.cpu_count() or 1) / call)
    found = []
    for count in workers:
        is_real = real(count, tasks, seconds, folder)
        _, joined = Fleet(here, count, tasks, seconds, False).run()
        found.append(asdict(is_real) | {"model": round(tasks * seconds / count / joined, 3), "call": call})
    return found


def work_alone(folder: Path) -> float:
    """Seconds of processor that a task of one worker takes besides its teacher."""
    root = Path(tempfile.mkdtemp(dir=folder)) / "c.kd"
    new_cache(root, 100)
    before = time.process_time()
    work(root, 0.0)
    taken = time.process_time() - before
    shutil.rmtree(root.parent)
    return taken / 100


def figures(options: argparse.Namespace) -> Figures:
    """What sharing leaves of a teacher's time, by the number of workers, beside the model."""
    workers = [
        int(count) for count in (options.real or ("1,4" if options.quick else "1,2,4,8,16")).split(",")
    ]
    found = {}
    for row in compared(workers, 40 if options.quick else options.tasks, options.seconds, options.folder):
        what = f"part of the time as teachers; the model says {row['model']:.3f}"
        found[f"{row['workers']}_workers"] = figure(row["efficiency"], 0.85, "of the time", what)
    return found


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--real", help="numbers of workers of real runs, with commas; default: 1,2,4,8,16")
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a task")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rate", type=float, default=2000, help="images a second of a worker, for the table")
    parser.add_argument("--table", action="store_true", help="the model's clusters, a JSON line a row")
    if "--table" in sys.argv:
        for row in table(parser.parse_args().rate):
            print(json.dumps(row), flush=True)
    else:
        benchmark(__doc__, figures, ("numpy", "torch"), parser)
