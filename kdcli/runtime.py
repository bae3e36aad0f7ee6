"""What the process lives in: processors, devices, shards, signals, versions."""

import functools
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, final

from kdcli.cgroups import processor_quota
from kdcli.devices import choose, device_error, visible
from kdcli.errors import DeviceError, StoppedEarly, UsageError

if TYPE_CHECKING:
    import types

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WORKER = "KD_WORKER"
"""Environment variable: what the supervisor of this process calls it."""
REPEAT_SECONDS = 1.0
"""A second stop signal within this time is the same one again: schedulers signal a step and its group."""
_HAS_AFFINITY = "sched_getaffinity" in dir(os)  # not on macOS


# --- processors and devices -------------------------------------------------------------------


def processor_count() -> int:
    """Processors this job may use, not those of the whole node: the least of what limits it.

    That is its affinity mask, the quota of its container, and what Slurm gives a task.
    """
    seen = len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1
    task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = (seen, processor_quota(), int(task) if task.isdecimal() else None)
    return min(limit for limit in limits if limit)


def worker_count(requested: int | None) -> int:
    """Decode processes to start: what was asked for, else one per processor but one (at most 16).

    Processes that torchrun started on this machine share its processors.
    """
    if requested is not None:
        return requested
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = processor_count() // max(1, int(local) if local.isdecimal() else 1)
    return max(0, min(16, share - 1))


def pick_device(name: str) -> str:
    """``auto`` becomes cuda when there is one (of several processes on a machine: each its own), else cpu.

    Raises:
        DeviceError: there is no such device here.
    """
    import torch

    chosen = choose(name, visible())
    if name != "auto":
        try:
            torch.empty(0, device=torch.device(chosen))
        except (RuntimeError, AssertionError) as error:
            known = device_error(error, name)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise known or DeviceError(
                f"device '{name}' cannot be used: {reason}", "Use --device auto or cpu."
            ) from error
    return chosen


def calm_openmp() -> None:
    """Make OpenMP's idle threads sleep soon instead of spinning; call before torch is imported.

    On processors that are shared with another job (two students on one node, decode processes) spinning
    threads keep the working ones from running: two trainings at once on two processors ran at 0.2 steps/s
    each, and at 6.5 with this setting; alone it costs nothing (16.5 both). A user's own setting stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


# --- shards -----------------------------------------------------------------------------------


@final
class Shard:
    """Share ``index`` of ``count`` of the blocks: block b belongs to it when b % count == index."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def owns(self, block: int) -> bool:
        """Whether block number ``block`` is this shard's."""
        return block % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


_SHARD_SOURCES = {
    "array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", None),
    "torchrun": ("RANK", "WORLD_SIZE", None),
}


def parse_shard(text: str | None) -> Shard | None:
    """``i/n``, or the name of what the scheduler set: array, srun or torchrun. Never implied.

    Raises:
        UsageError: not of that form, i outside 0..n-1, or the variables are not set.
    """
    if text is None:
        return None
    if text in _SHARD_SOURCES:
        index_name, count_name, minimum_name = _SHARD_SOURCES[text]
        needed = [index_name, count_name]
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise UsageError(
                f"--shard {text} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not set",
                f"Start kd under {text}, or give --shard i/n.",
            )
        given = [name for name in _SHARD_SOURCES[text] if name is not None and name in os.environ]
        _require_numbers(text, given)
        first = int(os.environ.get(minimum_name, "0")) if minimum_name else 0
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")) if text == "array" else 1
        index, count = (int(os.environ[index_name]) - first) // step, int(os.environ[count_name])
    else:
        head, slash, tail = text.partition("/")
        if not (slash and head.isdecimal() and tail.isdecimal()):
            raise UsageError(
                f"--shard {text} is not i/n", "Give --shard 0/4 to 3/4, or array, srun, torchrun."
            )
        index, count = int(head), int(tail)
    if count < 1 or not 0 <= index < count:
        raise UsageError(
            f"--shard {text} is outside its range: {index} of {count}",
            f"Shards count from 0: 0/{max(count, 1)} to {max(count, 1) - 1}/{max(count, 1)}.",
        )
    return Shard(index, count)


def _require_numbers(shard: str, names: list[str]) -> None:
    """Refuse a scheduler variable that is no whole number.

    Raises:
        UsageError: naming the variable and its value.
    """
    for name in names:
        value = os.environ[name]
        if not value.isdecimal():
            raise UsageError(f"--shard {shard}: {name} is '{value}', not a whole number", "Give --shard i/n.")


# --- signals ----------------------------------------------------------------------------------


@final
class StopNow(BaseException):
    """A signal arrived where nothing needs saving. No ``except Exception`` on the way takes it for an error."""


@final
class StopFlag:
    """Truthy once SIGTERM, SIGUSR1 or SIGINT has arrived; nothing else happens in the handler.

    A second signal takes the rest of the grace: whoever sends it does not want to wait any longer.

    Attributes:
        at_once: while it is set, a signal ends :func:`stop_signals`' block at once, by :class:`StopNow`:
            for work of which a part is worth nothing.
        interrupted: whether it was SIGINT: somebody at a terminal pressed ^C.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._hurry = False
        self.at_once = self.interrupted = False

    def __bool__(self) -> bool:
        return self._since is not None

    def seconds(self) -> float:
        """Seconds since the signal; 0.0 when none arrived, infinite after a second one."""
        if self._since is None:
            return 0.0
        return float("inf") if self._hurry else time.monotonic() - self._since

    def set(self) -> None:
        """Ask for a stop; asked again, for one without grace."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > REPEAT_SECONDS:
            self._hurry = True


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGTERM, SIGUSR1 and SIGINT (^C) into a flag for the time of the block; the old handlers come back.

    What is done is then saved, and :class:`~kdcli.errors.StoppedEarly` leaves the block with exit code 75, or 130
    after ^C. A second ^C, later than :data:`REPEAT_SECONDS`, ends the block at once, as it would outside.

    Outside the main thread, where handlers cannot be set, the flag is simply never raised.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(_number: int, _frame: "types.FrameType | None") -> None:
        flag.set()
        if flag.at_once:
            raise StopNow

    def interrupt(number: int, frame: "types.FrameType | None") -> None:
        again, flag.interrupted = bool(flag), True
        flag.set()
        if callable(outside) and (flag.at_once or flag.seconds() == float("inf")):
            outside(number, frame)
        elif not again and os.environ.get("RANK", "0") == "0":
            os.write(
                2, b"\nstopping, what is done is saved first; ^C again ends at once\n"
            )  # print is not reentrant

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    outside = signal.getsignal(signal.SIGINT)
    if callable(outside):  # not ignored, as behind nohup
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield flag
    except StoppedEarly as stopped:
        if flag.interrupted:
            stopped.exit_code = 128 + signal.SIGINT
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if flag:
            _late.append(flag)


_late: list[StopFlag] = []


@contextmanager
def step_of_a_job() -> Iterator[None]:
    """For one of several steps: a signal that came too late to cut the step short ends the job after it.

    Raises:
        StoppedEarly: the step is complete, and a signal arrived in it.
    """
    _late.clear()
    yield
    if _late:
        stopped = StoppedEarly(
            "stopped by a signal; what is done is kept", "Run the same command again to go on."
        )
        if any(flag.interrupted for flag in _late):
            stopped.exit_code = 128 + signal.SIGINT
        raise stopped


# --- machine and versions ---------------------------------------------------------------------


@functools.cache
def machine() -> str:
    """Digest that names a machine since it was started; a container on it is another one.

    Processes with equal values see each other by number. A host name does not tell that: nodes of a
    cloud and containers are often all called the same.
    """
    known = [socket.gethostname()]
    with suppress(OSError):  # not on macOS
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def versions(*more: str) -> dict[str, str]:
    """Versions of what can change bits: recorded in caches and runs, warned about, never gated.

    Args:
        more: further packages that a result depends on.
    """
    import platform
    from importlib import metadata

    from kdcli._version import __version__

    names = ("torch", "torchvision", "timm", "numpy", "pillow", "zarr", *more)
    return {"kd": __version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}
