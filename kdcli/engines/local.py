"""``--engine local``: processes of this machine."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from typing import final

from kdcli.documents import to_document
from kdcli.engines.base import Engine, Job
from kdcli.engines.config import EngineOptions
from kdcli.engines.process import Process
from kdcli.errors import UsageError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@final
class LocalEngine(Engine):
    """Starts each worker here, with its own GPUs.

    Args:
        options: how many there are to be.

    Raises:
        UsageError: there are fewer GPUs than asked for.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._gpus, self._each = _gpus(), options.gpus_per_worker
        wanted = (self._each or 0) * options.num_workers
        if wanted > len(self._gpus):
            raise UsageError(
                f"{options.num_workers} workers with --gpus-per-worker {self._each} take {wanted} GPUs, and there are "
                f"{len(self._gpus)}",
                "Ask for fewer workers; without --gpus-per-worker they share the GPUs there are.",
            )

    def start(self, job: Job) -> Process:
        """See :class:`~kdcli.engines.base.Engine`."""
        environment = job.environment
        if self._each is not None:
            own = self._gpus[job.number * self._each : (job.number + 1) * self._each]
            environment = {**environment, _VISIBLE: ",".join(own)}
        elif self._gpus:
            environment = {**environment, _VISIBLE: self._gpus[job.number % len(self._gpus)]}
        return Process(json.dumps(to_document(replace(job, environment=environment))))


def _gpus() -> list[str]:
    """What CUDA calls the GPUs of this process, told without loading CUDA."""
    if (visible := os.environ.get(_VISIBLE)) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return list(map(str, range(sum(line.startswith("GPU ") for line in listed.splitlines()))))
