"""kd commands one after the other, each forked off a process that has opened the libraries: saves seconds a command."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, final

from kdcli.cli.app import main as kd
from kdcli.runtime import calm_openmp
from lab.settings import RECIPES

PASSED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SERVE = (sys.executable, "-c", "from lab.lanes import serve; serve()")
_BEGUN = "begun"
_OPENED = (
    "torch", "torchvision", "timm", "kdcli.extract.extract", "kdcli.verbs.training", "kdcli.verbs.steps",
    "kdcli.probing.probe", "kdcli.ranking.answer",
)  # fmt: skip


@final
class Lane:
    """Runs one command at a time; folder and environment are those of this process when the first one begins."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._command = self._sent = 0

    def call(self, words: Sequence[str], output: Path) -> int:
        """Run ``kd WORDS``; what it prints goes to a file. Gives its exit code: 128 + N after signal N."""
        if self._server is None:
            path = os.pathsep.join(filter(None, (str(RECIPES), os.environ.get("PYTHONPATH"))))
            self._server = subprocess.Popen(
                _SERVE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        try:
            self._server.stdin.write(json.dumps([list(words), str(output)]) + "\n")
            self._server.stdin.flush()
            word, number = self._server.stdout.readline().split()
            if word == _BEGUN:
                self._command = int(number)
                if self._sent:
                    os.kill(self._command, self._sent)
                _, number = self._server.stdout.readline().split()
            returned = int(number)
        except (BrokenPipeError, ValueError):  # it has ended: killed, or a library did not open
            returned = self._server.wait() or 1
        self._command = 0
        return returned if returned >= 0 else 128 - returned

    def send(self, number: int) -> None:
        """Send a signal to the command that runs, or to the next one."""
        self._sent = number
        if self._command:
            os.kill(self._command, number)

    def close(self) -> None:
        """End the process; the next command has another."""
        if self._server is not None:
            with contextlib.suppress(BrokenPipeError):
                self._server.communicate()
        self._server = None


def serve() -> None:
    """What a lane's process does: reads words and a file, forks, says the number of the process and how it ended."""
    for number in PASSED:  # of a terminal or of Slurm, which mean the commands
        signal.signal(number, signal.SIG_IGN)
    calm_openmp()
    for name in _OPENED:
        importlib.import_module(name)
    for line in sys.stdin:
        words, output = json.loads(line)
        process = os.fork()
        if not process:
            _run(words, output)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _run(words: list[str], output: str) -> NoReturn:
    for number in PASSED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(_BEGUN, os.getpid(), flush=True)  # not before: until here signals to it are lost
    for fd, name, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(name, mode), fd)
    kd(words)
