"""``--engine submitit``: workers as jobs of Slurm, or of submitit's own processes (``--address local``).

submitit keeps each job's function and arguments as a pickle in its folder: here a function of this module and texts.
What the job gives comes back as JSON, beside it.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from kdcli.documents import from_document, to_document
from kdcli.engines.base import Attempt, Engine, Job, Outcome
from kdcli.engines.config import EngineOptions
from kdcli.engines.process import Process
from kdcli.errors import DeviceError, MissingExtraError, UsageError
from kdcli.files import make_folder, write_json
from kdcli.reading import read_json

LOOK_SECONDS: Final = 0.5
LONGEST_MINUTES: Final = 7 * 24 * 60
"""Of a job of submitit's own processes, and of Slurm's where no ``--slurm time=`` is given."""
_LATE_SECONDS: Final = 10.0
"""That a file may take from another node to this one."""


@final
class SlurmEngine(Engine):
    """Submits each worker as a job.

    Args:
        options: what each asks of Slurm.
        folder: of this run; every node sees it.

    Raises:
        MissingExtraError: submitit is not installed.
        DeviceError: there is no such cluster.
        UsageError: Slurm has no such setting.
    """

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise MissingExtraError(
                "--engine submitit needs the package submitit, which is not installed",
                "pip install 'kdcli[slurm]'",
            ) from error
        cluster = options.address or "slurm"
        make_folder(folder)
        try:
            self._executor: Any = submitit.AutoExecutor(folder / "submitit", cluster=cluster)
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"submitit finds no cluster '{cluster}' here: {error}",
                "Run on a login node of the cluster; --address local tries it out without one.",
            ) from error
        asked = dict(word.split("=", 1) for word in options.slurm)
        settings = {f"slurm_{key}": int(text) if text.isdecimal() else text for key, text in asked.items()}
        try:
            self._executor.update_parameters(
                name="kd", timeout_min=LONGEST_MINUTES, cpus_per_task=options.cpus_per_worker or 1,
                gpus_per_node=options.gpus_per_worker or 0, **settings,
            )  # fmt: skip
        except (AssertionError, NameError, TypeError, ValueError) as error:
            said = str(error).split("Known executors")[0]  # what follows are submitit's own words for itself
            raise UsageError(
                f"--slurm: {said}", "For example --slurm partition=gpu --slurm time=240"
            ) from error
        self._folder = folder

    def start(self, job: Job) -> Attempt:
        """See :class:`~kdcli.engines.base.Engine`."""
        found, stop = (self._folder / f"{job.worker}.{ending}" for ending in ("json", "stop"))
        with _told_to(self._folder / "submitit.log"):
            submitted = self._executor.submit(attend, json.dumps(to_document(job)), str(found), str(stop))
        return _Submitted(submitted, found, stop)


@contextmanager
def _told_to(log: Path) -> Iterator[None]:
    """Have processes that are started within write their errors to a log: submitit's own end with a traceback."""
    kept = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@final
class _Submitted(Attempt):
    """A job of Slurm's that attends to a worker."""

    def __init__(self, job: Any, found: Path, stop: Path) -> None:
        self._job, self._found, self._stop = job, found, stop
        self._over: float | None = None

    @property
    def started(self) -> bool:
        """See :class:`~kdcli.engines.base.Attempt`."""
        return self._job.state not in ("PENDING", "UNKNOWN", "CONFIGURING", "REQUEUED")

    def poll(self) -> Outcome | None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        if self._found.is_file():
            return from_document(Outcome, read_json(self._found), self._found)
        if not self._job.done():
            return None
        self._over = self._over or time.monotonic()
        if time.monotonic() - self._over < _LATE_SECONDS:
            return None
        said = (self._job.stderr() or "").split("\n")
        return Outcome(None, last=next((line for line in reversed(said) if line.strip()), self.where()))

    def stop(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        self._stop.touch()

    def kill(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        self._stop.touch()
        if not self._job.done():
            self._job.cancel(check=False)

    def where(self) -> str:
        """See :class:`~kdcli.engines.base.Attempt`."""
        return f"job {self._job.job_id}, {self._job.state}"


def attend(text: str, found: str, stop: str) -> None:
    """What a job does: run a worker, and write how it ended.

    Args:
        text: a :class:`~kdcli.engines.base.Job` as JSON.
        found: file that gets the outcome.
        stop: file that asks for a stop as soon as it is there.
    """
    worker = Process(text)
    asked = False
    while (outcome := worker.poll()) is None:
        if not asked and Path(stop).exists():
            worker.stop()
            asked = True
        time.sleep(LOOK_SECONDS)
    write_json(Path(found), to_document(outcome))
