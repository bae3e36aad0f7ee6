"""What reading a cache out of a store costs after the first epoch: against the same cache in a folder, in one run.

    python benchmarks/stores.py [--quick] [--json]

The store is moto's S3 on 127.0.0.1, so the first epoch is that of a store without latency. Two figures: batches of 256
random rows of 1000 fp16 logits, gathered from both in turns, and whole epochs of trainings, one after the other. Each
is the median of an epoch after the first one, remote over local; the goal is at most 1.1.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cache import build
from measuring import Figures, benchmark, of_turns, say
from store_servers import environment, s3
from training_place import make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.stores.push import push
from kdcli.training import train

URL = "s3://bucket/cache"


def epoch(cache: CacheSet, order: np.ndarray) -> float:
    """Seconds to gather all rows in random batches."""
    started = time.perf_counter()
    for start in range(0, len(order), 256):
        cache.gather("t", "logits", order[start : start + 256], 0)
    return time.perf_counter() - started


def gathered(folder: Path, rows: int, epochs: int) -> list[float]:
    """Rows from both, in turns: remote over local."""
    random = np.random.default_rng(0)
    build(folder / "c.kd", random.normal(size=(rows, 1000)).astype(np.float16))
    push(folder / "c.kd", URL)
    seconds: dict[str, list[float]] = {"local": [], "remote": []}
    caches = {}
    for name, place in (("local", folder / "c.kd"), ("remote", URL)):
        started = time.perf_counter()
        caches[name] = CacheSet.open([place])
        caches[name].require({"t": ["logits"]}, np.arange(rows), [0])
        seconds[name].append(time.perf_counter() - started)
    for _ in range(epochs):
        order = random.permutation(rows)
        for name, cache in caches.items():
            seconds[name].append(epoch(cache, order))
    begun = ", ".join(f"{name} {times[0]:.2f} s" for name, times in seconds.items())
    say(f"to begin: {begun}; an epoch of {rows} rows: {statistics.median(seconds['local'][2:]):.4f} s")
    return [far / near for near, far in zip(seconds["local"][2:], seconds["remote"][2:], strict=True)]


def trained(folder: Path, rounds: int, epochs: int) -> list[float]:
    """Epochs of a student of two teachers; trainings in turns, the first of each begins without copies."""
    place = make_place(folder / "place", per_class=100)
    push(place.cache, URL + "2")
    seconds: dict[str, list[float]] = {"local": [], "remote": []}
    for number in range(rounds):
        for name, cache in (("local", place.cache), ("remote", URL + "2")):
            run = place.config(f"{name}{number}", "distill-equal", cache=(cache,), epochs=epochs)
            history = train.train_student(run).history
            seconds[name] += [entry["seconds"] for entry in history[1:]]
    return [far / near for near, far in zip(seconds["local"], seconds["remote"], strict=True)]


def figures(options: argparse.Namespace) -> Figures:
    """Both; ``options.turns`` are trainings."""
    import boto3

    epochs, rounds, further = (11, 1, 3) if options.quick else (41, options.turns or 4, 7)
    with tempfile.TemporaryDirectory() as name, s3() as server:
        os.environ.update(environment(server.url), KD_STAGE=f"{name}/stage")
        boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="bucket")
        rows = gathered(Path(name), 8192 if options.quick else 40960, epochs)
        trainings = trained(Path(name), rounds, further)
    what = "an epoch after the first from a cache in a store against one in a folder: "
    return {
        "store_gather_vs_folder": of_turns(
            rows, 1.1, "x seconds", what + "batches of 256 random rows", higher=False
        ),
        "store_training_vs_folder": of_turns(trainings, 1.1, "x seconds", what + "training", higher=False),
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "obstore", "moto"))
