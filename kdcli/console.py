"""The only writer to the terminal: stdout carries data, stderr everything else."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from kdcli.errors import named

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, TaskID

PLAIN_SECONDS = 30.0
"""A log that is no terminal gets a progress line at least this often."""
_REDRAW_SECONDS: Final = 0.2

_OBEYED: Final = re.compile(
    # C0, DEL and C1; marks that turn the direction of text; separators of lines; invisible tags; half characters
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""What a terminal, an editor or a page obeys or hides instead of showing it."""

_FORMULAS: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with in a spreadsheet, in either width."""


def shown(text: object, keep: str = "") -> str:
    """Text as it may be shown: characters that a terminal would obey or hide are written as ``\\x1b``, ``\\u202e``.

    Args:
        text: whatever is to be shown; names of files, classes and teachers may hold anything.
        keep: characters to leave as they are, such as a newline where it is meant.
    """

    def written(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _OBEYED.sub(written, named(str(text)))


def inert(cell: object) -> object:
    """A cell of a CSV or TSV file that a spreadsheet takes for text where it is text.

    A text that begins with ``= + - @``, which would be a formula, gets a single quote in front (OWASP); numbers stay
    numbers. Control characters are escaped as on a terminal.
    """
    if not isinstance(cell, str):
        return cell
    calculates = cell.lstrip().startswith(_FORMULAS) or cell.startswith(("\t", "\r", "\n"))
    return f"'{shown(cell)}" if calculates else shown(cell)


class Bar(Protocol):
    """A running progress display."""

    def advance(self, amount: int, said: str = "", **facts: object) -> None:
        """Count ``amount`` more units as done.

        Args:
            amount: units.
            said: what else there is to say, in words.
            facts: short values, the first ones the most important: a narrow display cuts from the right.
        """


def _told(facts: Mapping[str, object], said: str) -> list[str]:
    named = [f"{name.replace('_', ' ')} {value}" for name, value in facts.items()]
    return [shown(each) for each in (*named, said) if each]


@final
class PlainBar:
    """Progress as plain lines: no carriage return, no escape, one line per interval."""

    def __init__(self, console: "Console", total: int, unit: str, title: str) -> None:
        self._console, self._total, self._unit, self._title = console, total, unit, title
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int, said: str = "", **facts: object) -> None:
        """See :class:`Bar`."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else float("inf")
        extra = "".join(f", {each}" for each in _told(facts, said))
        self._console.note(
            f"{self._title}: {self._done}/{self._total} {self._unit}, "
            f"{per_second(rate)} {self._unit}/s, {duration(left)} left{extra}"
        )


@final
class RichBar:
    """Progress as a live bar on a terminal."""

    def __init__(self, progress: "RichProgress", task: "TaskID", unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit

    def advance(self, amount: int, said: str = "", **facts: object) -> None:
        """See :class:`Bar`."""
        self._progress.update(self._task, advance=amount)
        speed = self._progress.tasks[0].speed
        timed = any(name.endswith("/s") for name in facts)
        rate = [f"{per_second(speed)} {self._unit}/s"] if speed and not timed else []
        self._progress.update(self._task, facts="  ".join([*rate, *_told(facts, said)]))


@final
class NotebookBar:
    """Progress as one line of a notebook, of the browser's own element; IPython alone is needed."""

    def __init__(self, total: int, unit: str, title: str) -> None:
        import IPython.display

        screen: Any = IPython.display  # it has no types
        self._html, self._total, self._unit, self._title = screen.HTML, total, unit, shown(title)
        self._done, self._start, self._last = 0, time.monotonic(), 0.0
        self._handle = screen.display(self._line([]), display_id=True)

    def advance(self, amount: int, said: str = "", **facts: object) -> None:
        """See :class:`Bar`."""
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _REDRAW_SECONDS or self._done >= self._total:
            self._last = now
            self._handle.update(self._line(_told(facts, said)))

    def _line(self, told: Sequence[str]) -> Any:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left = duration((self._total - self._done) / rate if rate else float("inf"))
        words = [f"{self._done}/{self._total}", f"{left} left", f"{per_second(rate)} {self._unit}/s", *told]
        bar = f'<progress value="{self._done}" max="{self._total}"></progress>'
        return self._html(f"{escape(self._title)} {bar} {escape(', '.join(words))}")


def in_notebook() -> bool:
    """Whether an IPython kernel shows what this process prints."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def bar_columns(width: int) -> "tuple[ProgressColumn, ...]":
    """What a live bar consists of: title, bar, count and time left stay whole, and facts are cut from the right.

    Args:
        width: columns of the terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def whole() -> Column:
        return Column(no_wrap=True)

    title = Column(no_wrap=True, max_width=max(8, width // 4), overflow="ellipsis")
    return (
        TextColumn("{task.description}", markup=False, table_column=title),
        BarColumn(None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
        TextColumn(
            "{task.fields[facts]}",
            markup=False,
            table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis"),
        ),
    )


def per_second(rate: float) -> str:
    """A rate with as many digits as a person reads."""
    return f"{rate:.{0 if rate >= 100 else 1}f}"


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


def counted(count: int, things: str) -> str:
    """A number of things, one of them as one: ``3 images``, ``1 image``."""
    one = things.removesuffix("es") if things.endswith("sses") else things.removesuffix("s")
    return f"{count} {one if count == 1 else things}"


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
        self._began = time.monotonic()

    def note(self, *lines: str) -> None:
        """A line of narration, or several."""
        if not self.quiet and not self.silent:
            for line in lines:
                print(shown(line), file=sys.stderr)
            sys.stderr.flush()

    def finished(self, made: str, *commands: str) -> None:
        """The end of a command, as narration: what it made, how long it took, and what may be typed next.

        Args:
            made: what, and how big.
            commands: the next one, or several to choose from.
        """
        self.note(f"{made}, in {duration(time.monotonic() - self._began)}")
        for number, command in enumerate(commands):
            self.note(f"next: {command}" if not number else f"      {command}")

    def legend(self, **meanings: str) -> None:
        """What columns of the table above mean, for whoever reads it and does not know; ``_`` stands for a blank."""
        text = "; ".join(f"{name.replace('_', ' ')}: {meaning}" for name, meaning in meanings.items())
        self.note(*wrap(text, get_terminal_size().columns, break_on_hyphens=False))

    def say(self, *lines: object) -> None:
        """Lines on stdout."""
        for line in lines or ("",):
            print(shown(line))
        sys.stdout.flush()

    def detail(self, text: str) -> None:
        """One line that only ``--verbose`` shows."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """One line that the user should see even with ``--quiet``; the same text is printed once."""
        if text not in self._warned and not self.silent:
            self._warned.add(text)
            print(f"warning: {shown(text)}", file=sys.stderr, flush=True)

    def error(self, message: str, hint: str) -> None:
        """What is wrong and, on a second line, what to do."""
        print(f"error: {shown(message)}", file=sys.stderr)
        if hint:
            print(f"hint: {shown(hint)}", file=sys.stderr)
        sys.stderr.flush()

    def traceback(self, error: Exception) -> None:
        """Where a bug happened."""
        import traceback

        text = "".join(traceback.format_exception(error))
        print(shown(text, keep="\n"), end="", file=sys.stderr)

    def document(self, value: Any) -> None:
        """Exactly one JSON document on stdout; of several ranks only the first prints."""
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(value, allow_nan=False), flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """An aligned plain table on stdout: the same bytes in a pipe and on a terminal; of ranks the first's."""
        if os.environ.get("RANK", "0") != "0":
            return
        cells = [[shown(cell) for cell in row] for row in (header, *rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        sys.stdout.flush()

    @contextmanager
    def progress(self, total: int, unit: str, title: str) -> Iterator[Bar]:
        """Show how far a loop is: a bar on a terminal and in a notebook, else plain lines.

        The terminal test is ours: rich believes FORCE_COLOR even where stderr is a file.
        """
        if in_notebook() and not self.quiet and not self.silent:
            yield NotebookBar(total, unit, title)
            return
        if self.quiet or self.silent or not sys.stderr.isatty():
            yield PlainBar(self, total, unit, title)
            return
        from rich.console import Console as RichConsole
        from rich.progress import Progress as RichProgress

        screen = RichConsole(file=sys.stderr)
        with RichProgress(
            *bar_columns(screen.width), console=screen, transient=True, expand=True
        ) as progress:
            yield RichBar(progress, progress.add_task(shown(title), total=total, facts=""), unit)


console = Console()
