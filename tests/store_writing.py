"""Writers of a cache in a bucket with the numpy teachers of cache_tools, as processes that are killed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cache_tools as tools
from store_servers import Faulty

from kdcli.cache.layout import load_manifest
from kdcli.cache.stores.founding import adopt, found
from kdcli.cache.stores.leases import Pace, probe
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.push import push
from kdcli.cache.stores.writer import StoreWriter
from kdcli.errors import KdError

QUICK = Pace(0.3, 4.0)
"""Stores tell the time in whole seconds, so less than some of them is no limit."""


def bucket(url: str) -> ObjectPlace:
    place = open_place(url)
    assert isinstance(place, ObjectPlace)
    return place


@contextmanager
def writing(url: str, rows: int = 64, pace: Pace = QUICK) -> Iterator[StoreWriter]:
    """A writer that is not entered yet, of a cache that it makes where there is none."""
    with TemporaryDirectory(prefix="skeleton") as folder:
        place, root = bucket(url), Path(folder, "c.kd")
        if not adopt(place, root):
            probe(place)
            keys, labels = tools.keys_of(rows), tools.labels_of(rows)
            found(place, root, tools.manifest_of(keys, labels), keys, labels)
        yield StoreWriter(place, root, load_manifest(root), pace)


def fill(url: str, names: tuple[str, ...] = ("t",), rows: int = 64, pause: float = 0.0) -> int:
    """Fill what is missing, as a job would. Returns the units written."""
    with writing(url, rows) as writer, writer:
        return tools.complete(writer, names, pause)


def run(job: dict[str, Any]) -> None:
    """In a process of its own: ``url``, ``env``, and either ``push``, a cache, or ``names`` and ``rows``."""
    os.environ.update(job["env"])
    try:
        if "push" in job:
            push(Path(job["push"]), job["url"])
        else:
            fill(job["url"], tuple(job["names"]), job["rows"], job.get("pause", 0.0))
    except KdError as error:
        os.write(2, f"{error.message}\n".encode())
        raise SystemExit(error.exit_code) from error


class Killer:
    """A fault of a proxy: the process dies with its n-th request, which is done ("lost") or not ("drop")."""

    def __init__(self, proxy: Faulty, number: int, how: str) -> None:
        self._left, self._how = number, how
        self._lock, self._known, self._pid = threading.Lock(), threading.Event(), 0
        proxy.fault = self

    def aim(self, pid: int) -> None:
        self._pid = pid
        self._known.set()

    def __call__(self, *_: Any) -> str | None:
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return None
        self._known.wait(10)
        with suppress(ProcessLookupError):  # it was done before
            os.kill(self._pid, signal.SIGKILL)
        return self._how
