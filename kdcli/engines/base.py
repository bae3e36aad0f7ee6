"""What an engine is, and what travels between a supervisor and its workers: a job there, an outcome back, as JSON."""

import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, final

NAMES = {number.value: number.name for number in signal.Signals}


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One life of a worker: a command line of kd.

    Attributes:
        worker: what the supervisor calls this life, and no other.
        number: of the worker, from 0.
        arguments: what follows ``kd``.
        folder: working directory.
        log: file that gets what the worker says; it is appended to.
        environment: variables beside those that are there.
    """

    worker: str
    number: int
    arguments: tuple[str, ...]
    folder: str
    log: str
    environment: dict[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """How a life of a worker ended.

    Attributes:
        code: its exit code; the negative number of the signal that killed it; None where it is gone without a trace.
        answer: the JSON document that it printed, its result or its error; empty without one.
        last: the last line of its log, or what the engine says.
        warnings: those in its log.
    """

    code: int | None
    answer: dict[str, Any] = field(default_factory=dict)
    last: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """The end, for a message."""
        if self.code is None:
            return "was lost"
        return (
            f"was killed by {NAMES.get(-self.code, -self.code)}"
            if self.code < 0
            else f"ended with {self.code}"
        )


class Attempt(ABC):
    """Abstract: one life of a worker, as its supervisor sees it."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether it has begun to run: it may wait for a machine first."""

    @abstractmethod
    def poll(self) -> Outcome | None:
        """How it ended; None while it has not."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save what is done, and to end."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once."""

    @abstractmethod
    def where(self) -> str:
        """Where it is, for a message."""


class Engine(ABC):
    """Abstract: who runs workers. Use as a context manager."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most hold nothing
        """Let go of what the engine holds."""

    @abstractmethod
    def start(self, job: Job) -> Attempt:
        """Run a worker, now or as soon as there is room.

        Raises:
            KdError: the engine cannot.
        """
