"""Writers that die: a server that forks them quickly, kills at the k-th step on disk, and what must hold after."""

import atexit
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import cache_tools as tools

from kdcli.cache.commits import Commit, read_commits
from kdcli.cache.garbage import collect_garbage
from kdcli.cache.layout import Layout
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part
from kdcli.errors import KdError

# --- the side of the tests -------------------------------------------------------------------------


class Server:
    """A process that has imported everything and has no threads; its forks start in milliseconds."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def fill(self, root: Path, log: Path, **job: Any) -> int:
        """Start a writer with the numpy teachers; it notes in ``log`` what it computes. Its process id."""
        return int(self._ask(start={"root": root, "log": log, **job}))

    def store(self, url: str, **job: Any) -> int:
        """Start a writer or a pusher of a store; see store_writing.run. Its process id."""
        return int(self._ask(start={"url": url, **job}))

    def kd(
        self, *arguments: object, cwd: Path, err: Path, env: dict[str, str] | None = None, **steps: Any
    ) -> int:
        """Start ``kd`` in a process group of its own; stderr is appended to ``err``. Its process id.

        ``log`` gets the number of steps on disk in ``cwd``; ``kill_at``, ``fail_at`` and ``error`` see Steps.
        """
        argv = [str(argument) for argument in arguments]
        return int(self._ask(start={"argv": argv, "cwd": cwd, "err": err, "env": env or {}, **steps}))

    def wait(self, pid: int, seconds: float = 60.0) -> int:
        """Exit code, negative for a signal."""
        return int(self._ask(wait=pid, seconds=seconds))


class Watch:
    """Remembers every record it has seen: none of them may ever be lost or changed."""

    def __init__(self, root: Path, seen: Mapping[str, Commit] = MappingProxyType({})) -> None:
        self.root, self.seen = root, dict(seen)

    def look(self) -> None:
        """What must hold whenever all writers are dead."""
        if not (self.root / "manifest.json").exists():
            assert not self.root.exists(), "a cache is there as a whole or not at all"
            return
        reader = CacheReader(self.root)
        found: dict[str, Commit] = {}
        for part in reader.store.parts():
            commits = read_commits(reader.layout, part)
            assert reader.commits(part) == commits, "every committed file is there in its size"
            assert not verify_part(reader, part)
            found |= {str(commit.unit): commit for commit in commits.values()}
        assert self.seen.items() <= found.items(), "what was committed stays as it is"
        self.seen = found


def computed(log: Path) -> Counter[str]:
    """How often each unit was computed."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line for line in lines if not line.startswith("steps "))


def records(reader: CacheReader) -> dict[str, Commit]:
    """Every record of a cache, by unit."""
    parts = reader.store.parts()
    return {str(each.unit): each for part in parts for each in read_commits(reader.layout, part).values()}


def steps(log: Path) -> int:
    """Steps on disk that the writer took which finished last."""
    return int(log.read_text().split("steps ")[-1].split()[0])


def assert_clean(root: Path) -> None:
    """Nothing is left of those who died, in the cache or beside it."""
    assert collect_garbage(root, dry_run=True).paths == ()
    layout = Layout(root)
    left = [path for folder in (layout.tmp, layout.claims) for path in folder.rglob("*") if path.is_file()]
    assert left == []
    assert [path.name for path in root.parent.glob(f".{root.name}.*")] == []


# --- the server ------------------------------------------------------------------------------------

_WRITES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime")


class Steps:
    """Counts every change of a folder's files, and dies just before the k-th, or fails in it and all later ones.

    Changes are seen by Python's audit hook, whoever makes them. Just before an fsync to die on, half of the
    file is cut off: a kill in the middle of a write. Nothing is really synced: a kill, unlike a power cut,
    takes nothing back. What a disk refuses is what it refuses by ``error``: a full one takes removals and renames.
    """

    def __init__(
        self, folder: Path, kill_at: int | None, fail_at: int | None = None, error: int = errno.ENOSPC
    ) -> None:
        self.count, self._folder, self._kill_at = 0, str(folder), kill_at
        self._fail_at, self._error = fail_at, error
        os.fsync = self._fsync  # type: ignore[assignment]
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._inside(path):
                self._step(takes_space=True)
        elif event in _WRITES and self._inside(arguments[0]):
            self._step(takes_space=event in ("os.mkdir", "os.link"))

    def _inside(self, path: object) -> bool:
        return isinstance(path, str | Path) and str(Path(path).absolute()).startswith(self._folder)

    def _fsync(self, descriptor: int) -> None:
        if self.count + 1 == self._kill_at and os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        self._step(takes_space=True)

    def _step(self, takes_space: bool = False) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        refused = takes_space or self._error == errno.EROFS
        if refused and self._fail_at is not None and self.count >= self._fail_at:
            raise OSError(self._error, os.strerror(self._error), self._folder)


def _run_fill(job: dict[str, Any]) -> None:
    root, real = Path(job["root"]), tools.unit_arrays
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(manifest: Any, unit: Any) -> Any:
        os.write(log, f"{unit}\n".encode())
        return real(manifest, unit)

    tools.unit_arrays = noted
    counter = Steps(root.parent, job.get("kill_at"))
    try:
        tools.fill(root, tuple(job["names"]), job["rows"], job.get("pause", 0.0), job["backend"])
    except KdError as error:
        os.write(log, f"steps {counter.count}\n{error.message}".encode())
        sys.exit(error.exit_code)
    os.write(log, f"steps {counter.count}\n".encode())


def _run(job: dict[str, Any]) -> None:
    """What a fork does; it leaves like any Python program, but frees nothing: that takes longer than most commands."""
    code: object = 1
    try:
        _do(job)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _do(job: dict[str, Any]) -> None:
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    err = os.open(job["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "err" in job else 2
    for target, source in enumerate((quiet, quiet, err)):
        os.dup2(source, target)
    if "url" in job:
        from store_writing import run

        run(job)
        return
    if "argv" not in job:
        _run_fill(job)
        return
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    from kdcli.cli.app import main

    if "log" not in job:
        main(job["argv"])
    counter = Steps(Path(job["cwd"]), job.get("kill_at"), job.get("fail_at"), job.get("error", errno.ENOSPC))
    try:
        main(job["argv"])
    finally:
        Path(job["log"]).write_text(str(counter.count))


def _wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1000  # no exit code: it hung


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if "wait" in order:
            answer = _wait(order["wait"], order["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(order["start"])
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
