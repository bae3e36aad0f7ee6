"""Steps of a longer job: each is printed as the command that a user would type, then run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, final

from kdcli.console import console
from kdcli.runtime import step_of_a_job

Result = TypeVar("Result")


@final
@dataclass(slots=True)
class Steps:
    """Prints each step as a command, runs it, and remembers both for the report.

    Attributes:
        commands: title, command and seconds of each step so far.
    """

    commands: list[tuple[str, str, float]] = field(default_factory=list)

    def run(self, title: str, command: str, step: Callable[[], Result]) -> Result:
        """Say ``title`` and ``command``, run ``step``, note how long it took."""
        console.note("", f"# {title}", f"$ {command}")
        start = time.perf_counter()
        with step_of_a_job():
            result = step()
        self.commands.append((title, command, time.perf_counter() - start))
        return result
