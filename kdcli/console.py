"""The only writer to the terminal: stdout carries data, stderr everything else."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, final

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_SECONDS = 30.0
"""A log that is no terminal gets a progress line at least this often."""


class Bar(Protocol):
    """A running progress display."""

    def advance(self, amount: int, **facts: object) -> None:
        """Count ``amount`` more units as done; ``facts`` are short extra values to show."""


@final
class PlainBar:
    """Progress as plain lines: no carriage return, no escape, one line per interval."""

    def __init__(self, console: "Console", total: int, unit: str, title: str) -> None:
        self._console, self._total, self._unit, self._title = console, total, unit, title
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int, **facts: object) -> None:
        """See :class:`Bar`."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else float("inf")
        extra = "".join(f", {name} {value}" for name, value in facts.items())
        self._console.note(
            f"{self._title}: {self._done}/{self._total} {self._unit}, "
            f"{rate:.1f} {self._unit}/s, {duration(left)} left{extra}"
        )


@final
class RichBar:
    """Progress as a live bar on a terminal."""

    def __init__(self, progress: "RichProgress", task: "TaskID", unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit

    def advance(self, amount: int, **facts: object) -> None:
        """See :class:`Bar`."""
        self._progress.update(
            self._task, advance=amount, facts=" ".join(f"{name} {value}" for name, value in facts.items())
        )
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, rate=f"{speed:.1f} {self._unit}/s" if speed else "")


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``42s``, ``3m20s``, ``5h07m``."""
    if seconds == float("inf"):
        return "?"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """Bytes as a person reads them, in powers of 1000: ``512 B``, ``3.4 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@final
class Console:
    """Notes, warnings and progress on stderr; tables and JSON documents on stdout."""

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.silent = False
        """Whether another process of the same run speaks: then neither notes nor warnings are printed."""
        self._warned: set[str] = set()

    def note(self, text: str) -> None:
        """One line of narration."""
        if not self.quiet and not self.silent:
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """One line that only ``--verbose`` shows."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """One line that the user should see even with ``--quiet``; the same text is printed once."""
        if text not in self._warned and not self.silent:
            self._warned.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def error(self, message: str, hint: str) -> None:
        """What is wrong and, on a second line, what to do."""
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
        sys.stderr.flush()

    def traceback(self, error: Exception) -> None:
        """Where a bug happened."""
        import traceback

        traceback.print_exception(error, file=sys.stderr)

    def document(self, value: Any) -> None:
        """Exactly one JSON document on stdout; of several ranks only the first prints."""
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(value, allow_nan=False), flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """An aligned plain table on stdout: the same bytes in a pipe and on a terminal; of ranks the first's."""
        if os.environ.get("RANK", "0") != "0":
            return
        cells = [[str(cell) for cell in row] for row in (header, *rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        sys.stdout.flush()

    @contextmanager
    def progress(self, total: int, unit: str, title: str) -> Iterator[Bar]:
        """Show how far a loop is: a bar on a terminal, else plain lines.

        The terminal test is ours: rich believes FORCE_COLOR even where stderr is a file.
        """
        if self.quiet or self.silent or not sys.stderr.isatty():
            yield PlainBar(self, total, unit, title)
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        with RichProgress(*columns, console=RichConsole(file=sys.stderr), transient=True) as progress:
            task = progress.add_task(title, total=total, rate="", facts="")
            yield RichBar(progress, task, unit)


console = Console()
