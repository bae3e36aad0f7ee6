"""``--engine ray``: workers as actors of Ray Core, one process of kd in each.

A dead actor is replaced by the supervisor, not by Ray: so its claims are free at once, and its deaths are counted.
"""

import json
import logging
import subprocess
import sys
from contextlib import redirect_stdout
from typing import Any, Final, final

from kdcli.console import console
from kdcli.documents import to_document
from kdcli.engines.base import Attempt, Engine, Job, Outcome
from kdcli.engines.config import EngineOptions
from kdcli.engines.process import Process
from kdcli.errors import DeviceError, MissingExtraError

ANSWER_SECONDS: Final = 30.0
"""Ray itself waits two minutes for a head that does not answer, then ends the process."""
_TRY: Final = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"


@final
class RayEngine(Engine):
    """Starts each worker where Ray has room for it.

    Args:
        options: which Ray, and what each worker takes of it.

    Raises:
        MissingExtraError: ray is not installed.
        DeviceError: no Ray answers there.
    """

    def __init__(self, options: EngineOptions) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError(
                "--engine ray needs the package ray, which is not installed", "pip install 'kdcli[ray]'"
            ) from error
        self._ray, address = ray, options.address or "auto"
        self._words = redirect_stdout(sys.stderr)  # Ray tells of dead actors on stdout, which is the result's
        if address != "local":
            _require_answer(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        self._actor: Any = ray.remote(
            num_cpus=options.cpus_per_worker or 1, num_gpus=options.gpus_per_worker or 0, max_restarts=0
        )(Process)

    def __enter__(self) -> Engine:
        self._words.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """See :class:`~kdcli.engines.base.Engine`."""
        self._ray.shutdown()
        self._words.__exit__(*error)

    def start(self, job: Job) -> Attempt:
        """See :class:`~kdcli.engines.base.Engine`."""
        return _Actor(self._ray, self._actor.remote(json.dumps(to_document(job))))


@final
class _Actor(Attempt):
    """An actor that holds a worker's process; it is asked for it again and again, and never waited for."""

    started = False

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._place, self._asked = actor.where.remote(), actor.poll.remote()
        self._where = "Ray has no room for it yet"

    def poll(self) -> Outcome | None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        if not self._ray.wait([self._asked], timeout=0)[0]:
            return None
        try:
            if not self.started:
                self._where = self._ray.get(self._place)
            found: Outcome | None = self._ray.get(self._asked)
        except self._ray.exceptions.RayError as error:
            return Outcome(None, last=next(iter(str(error).splitlines()), ""))
        self.started = True
        if found is None:
            self._asked = self._actor.poll.remote()
        return found

    def stop(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        if self.started:
            self._ray.wait([self._actor.kill.remote()], timeout=5)
        self._ray.kill(self._actor)

    def where(self) -> str:
        """See :class:`~kdcli.engines.base.Attempt`."""
        return self._where


def _require_answer(address: str) -> None:
    """Ask in another process, which can be left alone: Ray's own wait is long, and ends the process.

    Raises:
        DeviceError: no Ray answers in time, or it is of another version.
    """
    console.note(f"asking for Ray at {address}, {ANSWER_SECONDS:.0f} s at most")
    hint = "Start one (ray start --head), give its --address HOST:PORT, or --address local for one on this machine."
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _TRY, address],
            capture_output=True, text=True, errors="replace", check=False, timeout=ANSWER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"no Ray answers at {address} within {ANSWER_SECONDS:.0f} s", hint) from error
    if asked.returncode:
        said = [line for line in asked.stderr.splitlines() if line.strip()]
        raise DeviceError(f"Ray at {address} cannot be used: {said[-1] if said else asked.returncode}", hint)
