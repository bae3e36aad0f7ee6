"""Keeps the workers of a task at work: dead ones are replaced, refusals and stops are those of all.

What is done is told from disk or store by the task; the engine tells who is alive. Nothing else is said between
processes.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from kdcli.console import Bar, console, counted
from kdcli.engines.base import Attempt, Engine, Job, Outcome
from kdcli.engines.config import EngineOptions
from kdcli.engines.opening import open_engine
from kdcli.errors import DeviceError, KdError, StoppedEarly, raised_elsewhere
from kdcli.runtime import StopFlag, processor_count, stop_signals

LOOK_SECONDS: Final = 0.5
"""Between two looks at the workers and the disk; longer where a look takes long."""
START_SECONDS: Final = 60.0
"""A worker that has not begun to run after so long is named; then again after twice as long, and so on."""
DEATHS: Final = 3
"""A worker that dies this often while nothing is finished is given up, and the run with it."""
LAST_SECONDS: Final = 60.0
"""That workers have to end when they are asked to, beyond their own grace."""
_REFUSALS: Final = frozenset((2, *range(10, 33)))


class Task(ABC):
    """Abstract: what workers do together.

    Attributes:
        title, unit: of the progress display.
        grace: seconds that a stop leaves a worker.
        pause: least seconds between two looks at the progress.
        ends: exit codes of a worker that has nothing more to do.
    """

    title: str
    unit: str
    grace: float = 0.0
    pause: float = 0.0
    ends: frozenset[int] = frozenset((0,))

    @abstractmethod
    def arguments(self, number: int) -> Sequence[str]:
        """The command line of one worker, after ``kd``."""

    @abstractmethod
    def progress(self) -> tuple[int, int] | None:
        """Units done and in all, told from the disk or store; None while that is not known."""

    @abstractmethod
    def bury(self, *workers: str) -> None:
        """Free what dead workers hold."""


@final
@dataclass
class _Worker:
    """One of the workers, through all its lives."""

    number: int
    log: Path
    life: int = -1
    deaths: int = 0
    began: float = 0.0
    told: float = START_SECONDS
    attempt: Attempt | None = None
    warnings: set[str] = field(default_factory=set)


def supervise(task: Task, options: EngineOptions, logs: Path) -> list[Outcome]:
    """Run workers until each has ended well.

    Args:
        task: what they do.
        options: how many of them there are, and who runs them.
        logs: folder in which this run's folder of logs is made.

    Returns:
        How each worker ended: with one of the task's ``ends``.

    Raises:
        StoppedEarly: a signal arrived; the workers saved what they had.
        KdError: what a worker refused, or DeviceError: one that died again and again.
    """
    run = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    folder = (logs / run).absolute()
    with stop_signals() as stop, _opened(options, folder) as engine:
        console.note(f"{counted(options.num_workers, 'workers')} ({options.engine}), logs: {folder}")
        return _Supervisor(task, options, engine, folder).run(stop)


def _opened(options: EngineOptions, folder: Path) -> Engine:
    """The engine; one that is refused leaves no empty folders."""
    try:
        return open_engine(options, folder)
    except KdError:
        with suppress(OSError):
            for each in (folder, folder.parent):
                each.rmdir()
        raise


@final
class _Display(ExitStack):
    """The one progress display, from the task's looks at the disk: it appears when there is something to tell."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task, self._done, self._next = task, 0, 0.0
        self._bar: Bar | None = None

    def look(self, said: str, at_once: bool = False) -> bool:
        """Look, unless that took long just now; whether more is done than at the last look.

        Args:
            said: what is to be shown beside it.
            at_once: look however long that took.
        """
        began = time.monotonic()
        if began < self._next and not at_once:
            return False
        found = self._task.progress()
        self._next = began + max(self._task.pause, 10 * (time.monotonic() - began))
        if not found or not found[1]:
            return False
        if self._bar is None:
            self._bar = self.enter_context(console.progress(found[1], self._task.unit, self._task.title))
        more = max(0, found[0] - self._done)
        self._bar.advance(more, said)
        self._done += more
        return more > 0


@final
class _Supervisor:
    def __init__(self, task: Task, options: EngineOptions, engine: Engine, folder: Path) -> None:
        self._task, self._options, self._engine, self._run = task, options, engine, folder.name
        self._workers = [_Worker(n, folder / f"worker-{n}.log") for n in range(options.num_workers)]
        self._ended: dict[int, Outcome] = {}
        self._display = _Display(task)

    def run(self, stop: StopFlag) -> list[Outcome]:
        """See :func:`supervise`."""
        try:
            for worker in self._workers:
                self._start(worker)
            with self._display:
                while len(self._ended) < len(self._workers):
                    self._forgive()
                    if stop:
                        self._end(stop)
                        raise self._stopped()
                    for worker in self._workers:
                        self._look(worker, stop)
                    time.sleep(LOOK_SECONDS)
        finally:
            self._bury_all()
        return [self._ended[worker.number] for worker in self._workers]

    def _forgive(self, at_once: bool = False) -> None:
        """Deaths count while nothing is finished: forget them when something is."""
        at_work = sum(each.attempt is not None and each.attempt.started for each in self._workers)
        if self._display.look(f"{at_work} of {counted(len(self._workers), 'workers')}", at_once):
            for worker in self._workers:
                worker.deaths = 0

    def _stopped(self) -> StoppedEarly:
        done, total = self._task.progress() or (0, 0)
        left = f" with {total - done} {self._task.unit} left" if total else ""
        return StoppedEarly(
            f"stopped by a signal{left}; what is finished is kept", "Run the same command again to go on."
        )

    def _name(self, worker: _Worker) -> str:
        return f"{self._run}-{worker.number}.{worker.life}"

    def _start(self, worker: _Worker) -> None:
        worker.life, worker.began, worker.told = worker.life + 1, time.monotonic(), START_SECONDS
        worker.attempt = self._engine.start(
            Job(
                self._name(worker), worker.number, tuple(self._task.arguments(worker.number)), os.getcwd(),  # noqa: PTH109
                str(worker.log), threads(self._options),
            )
        )  # fmt: skip

    def _look(self, worker: _Worker, stop: StopFlag) -> None:
        """See how a worker is; put another in the place of a dead one."""
        if worker.attempt is None:
            return
        outcome = worker.attempt.poll()
        if outcome is None:
            self._tell_late(worker, worker.attempt)
            return
        where, worker.attempt = worker.attempt.where(), None
        for warning in outcome.warnings:
            console.warn(warning)
        if outcome.code in self._task.ends:
            self._ended[worker.number] = outcome
            return
        self._task.bury(self._name(worker))
        if outcome.code in _REFUSALS and "error" in outcome.answer:
            console.note(f"worker {worker.number} refused, and all end; its log: {worker.log}")
            self._end(stop)
            raise raised_elsewhere(outcome.answer)
        if worker.deaths + 1 >= DEATHS:  # the last look may be old: looks at a large cache are rare
            self._forgive(at_once=True)
        worker.deaths += 1
        said = f"worker {worker.number} ({where}) {outcome.how}"
        if worker.deaths >= DEATHS:
            self._end(stop)
            raise DeviceError(
                f"{said}, {worker.deaths} times while nothing was finished; its last line: {outcome.last}",
                f"Its log: {worker.log}. What is finished is kept: the same command goes on.",
            )
        console.note(f"{said}; what it held is free, and another takes its place; log: {worker.log}")
        self._start(worker)

    def _tell_late(self, worker: _Worker, attempt: Attempt) -> None:
        waited = time.monotonic() - worker.began
        if not attempt.started and waited > worker.told:
            worker.told = 2 * waited
            console.warn(
                f"worker {worker.number} has not started after {waited:.0f} s: {attempt.where()}; ^C ends this run, "
                "and the same command goes on"
            )

    def _end(self, stop: StopFlag) -> None:
        """Ask all to end, and wait for them as long as they may take; a second signal ends them at once."""
        alive = {worker.number: worker.attempt for worker in self._workers if worker.attempt is not None}
        for attempt in alive.values():
            attempt.stop()
        until = time.monotonic() + self._task.grace + LAST_SECONDS
        while alive and time.monotonic() < until and stop.seconds() != float("inf"):
            for number, attempt in list(alive.items()):
                if attempt.poll() is not None or not attempt.started:
                    del alive[number]
            time.sleep(0.1)

    def _bury_all(self) -> None:
        """Nobody of this run is left, and nothing is held by it."""
        left = {self._name(each): each.attempt for each in self._workers if each.attempt is not None}
        for attempt in left.values():
            attempt.kill()
        if left:
            self._task.bury(*left)


def cpus(options: EngineOptions) -> int:
    """Processors of each worker."""
    if options.cpus_per_worker is not None or options.engine != "local":
        return options.cpus_per_worker or 1
    return max(1, processor_count() // options.num_workers)


def threads(options: EngineOptions) -> dict[str, str]:
    """Variables that keep a worker's arithmetic to its processors; a user's own setting stands."""
    if options.cpus_per_worker is None and "OMP_NUM_THREADS" in os.environ:
        return {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cpus(options)))
