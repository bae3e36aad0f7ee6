"""How far the writers of a cache are, from commit records and claims alone: also for a read-only cache."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kdcli.cache.admin.holders import Writer, claim_holders
from kdcli.cache.admin.inventory import done_commits, open_store
from kdcli.cache.layout import Layout
from kdcli.cache.store import Store
from kdcli.console import duration

WINDOW_SECONDS = 600.0
"""The rate is that of the records of this last stretch of time."""


@final
@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a cache.

    Attributes:
        parts: units done and in all, by part.
        rate: units a second of the unfinished parts; None while nothing tells.
        writers: units that each writer has claimed.
    """

    path: Path
    parts: dict[str, tuple[int, int]]
    rate: float | None
    writers: dict[Writer, int]

    @property
    def done(self) -> int:
        """Units that are done."""
        return sum(done for done, _ in self.parts.values())

    @property
    def total(self) -> int:
        """Units there are when the cache is complete."""
        return sum(total for _, total in self.parts.values())

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.done == self.total

    @property
    def seconds_left(self) -> float:
        """At the present rate; infinite when nobody is at work."""
        return (self.total - self.done) / self.rate if self.rate else float("inf")

    def line(self) -> str:
        """One plain line: how far, how fast, how long, and by whom."""
        text = f"{self.path}: {self.done}/{self.total} units ({percent(self.done, self.total)})"
        if self.complete:
            return f"{text}, complete"
        if self.rate:
            text += f", {self.rate:.2g} units/s, {duration(self.seconds_left)} left"
        return f"{text}; {self.who()}"

    def who(self) -> str:
        """The writers and how many units each has claimed."""
        if not self.writers:
            return "nobody is writing"
        claims = [f"{writer} ({count})" for writer, count in sorted(self.writers.items())]
        return f"claims of {', '.join(claims)}"


def percent(done: int, total: int) -> str:
    """A share, rounded down: 100.0% is all of it."""
    return f"{1000 * done // total / 10:.1f}%" if total else "100.0%"


def look(store: Store) -> Progress:
    """How far a cache is now."""
    commits = {part: done_commits(store, part) for part in store.parts()}
    parts = {part: (len(done), sum(1 for _ in store.units_of(part))) for part, done in commits.items()}
    unfinished = [part for part, (done, total) in parts.items() if done < total]
    writers = claim_holders(store.layout)
    rate = None
    if any(writer.alive for writer in writers):
        seconds = [c.seconds for part in unfinished for c in commits[part].values() if c.seconds]
        rate = _rate(_times(store.layout, unfinished), seconds)
    return Progress(store.layout.root, parts, rate, writers)


def _times(layout: Layout, parts: list[str]) -> list[float]:
    """When the single records of these parts were written. A part that is not complete has no others,
    or, after an extension, only old ones."""
    found = []
    for part in parts:
        folder = layout.commits / part
        for path in folder.glob("*.json") if folder.is_dir() else ():
            with suppress(FileNotFoundError):  # being compacted
                found.append(path.stat().st_mtime)
    return sorted(found)


def _rate(times: list[float], seconds: list[float]) -> float | None:
    """Units a second: those that came after the first one of the window, over the time they took.

    While all came at once, the seconds that they took have to do.
    """
    recent = [moment for moment in times if moment >= times[-1] - WINDOW_SECONDS]
    if not recent:
        return None
    span = recent[-1] - recent[0]
    later = sum(moment > recent[0] for moment in recent)
    if span > 1.0:
        return later / span
    longest = max(seconds, default=0.0)
    return len(recent) / longest if longest else None


def watch(root: Path, every: float) -> Iterator[Progress]:
    """Look again and again, until the cache is complete. It may be extended meanwhile.

    Raises:
        KdError: it is not there (any more), is no cache, or is damaged.
    """
    while True:
        progress = look(open_store(root))
        yield progress
        if progress.complete:
            return
        time.sleep(every)
