"""Who is working on what: one file per claimed unit, created exclusively, refreshed while work goes on.

A claim only saves double work; it is never what keeps data right. Two writers that both believe to
own a unit (a clock that is off, a file system without O_EXCL) are caught at the commit, which is
created by link() and never overwritten.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from kdcli.cache.layout import Layout, Unit
from kdcli.runtime import storage_errors

STALE_SECONDS = 600.0
"""A claim of another host that was not refreshed for this long belongs to a dead writer."""
HEARTBEAT_SECONDS = 30.0


def _process_start(pid: int) -> str | None:
    """When ``pid`` started, in clock ticks since boot; None when it is not running.

    Told apart from a later process with the same number by this value.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[-1].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _job() -> str:
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID")
    return ".".join(os.environ[name] for name in names if name in os.environ)


@final
class Claims:
    """The claims of this process on one cache. Use as a context manager: leaving releases them all."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "job": _job(),
            "token": os.urandom(8).hex(),
        }
        self._held: set[Unit] = set()
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

    def acquire(self, unit: Unit) -> bool:
        """Claim ``unit``; take it over when its owner is dead. False when a live writer has it."""
        path = self._layout.claim(unit)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._create(path):
                if not self._is_stale(path):
                    return False
                self._bury(path)
                if not self._create(path):
                    return False
        with self._lock:
            self._held.add(unit)
        return True

    def release(self, units: Iterable[Unit]) -> None:
        """Give units back, whether they were finished or not."""
        for unit in units:
            with self._lock:
                self._held.discard(unit)
            if self.owns(unit):
                self._layout.claim(unit).unlink(missing_ok=True)

    def owns(self, unit: Unit) -> bool:
        """Whether the claim on disk is still this process's."""
        return self._read(self._layout.claim(unit)).get("token") == self._owner["token"]

    def holder(self, unit: Unit) -> str:
        """Who holds ``unit``, for a message."""
        owner = self._read(self._layout.claim(unit))
        job = f" job {owner['job']}" if owner.get("job") else ""
        return f"{owner.get('host', 'unknown host')} pid {owner.get('pid', '?')}{job}"

    def is_live(self, unit: Unit) -> bool:
        """Whether somebody who seems alive holds ``unit``."""
        path = self._layout.claim(unit)
        return path.exists() and not self._is_stale(path)

    def _create(self, path: Path) -> bool:
        # Written aside and linked: a claim is never seen half-written.
        temporary = self._layout.tmp / f"claim-{os.getpid()}-{os.urandom(8).hex()}"
        temporary.write_text(json.dumps(self._owner), encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _bury(self, path: Path) -> None:
        """Remove a stale claim. If another process was faster, its fresh claim is put back."""
        grave = self._layout.tmp / f"stale-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            path.rename(grave)
        except FileNotFoundError:
            return
        if not self._is_stale(grave):
            with suppress(FileExistsError):  # a third process may hold it by now; the commit decides
                os.link(grave, path)
        grave.unlink()

    def _is_stale(self, path: Path) -> bool:
        owner = self._read(path)
        if owner.get("host") == self._owner["host"] and "pid" in owner:
            return _process_start(int(owner["pid"])) != owner.get("started") or owner.get("started") is None
        try:
            age = self._now() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        return age > STALE_SECONDS

    def _now(self) -> float:
        """The file system's clock, not this host's: the two may disagree by more than the limit."""
        mark = self._layout.tmp / f"clock-{os.getpid()}-{os.urandom(4).hex()}"
        mark.touch()
        now = mark.stat().st_mtime
        mark.unlink()
        return now

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                held = list(self._held)
            for unit in held:
                try:
                    os.utime(self._layout.claim(unit))
                except FileNotFoundError:
                    continue  # taken over; the owner notices before its commit

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}


def wait_a_moment(seconds: float = 0.5) -> None:
    """Pause between two looks at other writers' claims."""
    time.sleep(seconds)
