"""Many ``kd`` commands from one process that has its imports behind it; knows no module but ``kdcli.cli.app``.

A start of ``kd`` takes seconds, a fork of this process none. Each command has its own streams, working folder and
exit code. Used by test_golden.py and side_by_side.py.
"""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HUNG = 1000
"""No exit code: it did not end in time, nor when it was asked to."""
GRACE = 20.0


@dataclass(frozen=True)
class Answer:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def environment(home: Path, tree: Path | None = None) -> dict[str, str]:
    """Without a network, with one thread and an own cache folder; ``kd`` is the one in ``tree``, if given."""
    own = {
        "XDG_CACHE_HOME": str(home / ".cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return {**os.environ, **own, **({} if tree is None else {"PYTHONPATH": str(tree)})}


class Driver:
    """Runs commands in ``place``; use it as a context."""

    def __init__(self, place: Path, streams: Path, tree: Path | None = None) -> None:
        self.place = place
        self.streams = [streams / name for name in ("in", "out", "err")]
        self.environment = environment(place, tree)

    def __enter__(self) -> Self:
        self.streams[0].parent.mkdir(parents=True, exist_ok=True)
        self.server = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip
        self.package = json.loads(self._line())
        return self

    def __exit__(self, *_: type[BaseException] | TracebackType | BaseException | None) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _line(self) -> str:
        assert self.server.stdout is not None
        if not (line := self.server.stdout.readline()):
            raise RuntimeError("the driver of kd is gone; its standard error says why")
        return line

    def run(
        self, *arguments: object, stdin: str = "", seconds: float | None = None, memory: int | None = None
    ) -> Answer:
        """Run ``kd``; after ``seconds`` it gets SIGTERM, later SIGKILL (:data:`HUNG`). ``memory``: bytes it may add."""
        for path, text in zip(self.streams, (stdin, "", ""), strict=True):
            path.write_text(text)
        job = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(self.place),
            "streams": [str(path) for path in self.streams],
            "seconds": seconds,
            "memory": memory,
        }
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code = int(self._line())
        out, err = (path.read_text(errors="replace") for path in self.streams[1:])
        return Answer(code, out, err)


def warm() -> Path:
    """Import all of ``kdcli``, whatever its modules are called, and what it imports late; say where it is."""
    import importlib
    import pkgutil
    from contextlib import suppress

    import kdcli

    for found in pkgutil.walk_packages(kdcli.__path__, "kdcli."):
        if not found.name.endswith("__main__"):
            with suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(found.name)
    for name in ("torch._dynamo", "sklearn.svm", "timm"):
        importlib.import_module(name)
    return Path(kdcli.__file__).parent


def execute(job: dict[str, Any]) -> None:
    """In the child: become the command, and end."""
    from kdcli.cli.app import main

    os.setsid()
    if job["memory"] is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + job["memory"],) * 2)
    os.chdir(job["cwd"])
    for number, path in enumerate(job["streams"]):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    sys.stdin = open(0)  # noqa: SIM115 - a descriptor, and open as long as the process
    code: Any = 1
    try:
        main(job["arguments"])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def wait(child: int, seconds: float | None) -> int:
    """Exit code, negative for a signal, :data:`HUNG` when SIGTERM was not enough; nothing of it is left running."""
    if seconds is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deadlines = [
        (time.monotonic() + seconds, signal.SIGTERM),
        (time.monotonic() + seconds + GRACE, signal.SIGKILL),
    ]
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadlines and time.monotonic() > deadlines[0][0]:
            if deadlines.pop(0)[1] == signal.SIGKILL:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return HUNG
            os.kill(child, signal.SIGTERM)
        time.sleep(0.002)


def serve() -> None:
    print(json.dumps(str(warm())), flush=True)
    gc.freeze()  # a collection in a fork would copy every page that holds an object
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            execute(job)
        print(wait(child, job["seconds"]), flush=True)


if __name__ == "__main__":
    serve()
