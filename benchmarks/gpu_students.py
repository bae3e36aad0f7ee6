"""Stages of benchmarks/gpu.py that train: epochs, resumed runs, the probe's solver, two processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_place import Place
from gpu_stages import Found, resident
from measuring import figure
from safetensors.torch import load_file

import kdcli
from kdcli.methods.batch import Batch
from kdcli.probing.solver import Classifier, Linear, fit
from kdcli.training.train import train_student

CHILD = Path(__file__).with_name("gpu_child.py")


# --- 6: epochs ------------------------------------------------------------------------------------


def epochs(place: Place) -> Found:
    """Seconds of an epoch: labels only, with the cache, with its outputs on the device, with a live teacher."""
    name = next(iter(place.scale.teachers))
    own = {"cache": (place.cache,)}
    seconds = {
        "labels_only": epoch(place, "labels", "labels-only"),
        "cache": epoch(place, "cache", "distill-equal", **own),
        "resident": epoch(place, "resident", "distill-equal", resident=resident(place), **own),
        "live": epoch(place, "live", "distill-equal", live=name, **own),
    }
    images = place.scale.images
    values = {case: {"seconds": spent, "images_per_s": images / spent} for case, spent in seconds.items()}
    labels = seconds["labels_only"]
    what = "{}, against labels only, same images in memory"
    figures = {
        f"{case}_epoch_vs_labels_only": figure(
            seconds[case] / labels, goal, "x seconds", what.format(case), higher=False
        )
        for case, goal in (("cache", 1.03), ("resident", 1.03))
    }
    return Found({**values, "live_vs_cache": seconds["live"] / seconds["cache"]}, figures)


def epoch(place: Place, out: str, method: str, live: str | None = None, **fields: Any) -> float:
    """The shortest epoch of a run after its first; with ``live`` a teacher's forward beside every step."""
    runner = place.runner(live, place.best_amp) if live else None

    def run_teacher(batch: Batch) -> None:
        if runner is not None:
            batch.teacher[live]["logits"] = runner(batch.pixels, ["logits"])["logits"].clone()  # type: ignore[index]

    config = place.student(place.root / "runs" / out, method, epochs=3, **fields)
    history = train_student(config, on_batch=run_teacher).history
    return float(min(entry["seconds"] for entry in history[1:]))


# --- 7: killed and resumed ------------------------------------------------------------------------


def resumed(place: Place) -> Found:
    """Weights of a run that was stopped in the middle and went on in a new process, against an unstopped one's."""
    values: dict[str, Any] = {}
    for word in ("off", "on"):
        cases = (f"straight-{word}", f"stopped-{word}")
        straight, stopped = (job_of(place, case, deterministic=word == "on") for case in cases)
        expected, cut = children(place, [straight, {**stopped, "stop_at": 20}])
        (found,) = children(place, [stopped])
        equal = expected["sha256"] == found["sha256"]
        values[f"deterministic_{word}"] = {"equal": equal, "stopped_at": cut["stopped_at"]}
    what = "weights of a run that was stopped and went on in a new process equal an unstopped one's, deterministic"
    return Found(values, {"resumed_equal": figure(float(equal), 1, "of 1", what)})


def job_of(place: Place, out: str, **fields: Any) -> dict[str, Any]:
    """A short training for a process of its own: 2 epochs of 16 steps."""
    size = place.scale.batches[0]
    own = {"data": place.memory(16 * size), "epochs": 2, "batch_size": size, "recipe": "imagenet"}
    config = place.student(place.root / "children" / out, "labels-only", **{**own, **fields})
    return {"config": config.model_dump(mode="json", exclude_unset=True)}


def children(place: Place, jobs: list[dict[str, Any]], processes: int = 1) -> list[dict[str, Any]]:
    """Run gpu_child.py, by torchrun where there are several processes; what it printed, a document a job and process.

    Raises:
        RuntimeError: with the end of what it said, if it fails.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(CHILD), json.dumps(jobs, default=str)]
    paths = [str(Path(__file__).parent), str(Path(kdcli.__file__).parents[1])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=max(1.0, place.left),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    documents = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(documents) != processes * len(jobs):
        raise RuntimeError(f"{CHILD.name} ended with {done.returncode}: {done.stderr[-1500:]}")
    return documents


# --- 8: the probe's solver ------------------------------------------------------------------------


def probe(place: Place) -> Found:
    """The exact solver on the device against the CPU: coefficients, C, seconds."""
    random = np.random.default_rng(0)
    classes, columns = (100, 2048) if place.scale.share == 1 else (10, 64)
    labels = np.repeat(np.arange(classes), 5)
    means = random.normal(size=(classes, columns))
    features = random.normal(size=(len(labels), columns)) * 4 + means[labels]
    values: dict[str, Any] = {"classes": classes, "columns": columns}
    fitted: dict[str, Classifier] = {}
    for device in ("cpu", place.device, place.device):  # the first call on a device also starts its libraries
        start = time.perf_counter()
        fitted[device] = fit(features, labels, Linear(device=device, folds=5))
        values[f"{device}_s"] = time.perf_counter() - start
    cpu, other = fitted["cpu"], fitted[place.device]
    worst = float(np.abs(cpu.coefficients - other.coefficients).max() / np.abs(cpu.coefficients).max())
    values["same_c"] = cpu.c == other.c
    what = "coefficients of the probe's solver against the CPU's"
    return Found(values, {"probe_difference": figure(worst, 1e-8, "of the largest", what, higher=False)})


# --- 9: two processes on one device ---------------------------------------------------------------


def two_processes(place: Place) -> Found:
    """Weights after training in two processes that share the device, against one that computes steps in two pieces.

    NCCL refuses a shared GPU, so gradients go by gloo. BatchNorm is frozen: its statistics are each piece's own.
    """
    fields = {"optimizer": "sgd", "bn": "frozen", "amp": "off", "init": "random"}
    alone = [job_of(place, "pieces", accumulate=2, **fields), job_of(place, "start", lr=1e-12, **fields)]
    pieces, start = children(place, alone)
    two, other = children(place, [job_of(place, "two", **fields)], processes=2)
    if {two["world"], other["world"]} != {2}:
        raise RuntimeError(f"the two processes did not train together: {two}, {other}")
    ours, theirs, before = (load_file(found["weights"]) for found in (two, pieces, start))
    learned, worst = farthest(theirs, before), farthest(ours, theirs)
    what = "weights of two processes on one device against one with --accumulate 2, of what was learned"
    figures = {"two_processes_difference": figure(worst / learned, 1e-4, "of the change", what, higher=False)}
    return Found({"largest_difference": worst, "largest_change": learned}, figures)


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
