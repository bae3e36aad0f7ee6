"""What each of two processes does in test_training_ranks: several runs, one after the other, in one group.

    torchrun ... ranks_script.py SCENARIOS.json RESULTS

Each scenario: ``config`` of the run, and what happens to rank 1 (or to all) in it.
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from kdcli.console import console
from kdcli.errors import KdError
from kdcli.methods.batch import Batch
from kdcli.methods.weighted import LabelsOnly
from kdcli.training.config import StudentConfig
from kdcli.training.distributed import join_ranks
from kdcli.training.train import train_student

MESSAGES = ("all_reduce", "all_gather", "all_gather_object", "broadcast")
"""What is counted from one step to the next; the gradients are the wrapper's, and not among them."""


def run(scenario: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train; what came of it, and of each step a random number and the messages from it to the next."""
    changes = scenario.get("rank1", {}) if rank == 1 else {}
    config = StudentConfig.model_validate({**scenario["config"], **changes})
    draws: list[float] = []
    images: list[int] = []
    messages: list[int] = []

    def on_batch(batch: Batch) -> None:
        messages.append(0)
        draws.append(float(torch.rand(1)))
        images.append(len(batch.labels))
        if rank == 1 and len(draws) == scenario.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    sent = {name: getattr(distributed, name) for name in MESSAGES}

    def counted(name: str) -> Any:
        def send(*arguments: Any, **options: Any) -> Any:
            if messages:
                messages[-1] += 1
            return sent[name](*arguments, **options)

        return send

    for name in MESSAGES:
        setattr(distributed, name, counted(name))
    real = LabelsOnly.forward

    def explodes(self: LabelsOnly, *arguments: Any) -> dict[str, Tensor]:
        parts = real(self, *arguments)
        worse = float("inf") if rank == 1 and len(draws) == scenario["explode_at"] else 1.0
        return {name: part * worse for name, part in parts.items()}

    if "explode_at" in scenario:
        LabelsOnly.forward = explodes  # type: ignore[method-assign]
    console._warned.clear()
    try:
        outcome = train_student(config, on_batch=on_batch).document()
    except KdError as error:
        outcome = {**error.document(), "told": error.told}
    finally:
        LabelsOnly.forward = real  # type: ignore[method-assign]
        for name in MESSAGES:
            setattr(distributed, name, sent[name])
    return {"outcome": outcome, "draws": draws, "images": images, "messages": messages}


def note_threads(path: Path) -> None:
    """Names of all threads of this process, native ones, too."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    path.write_text(json.dumps(names))


def main() -> None:
    """Run them all; which threads there are still when Python ends, is written last."""
    atexit.register(note_threads, Path(sys.argv[2]) / f"threads.{os.environ['RANK']}.json")
    with join_ranks("cpu") as ranks:
        for name, scenario in json.loads(Path(sys.argv[1]).read_text()).items():
            print(f"--- {name}", file=sys.stderr, flush=True)
            document = run(scenario, ranks.rank)
            (Path(sys.argv[2]) / f"{name}.{ranks.rank}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
