"""Many workers on one cache: what sharing costs, measured here and carried on to clusters.

    python benchmarks/scale.py [--real 1,2,4,8,16] [--table] [--json]

* The real run: N processes with a numpy teacher (it sleeps as long as a model would take) fill one cache by kd's own
  queue, claims, and records.
* The costs: the system calls of one task that name files, counted by strace, and their seconds.
* The table: the same work as events, with one server of files that takes so many calls a second, and so long for each.
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_tools as tools
from torch.utils.data import Sampler  # noqa: F401 -- before the processes fork

from kdcli.cache.layout import SAMPLES
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
    print(sum(done for done, _, _ in found), end=" ")
    return Real(workers, tasks, taken, tasks * seconds / workers / taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", default="1,4,16")
    parser.add_argument("--tasks", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--folder", default="/dev/shm")
    args = parser.parse_args()
    for n in map(int, args.real.split(",")):
        print(real(n, args.tasks, args.seconds, Path(args.folder)))
