"""Trainings in a process of their own, for benchmarks/gpu.py: stopped at a step, or one of two on a device.

    python gpu_child.py '[{"config": {...}, "stop_at": STEP}, ...]'

Prints a JSON document for each: the exported weights' file and its sha256, or at which step it was stopped.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; what determinism needs
os.environ["LOCAL_RANK" if "LOCAL_RANK" in os.environ else "_"] = "0"  # all processes share the first device

from torch import distributed

from kdcli.console import console
from kdcli.errors import StoppedEarly
from kdcli.methods.batch import Batch
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as told."""
    config = StudentConfig.model_validate(job["config"])
    steps = 0

    def count(_batch: Batch) -> None:
        nonlocal steps
        steps += 1
        if steps == job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train_student(config, on_batch=count)
    except StoppedEarly:
        return {"stopped_at": steps}
    weights = Path(config.out) / "export" / "model.safetensors"
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    return {
        "weights": str(weights),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "world": world,
    }


if __name__ == "__main__":
    console.quiet = True
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")  # NCCL refuses to share a GPU
    for each in json.loads(sys.argv[1]):
        print(json.dumps(train(each)), flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()
