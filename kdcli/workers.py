"""Processes that decode images for this one: they end with it, and it notices when one of them does not answer."""

import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import queues
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, final

from kdcli.console import console
from kdcli.errors import DeviceError
from kdcli.runtime import STOP_SIGNALS

if TYPE_CHECKING:
    import types

Item = TypeVar("Item")

PATIENCE = 60.0
"""Seconds that a batch may take before the user is told who is waited for; then twice as long, and so on."""
_LAST_SECONDS = 1.0
"""That child processes of this one have to end by themselves when it does."""
_DEATH = re.compile(r"DataLoader worker \(pid\S* (?P<pids>[\d, ]+)\) (?P<how>.+?)\s*\.?\s*$", re.MULTILINE)


@final
class Watched(Iterable[Item]):
    """A DataLoader's items, every time anew. Whoever keeps the reader waiting is named after :data:`PATIENCE`.

    Iterating raises :class:`~kdcli.errors.DeviceError` when a worker was killed.

    Args:
        loader: with or without workers.
    """

    def __init__(self, loader: Iterable[Item]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Item]:
        with _named_deaths():  # begun at once: the workers are at it before the first item is asked for
            items = iter(self._loader)
        return self._watched(items)

    def _watched(self, items: Iterator[Item]) -> Iterator[Item]:
        with _named_deaths(), _Impatience() as waiting:
            while True:
                waiting.since = time.monotonic()
                try:
                    item = next(items)
                except StopIteration:
                    return
                waiting.since = None
                yield item


@contextmanager
def _named_deaths() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        known = worker_death(error)
        if known is None:
            raise
        raise known from error


def worker_death(error: Exception) -> DeviceError | None:
    """What torch says when a worker is gone, as an error of ours; None for any other error."""
    found = _DEATH.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return DeviceError(
        f"decode process {found['pids']} {found['how']}: somebody killed it, most likely the kernel because memory, "
        "or /dev/shm, was short",
        "Run the same command again, with fewer --workers, a smaller --batch-size, or in Docker more --shm-size; what "
        "was saved is kept.",
    )


@final
class _Impatience:
    """A thread that tells whom this process waits for, if it waits for long.

    Attributes:
        since: when the running wait began (monotonic seconds); None: there is none.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kd-patience", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        told, patience = None, PATIENCE
        while not self._done.wait(PATIENCE / 4):
            since = self.since
            if since is None or time.monotonic() - since < (patience if since == told else PATIENCE):
                continue
            waited = time.monotonic() - since
            told, patience = since, 2 * waited
            console.warn(f"waiting for a batch of images for {waited:.0f} s: {_whereabouts()}")


def _whereabouts() -> str:
    """What the decode processes are at."""
    states = {child.pid: _state(child.pid) for child in multiprocessing.active_children() if child.daemon}
    stopped = [str(pid) for pid, state in states.items() if state in "Tt"]
    if stopped:
        return (
            f"decode process {', '.join(stopped)} is stopped; 'kill -CONT {' '.join(stopped)}' lets it go on"
        )
    disk = [str(pid) for pid, state in states.items() if state == "D"]
    if disk:
        return f"decode process {', '.join(disk)} waits for the disk or file server with the images"
    running = ", ".join(map(str, states)) or str(os.getpid())
    return f"process {running} is at work on it; ^C twice ends this run, and the same command goes on"


def _state(pid: int | None) -> str:
    """One letter, as ps shows it; R where nothing tells it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "R"


def worker_setup(processes: int) -> Callable[[int], None] | None:
    """What to give a DataLoader as ``worker_init_fn``; its workers end with this process, come what may."""
    if not processes:
        return None
    # How many there should be is known better here than by torch, which counts processors only.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    _end_workers_at_exit(os.getpid())
    return worker_init


@functools.cache
def _end_workers_at_exit(_pid: int) -> None:
    from multiprocessing import util

    # Where an error's traceback still holds a loader, Python ends its workers by SIGTERM, which they ignore, and
    # waits for them for ever. This comes before that.
    util.Finalize(None, _end_workers, exitpriority=100)


def _end_workers() -> None:
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:  # torch's handler would take their end for a failure, and say so in a traceback
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.terminate()
    until = time.monotonic() + _LAST_SECONDS
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        child.kill()


def worker_init(_worker: int = 0) -> None:
    """Prepare a DataLoader worker: a signal to the whole job step must not kill it; one thread."""
    import torch

    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_hung_up
    queues.Queue._on_queue_feeder_error = staticmethod(_end_unless_handed_over)  # type: ignore[attr-defined]
    torch.set_num_threads(1)


def _end_unless_handed_over(error: Exception, _batch: object) -> None:
    """A batch that cannot be handed over, because /dev/shm is full, is lost, and the reader would wait for it for ever:
    it is told, and the worker's end is noticed."""
    if not isinstance(error, ConnectionError | EOFError):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        console.warn(f"decode process {os.getpid()} cannot hand over a batch through /dev/shm: {reason}")
    os._exit(1)


def _unless_hung_up(
    kind: type[BaseException], error: BaseException, trace: "types.TracebackType | None"
) -> None:
    """Errors of a worker's batches travel to the parent; this one is of the thread that hands them over.

    It finds the line dead when the parent was interrupted while it fetched a batch: nobody's bug.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
