"""Who is working on what in a bucket: one object per claimed unit, replaced while work goes on.

A lease is created if it is absent, kept alive and taken over by replacing the very version that was seen, so of many
who try one succeeds. Its age is told by the store's clock. Like a claim, it only saves double work.
"""

import json
import threading
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, final

from kdcli.cache.claiming import Claiming
from kdcli.cache.claims import HEARTBEAT_SECONDS, STALE_SECONDS, Owner
from kdcli.cache.layout import Unit
from kdcli.cache.stores.marks import LEASES
from kdcli.cache.stores.objects import ObjectPlace, Tag
from kdcli.documents import from_document, to_document
from kdcli.errors import Advice, CorruptError, KdError, StorageError
from kdcli.reading import parse_json

_PROBE: Final = f"{LEASES}/probe"
_LEASE_BYTES: Final = 2**16
_LITTER_SECONDS: Final = 3600.0
"""A probe takes seconds: an older one is of a process that was killed."""
_STREAMS: Final = 8
"""Leases that are read at a time."""
_LOOK_SECONDS: Final = 2.0
"""What was listed is believed for this long, and for ten times as long as listing took."""


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between two signs of life of a writer, and of silence after which it is taken for dead."""

    beat: float = HEARTBEAT_SECONDS
    stale: float = STALE_SECONDS

    @classmethod
    def of(cls, timeout: float) -> "Pace":
        """With three signs of life at least within a timeout."""
        return cls(min(HEARTBEAT_SECONDS, timeout / 3), timeout)


def probe(place: ObjectPlace) -> float:
    """See whether a store honours the conditions of writes, by trying.

    Returns:
        What to add to :func:`time.monotonic` for the store's clock; a pause within makes it too small, so that others
        seem younger than they are.

    Raises:
        StorageError: it does not, or refuses, or does not answer.
    """
    name = f"{_PROBE}/{Owner.here().token}"
    try:
        first = place.put(name, b"1")
        if first is None or place.put(name, b"2") is not None:
            raise _ignores(place, "If-None-Match")
        second = place.put(name, b"2", first)
        if second is None or place.put(name, b"3", first) is not None:
            raise _ignores(place, "If-Match")
        _, _, written = place.get(name)
        clock = written - time.monotonic()
        for litter, (_, before) in place.versions(_PROBE).items():
            if written - before > _LITTER_SECONDS:
                place.remove(litter)
        return clock
    finally:
        with suppress(StorageError):
            place.remove(name)


def _ignores(place: ObjectPlace, condition: str) -> StorageError:
    return StorageError(
        f"{place.name}: the store ignores the condition of a write ({condition}): writers would undo each other's work",
        Advice("no-writers"),
    )


@final
@dataclass(slots=True)
class _Held:
    """A lease of this process: its version, and when that was made."""

    tag: Tag
    since: float


@final
@dataclass(frozen=True, slots=True)
class _Seen:
    """Another's lease: its version, since when it was seen so, and whose it is where that was asked."""

    tag: Tag
    since: float
    owner: Owner | None


@final
class Leases(Claiming):
    """Claims in a store.

    Args:
        place: where the cache is.
        clock: of :func:`probe`.
        pace: of the heartbeat.
    """

    def __init__(self, place: ObjectPlace, clock: float, pace: Pace) -> None:
        self._place, self._clock, self._pace = place, clock, pace
        self._owner, self._beats = Owner.here(pace.stale), 0
        self._held: dict[Unit, _Held] = {}
        self._seen: dict[str, _Seen] = {}
        self._listed: dict[str, tuple[Tag, float]] = {}
        self._until = -1.0
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Leases":
        self._thread = threading.Thread(target=self._beat, name="kd-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.release(list(self._held))
        if error[0] is None:
            with suppress(StorageError):
                self._sweep()

    def acquire(self, unit: Unit) -> bool:
        """See the base."""
        name, data = lease_name(unit), self._document()
        tag = self._place.put(name, data) or self._take_over(name, data)
        if tag is None:
            return False
        with self._lock:
            self._held[unit] = _Held(tag, time.monotonic())
        return True

    def release(self, units: Iterable[Unit]) -> None:
        """See the base."""
        for unit in units:
            with self._lock, suppress(StorageError):
                held = self._held.pop(unit, None)
                if held is not None and self._is_mine(unit, held):
                    self._place.remove(lease_name(unit))

    def keep(self, unit: Unit) -> bool:
        """Show a sign of life; False when another writer took this one for dead."""
        with self._lock:
            held = self._held.get(unit)
            if held is None:
                return False
            tag = self._place.put(lease_name(unit), self._document(), held.tag)
            if tag is None:
                del self._held[unit]
                return False
            self._held[unit] = _Held(tag, time.monotonic())
            return True

    def is_live(self, unit: Unit) -> bool:
        """See the base; what was listed up to some seconds ago counts."""
        name = lease_name(unit)
        if unit in self._held:
            return True
        self._list()
        if name not in self._listed:
            return False
        tag, written = self._listed[name]
        return not self._is_dead(name, tag, written)

    def names(self) -> Collection[str]:
        """Names of the leases that there are, of the living or the dead; see :meth:`is_live`."""
        self._list()
        return self._listed.keys()

    def holder(self, unit: Unit) -> str:
        """See the base."""
        return str(self._owner_of(lease_name(unit)) or Owner())

    def bury(self, *workers: str) -> None:
        """Free at once what workers hold that their supervisor knows to be dead, on whatever host.

        Args:
            workers: what the supervisor called them (:data:`~kdcli.runtime.WORKER`).
        """

        def free(name: str) -> None:
            with suppress(FileNotFoundError):  # given back, or taken over, since it was listed
                data, tag, _ = self._place.get(name, _LEASE_BYTES)
                if _owner_in(data, name).worker in workers:
                    self._remove(name, tag)

        with ThreadPoolExecutor(_STREAMS, "kd-bury") as pool:
            list(pool.map(free, _claimed(self._place.versions(LEASES))))

    def _sweep(self) -> None:
        """Remove what dead writers left of units that are done: nobody will ask for those again."""
        versions = self._place.versions(LEASES)
        for name in _claimed(versions):
            if self._is_dead(name, *versions[name]):
                self._remove(name, versions[name][0])

    def _remove(self, name: str, tag: Tag) -> None:
        """Remove this very version of a dead one's lease: it is this process's own first, if nobody was faster."""
        if self._place.put(name, self._document(), tag) is not None:
            self._place.remove(name)

    def _document(self) -> bytes:
        """A lease of this process; no two are alike, so that its version tells it from all others."""
        with self._lock:
            self._beats += 1
            return json.dumps({"owner": to_document(self._owner), "beat": self._beats}).encode()

    def _take_over(self, name: str, data: bytes) -> Tag | None:
        try:
            _, tag, written = self._place.get(name, _LEASE_BYTES)
        except FileNotFoundError:  # released just now
            return self._place.put(name, data)
        if not self._is_dead(name, tag, written):
            return None
        return self._place.put(name, data, tag)

    def _is_mine(self, unit: Unit, held: _Held) -> bool:
        """Nobody takes over what was kept alive a moment ago; what was not is looked at."""
        if time.monotonic() - held.since < self._pace.stale / 2:
            return True
        try:
            return self._place.get(lease_name(unit), _LEASE_BYTES)[1] == held.tag
        except FileNotFoundError:
            return False

    def _is_dead(self, name: str, tag: Tag, written: float) -> bool:
        """Whether the owner of a lease is dead, or has been silent for too long, by the store's clock or from here.

        Whose it is costs a request: asked at first sight, and when a heartbeat is overdue.
        """
        now, seen = time.monotonic(), self._seen.get(name)
        if seen is None:
            seen = _Seen(tag, now, self._owner_of(name))
        elif seen.tag != tag:
            seen = _Seen(tag, now, None)
        silent = max(now + self._clock - written, now - seen.since)
        if seen.owner is None and silent > 2 * self._pace.beat:
            seen = _Seen(tag, seen.since, self._owner_of(name))
        self._seen[name] = seen
        if seen.owner is None:
            return silent > self._pace.stale
        return seen.owner.has_ended(self._owner) or silent > seen.owner.limit(self._pace.stale)

    def _owner_of(self, name: str) -> Owner | None:
        """The owner of a lease; of one that cannot be read nothing is known."""
        try:
            return _owner_in(self._place.read(name, _LEASE_BYTES), name)
        except FileNotFoundError:
            return None
        except CorruptError:  # too long
            return Owner()

    def _list(self) -> None:
        began = time.monotonic()
        if began > self._until:
            self._listed = self._place.versions(LEASES)
            now = time.monotonic()
            self._until = now + max(min(_LOOK_SECONDS, self._pace.beat), 10 * (now - began))
            for name in self._seen.keys() - self._listed.keys():
                del self._seen[name]

    def _beat(self) -> None:
        while not self._stop.wait(self._pace.beat):
            for unit in list(self._held):
                # What a store refuses is not this thread's business: the next write says so.
                with suppress(StorageError):
                    self.keep(unit)


def _owner_in(data: bytes, name: str) -> Owner:
    """The owner that a lease names; of one that cannot be read nothing is known."""
    try:
        return from_document(Owner, parse_json(data, name)["owner"], name)
    except (KdError, ValueError, LookupError, TypeError):
        return Owner()


def _claimed(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(_PROBE)]


def lease_name(unit: Unit) -> str:
    """Name of the object that says who works on a unit."""
    return f"{LEASES}/{unit.part}/{unit.stem}.json"
