"""Who is working on what: one file per claimed unit, created exclusively, refreshed while work goes on.

A claim only saves double work; it is never what keeps data right. Two writers that both believe to
own a unit (a process that was stopped for long, a clock that was set) are caught at the commit, which
is created by link() and never overwritten.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, final

from annotated_types import Interval

from kdcli.cache.claiming import Claiming
from kdcli.cache.layout import Layout, Unit
from kdcli.cache.owned import read_own
from kdcli.console import console
from kdcli.documents import from_document, to_document
from kdcli.errors import Advice, ClaimedError
from kdcli.files import create_text, scratch_name, storage_errors
from kdcli.reading import parse_json
from kdcli.runtime import WORKER, machine

STALE_SECONDS: Final = 600.0
"""A claim that was not refreshed for this long belongs to a writer that is dead, or stopped; a cache, and a writer,
may have another limit."""
WORD_SECONDS = 10.0
"""A wait that lasts longer is told."""
HEARTBEAT_SECONDS: Final = 30.0
"""A claim is refreshed this often, and at least three times within its limit."""
LONGEST_TIMEOUT: Final = 10.0**6
_CLAIM_BYTES: Final = 2**16
_ended: set[str] = set()
"""Tokens of this process that hold nothing any more, whatever a disk that became read-only still says."""


def is_running(pid: int, started: str | None = None) -> bool:
    """Whether a process of this machine runs, and is not a later one that was given the same number.

    Args:
        pid: its number.
        started: when it started, of :func:`process_start`; None: any process of that number will do.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    state, start = _stat(pid)
    return state not in ("Z", "X") and (started is None or start is None or start == started)


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, as by SIGSTOP or Ctrl-Z: its heartbeat is, too."""
    return _stat(pid)[0] in ("T", "t")


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where that cannot be known."""
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, str | None]:
    """State and start of a process; nothing is known where there is no /proc, or it hides other users' processes."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?", None
    fields = stat.rsplit(")", 1)[-1].split()
    return fields[0], fields[19]


def filesystem_now(folder: Path) -> float:
    """The clock of a folder's file system, not this host's: the two may disagree by more than the limit."""
    mark = folder / scratch_name()
    try:
        mark.touch()
        return mark.stat().st_mtime
    except OSError:  # read-only, or full: this host's has to do
        return time.time()
    finally:
        with suppress(OSError):
            mark.unlink()


def _job() -> str:
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID")
    return ".".join(os.environ[name] for name in names if name in os.environ)


@final
@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a claim; of one that cannot be read nothing is known.

    Attributes:
        host, machine, pid: which process where.
        started: when it started, of :func:`process_start`.
        job: of the scheduler that runs it.
        token: new in every :class:`Claims`.
        worker: what a supervisor calls the process; empty without one.
        timeout: seconds of silence after which the claim is free.
    """

    host: str = "unknown host"
    machine: str = ""
    pid: int | None = None
    started: str | None = None
    job: str = ""
    token: str = ""
    worker: str = ""
    timeout: Annotated[float, Interval(gt=0, le=LONGEST_TIMEOUT)] = STALE_SECONDS

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return min(HEARTBEAT_SECONDS, self.timeout / 3)

    @classmethod
    def here(cls, timeout: float = STALE_SECONDS) -> "Owner":
        """The process that asks, with a new token."""
        pid, token, worker = os.getpid(), os.urandom(8).hex(), os.environ.get(WORKER, "")
        return cls(socket.gethostname(), machine(), pid, process_start(pid), _job(), token, worker, timeout)

    def limit(self, timeout: float | None) -> float:
        """Seconds of silence after which another process takes this one for dead.

        Args:
            timeout: the other one's; it gives three heartbeats at least. None: what this one said.
        """
        return self.timeout if timeout is None else min(max(timeout, 3 * self.beat), self.timeout)

    def has_ended(self, here: "Owner") -> bool:
        """Whether it is known to have ended, because it was a process of the same machine."""
        near = (self.host, self.machine) == (here.host, here.machine)
        return near and self.pid is not None and not is_running(self.pid, self.started)

    def __str__(self) -> str:
        return (
            f"{self.host} pid {'?' if self.pid is None else self.pid}{f' job {self.job}' if self.job else ''}"
        )


def read_owner(path: Path) -> Owner:
    """The owner in the file of a claim."""
    try:
        return from_document(Owner, parse_json(read_own(path, _CLAIM_BYTES), path), path)
    except (OSError, ValueError):  # ours are of these kinds, too
        return Owner()


@final
class Claims(Claiming):
    """Claims in files. Use as a context manager: leaving releases them all.

    Args:
        layout: of the cache.
        timeout: seconds after which its own claims are free if this process falls silent, and those of others, which
            are given three heartbeats at least; None: each claim's own.
        usual: of its own claims where ``timeout`` is None.
    """

    def __init__(self, layout: Layout, timeout: float | None = None, usual: float = STALE_SECONDS) -> None:
        self._layout, self._timeout = layout, timeout
        self._owner = Owner.here(timeout or usual)
        self._buried: set[str] = set()
        self._held: set[Unit] = set()
        self._seen: dict[Path, tuple[float, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        self._thread = threading.Thread(target=self._beat, name="kd-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.release(list(self._held))
        _ended.add(self._owner.token)

    def acquire(self, unit: Unit) -> bool:
        """See the base."""
        path = self._layout.claim(unit)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._take(path):
                return False
        with self._lock:
            self._held.add(unit)
        return True

    def release(self, units: Iterable[Unit]) -> None:
        """See the base."""
        for unit in units:
            with self._lock:
                self._held.discard(unit)
            with suppress(OSError):
                if self.owns(unit):
                    self._layout.claim(unit).unlink()

    @contextmanager
    def alone(self, part: str) -> Iterator[None]:
        """Wait for the sole right to rewrite the records of ``part``: two at once would undo each other.

        Raises:
            ClaimedError: another writer does not give it back.
        """
        records = Unit(part, -1, 0)  # no unit of work, but claimed like one
        patience = Patience()
        while not self.acquire(records):
            if patience.waited > 2 * self._owner.timeout:  # a writer that hangs while its heart beats
                raise ClaimedError(
                    f"{self._layout.root}: {self.holder(records)} has rewritten the records of {part} for "
                    f"{patience.waited:.0f} seconds",
                    Advice("holder", cache=self._layout.root),
                )
            patience.wait(f"{self.holder(records)}, which rewrites the records of {part}", 0.05)
        try:
            yield
        finally:
            self.release([records])

    def bury(self, *workers: str) -> None:
        """Free at once what workers hold that their supervisor knows to be dead, on whatever host.

        Args:
            workers: what the supervisor called them (:data:`~kdcli.runtime.WORKER`).
        """
        self._buried.update(workers)
        with storage_errors(self._layout.claims):
            held = [path for path in self._layout.claims.rglob("*") if read_owner(path).worker in workers]
        for path in held:
            self.discard(path)

    def discard(self, path: Path) -> bool:
        """Remove the file of a dead claim; False when its owner seems alive."""
        with storage_errors(path):
            if not self.is_dead(path) or not self._take(path):
                return False
            path.unlink(missing_ok=True)
        return True

    def owns(self, unit: Unit) -> bool:
        """Whether the claim on disk is still this process's."""
        return read_owner(self._layout.claim(unit)).token == self._owner.token

    def names(self, part: str) -> set[str]:
        """Stems of the units of a part that have a claim, of the living or the dead, by one listing."""
        folder = self._layout.claims / part
        with storage_errors(folder):
            return {path.stem for path in folder.glob("*.json")}

    def holder(self, unit: Unit) -> str:
        """See the base."""
        return str(read_owner(self._layout.claim(unit)))

    def is_live(self, unit: Unit) -> bool:
        """See the base."""
        path = self._layout.claim(unit)
        return path.exists() and not self.is_dead(path)

    def is_dead(self, path: Path) -> bool:
        """Whether the owner of the claim in ``path`` is dead, or has been silent for too long."""
        owner = read_owner(path)
        if owner.token in _ended or owner.worker in self._buried:
            return True
        near = (owner.host, owner.machine) == (self._owner.host, self._owner.machine)
        running = near and owner.pid is not None and is_running(owner.pid, owner.started)
        if near and owner.pid is not None and not running:
            return True
        try:
            touched = path.lstat().st_mtime
        except FileNotFoundError:
            return False
        # A machine that slept for hours has clocks that jump before its writers' hearts beat again: whoever runs on
        # it has to be seen silent from here.
        age, seen = self._silence(path, touched)
        only_seen = running and owner.pid is not None and not is_stopped(owner.pid)
        return (seen if only_seen else max(age, seen)) > owner.limit(self._timeout)

    def _take(self, path: Path) -> bool:
        """Create the file of a claim, in the place of a dead one if there is one."""
        if self._create(path):
            return True
        found = self._identity(path)
        if not found or not self.is_dead(path):
            return False
        # Only one process may remove this very claim: a slower one, that found it dead as well, would
        # remove the claim of the faster one. The right to do so is a claim, too, and can be inherited.
        right = path.with_name(f"{path.name}.{found}")
        if not self._take(right):
            return False
        try:
            if self._identity(path) == found:
                path.unlink()
            return self._create(path)
        finally:
            right.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        return create_text(path, json.dumps(to_document(self._owner)), self._layout.tmp, durable=False)

    @staticmethod
    def _identity(path: Path) -> str:
        """Tells a claim from a later one of the same name; empty when there is none."""
        try:
            return hashlib.sha256(read_own(path, _CLAIM_BYTES)).hexdigest()[:16]
        except FileNotFoundError:
            return ""

    def _silence(self, path: Path, touched: float) -> tuple[float, float]:
        """Seconds since a claim was refreshed: its age, and how long it was seen untouched from here.

        The latter counts when its time lies ahead, because a clock was set back.
        """
        now = time.monotonic()
        last, since = self._seen.get(path, (touched, now))
        if last != touched:
            since = now
        self._seen[path] = (touched, since)
        return filesystem_now(self._layout.tmp) - touched, now - since

    def _beat(self) -> None:
        while not self._stop.wait(self._owner.beat):
            with self._lock:
                held = list(self._held)
            for unit in held:
                # Only its own: to refresh the claim of who took over would keep that alive after its death.
                # Nor is a disk that refuses this thread's business: the next write says so.
                with suppress(OSError):
                    if self.owns(unit):
                        os.utime(self._layout.claim(unit))


@final
class Patience:
    """A wait for other writers: pauses between two looks at their claims, and says whom they are of if it lasts."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._told = ""

    @property
    def waited(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def wait(self, whom: str, seconds: float = 0.5) -> None:
        """Pause; each of those who are waited for is told once.

        Args:
            whom: of :meth:`Claims.holder`, and what they are at.
            seconds: how long.
        """
        if self.waited > WORD_SECONDS and whom != self._told:
            console.note(f"waiting for {whom}; ^C ends this run, and the same command goes on later")
            self._told = whom
        wait_a_moment(seconds)


def wait_a_moment(seconds: float = 0.5) -> None:
    """Pause between two looks at other writers' claims."""
    time.sleep(seconds)
