"""Many ``kd`` commands from one process that has its imports behind it; knows no module but ``kdcli.cli.app``.

A start of ``kd`` takes seconds, a fork of this process none. Each command has its own streams, working folder and
exit code. Used by test_golden.py and side_by_side.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


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

    def run(self, *arguments: object, stdin: str = "") -> Answer:
        for path, text in zip(self.streams, (stdin, "", ""), strict=True):
            path.write_text(text)
        job = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(self.place),
            "streams": [str(path) for path in self.streams],
        }
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code = int(self._line())
        return Answer(code, self.streams[1].read_text(), self.streams[2].read_text())


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


def serve() -> None:
    print(json.dumps(str(warm())), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            execute(job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
