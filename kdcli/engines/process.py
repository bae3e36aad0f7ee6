"""A worker as a process of the machine that this runs on, whoever started it there."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import final

from kdcli.documents import from_document
from kdcli.engines.base import Attempt, Job, Outcome
from kdcli.reading import parse_json
from kdcli.runtime import WORKER

_TAIL = 2**20
"""Bytes of a log that are looked through."""


@final
class Process(Attempt):
    """Starts ``kd`` in a session of its own, so that ^C at the supervisor's terminal does not reach it.

    The worker ends with whoever holds this value, come what may: its standard input is a pipe from here.

    Args:
        text: a :class:`~kdcli.engines.base.Job` as JSON.
    """

    started = True

    def __init__(self, text: str) -> None:
        job = from_document(Job, parse_json(text.encode(), "a job"), "a job")
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        self._log, self._said = Path(job.log), tempfile.TemporaryFile()  # noqa: SIM115 - as long as this lives
        self._from = self._log.stat().st_size if self._log.exists() else 0
        words = shlex.join(job.arguments)
        with self._log.open("ab") as log:
            log.write(f"--- worker {job.number} on {socket.gethostname()}: kd {words}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                # -P: what lies in the working directory is no module of Python's.
                [sys.executable, "-P", "-m", "kdcli", *job.arguments, "--json"],
                stdin=subprocess.PIPE, stdout=self._said, stderr=log, cwd=job.folder, start_new_session=True,
                env={**os.environ, **job.environment, WORKER: job.worker},
            )  # fmt: skip

    def poll(self) -> Outcome | None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        code = self._process.poll()
        if code is None:
            return None
        self._signal(signal.SIGKILL)  # decode processes that outlived it
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines() or ["{}"]
        try:
            document = parse_json(lines[-1].encode(), "what a worker says")
        except ValueError:  # killed while it printed
            document = {}
        with self._log.open("rb") as log:
            log.seek(max(self._from, self._log.stat().st_size - _TAIL))
            told = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        warnings = tuple(line.removeprefix("warning: ") for line in told if line.startswith("warning: "))
        return Outcome(
            code, document if isinstance(document, dict) else {}, told[-1] if told else "", warnings
        )

    def stop(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """See :class:`~kdcli.engines.base.Attempt`."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def where(self) -> str:
        """See :class:`~kdcli.engines.base.Attempt`."""
        return f"{socket.gethostname()} pid {self._process.pid}"

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def end_with_supervisor() -> None:
    """In a worker: be stopped, as by SIGTERM, when whoever holds its :class:`Process` is gone, whatever ended it."""
    if WORKER not in os.environ:
        return

    def watch() -> None:
        while os.read(
            0, 4096
        ):  # not through sys.stdin, whose lock a thread must not hold at the end of Python
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    # What submitit has Slurm send before the time is up.
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    threading.Thread(target=watch, name="kd-supervisor", daemon=True).start()
