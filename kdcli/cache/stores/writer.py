"""Filling a cache in a bucket: units are computed into a folder of this process's own, sent, and dropped there.

A unit's chunks are created if they are absent, then its record, which is never overwritten. Other bytes under a chunk's
name are of a writer that died before its record: they are replaced by who holds the lease, that very version of them,
while there is no record. A writer that was stopped for so long that another one took over finds out before it makes a
record, because it cannot keep its lease alive; if its bytes came between the other's, as who comes too late it compares
what is there with the record, and takes that back where they differ. A kill at any moment leaves a lease that goes
stale, and chunks without a record that the next writer takes over.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from kdcli.cache.backends.base import HEADER_BYTES
from kdcli.cache.classifier import Classifier
from kdcli.cache.commits import Commit, chunk_files, misfits, parse_commit, read_commit
from kdcli.cache.filling import Content, Filling
from kdcli.cache.layout import SAMPLES, Manifest, Unit
from kdcli.cache.owned import CHUNK_BYTES, RECORDS_BYTES, read_own
from kdcli.cache.provenance import TeacherRecord, seal
from kdcli.cache.stores.leases import Leases, Pace, lease_name, probe
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.cache.stores.transfer import is_as_recorded, record_name
from kdcli.cache.writer import CacheWriter
from kdcli.console import console
from kdcli.errors import Advice, CorruptError
from kdcli.files import atomic_write_bytes

_STREAMS: Final = 8
"""Objects that are sent or fetched at a time."""
_LOOK_SECONDS: Final = 1.0
"""The list of records is believed for this long, and for ten times as long as listing took."""
_AGAIN: Final = Advice("push-again")


@final
class StoreWriter(Filling):
    """Fills a cache in a store. Without being entered it only looks.

    Attributes:
        claims: leases in the store.

    Args:
        place: where the cache is.
        root: its skeleton, of :mod:`~kdcli.cache.stores.founding`; this process's own.
        manifest: what it is.
        pace: of the leases.
    """

    claims: Leases

    def __init__(self, place: ObjectPlace, root: Path, manifest: Manifest, pace: Pace | None = None) -> None:
        self._place, self._local = place, CacheWriter(root, manifest)
        self.store, self._pace = self._local.store, pace or Pace()
        self._done: set[str] = set()
        self._joined: dict[str, Commit] | None = None
        self._contents: dict[int, str] = {}
        self._until = -1.0

    def __enter__(self) -> "StoreWriter":
        self.claims = Leases(self._place, probe(self._place), self._pace)
        self.claims.__enter__()
        self._pool = ThreadPoolExecutor(_STREAMS, "kd-send")
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self.claims.__exit__(*error)

    def add_teacher(self, record: TeacherRecord) -> TeacherRecord:
        """See the base; the records that are in the store first count."""
        recorded = self._local.add_teacher(record)
        root, names = self.layout.root, [self.layout.output(record.name, kind) for kind in recorded.outputs]
        for path in (self.layout.teacher(record.name), *names):
            name = path.relative_to(root).as_posix()
            if self._place.put(name, read_own(path)) is None:
                atomic_write_bytes(path, self._place.read(name))
        self.store.refresh()
        recorded = self.teachers[record.name]
        recorded.require_same(record, self._place.name)
        for name, content in self.store.backend.metadata(
            self.manifest, self._local.keys, self.teachers
        ).items():
            self._place.write(f"{self.store.data.name}/{name}", content)
        return recorded

    def add_classifier(self, name: str, classifier: Classifier) -> None:
        """See the base; the one that is in the store first counts."""
        path = self.store.add_classifier(name, classifier)
        place = path.relative_to(self.layout.root).as_posix()
        if self._place.put(place, read_own(path)) is None:
            atomic_write_bytes(path, self._place.read(place))

    # --- what is done -----------------------------------------------------------------------------

    def missing(self, part: str, withdraw: bool = True) -> list[Unit]:
        """See the base; files are believed to be there. What was listed some seconds ago counts."""
        self._look()
        units = (Unit(part, *place) for place in self.store.units_of(part))
        return [unit for unit in units if record_name(unit) not in self._done]

    def open_units(self, units: Collection[Unit]) -> tuple[set[Unit], set[Unit]]:
        """See the base: from what was listed some seconds ago."""
        self._look()
        held = self.claims.names()
        left = {unit for unit in units if record_name(unit) not in self._done}
        claimed = {unit for unit in left if lease_name(unit) in held}
        return left - claimed, claimed

    def is_done(self, unit: Unit) -> bool:
        """See the base."""
        return self._record(unit) is not None

    def recorded_content(self, block: int) -> Content | None:
        """See the base; only the digest is known."""
        if block not in self._contents:
            units = [Unit(SAMPLES, block, group) for group in range(self.manifest.groups)]
            for unit in units:
                if unit.group == 0 or record_name(unit) in self._done:
                    commit = self._record(unit)
                    if commit is not None:
                        self._contents[block] = commit.content
                        break
        return (self._contents[block], None, None) if block in self._contents else None

    def dropped(self) -> set[int]:
        """See the base."""
        units = [Unit(SAMPLES, block, 0) for block in range(self.manifest.blocks)]
        found = self._pool.map(self._record, units)
        return {row for commit in found if commit is not None for row, _ in commit.absent}

    def _look(self) -> None:
        began = time.monotonic()
        if began < self._until:
            return
        # What is published meanwhile may not be listed yet; what is taken back is taken out there.
        self._done |= self._place.sizes("commits").keys()
        self._done |= self._joined_records().keys()
        now = time.monotonic()
        self._until = now + max(_LOOK_SECONDS, 10 * (now - began))

    def _joined_records(self) -> dict[str, Commit]:
        """Records that are joined in one file a part, as in a folder that was copied to the store."""
        if self._joined is None:
            self._joined = {}
            for name in (name for name in self._done if name.endswith(".jsonl")):
                for line in self._place.read(name, RECORDS_BYTES).splitlines():
                    commit = parse_commit(line, f"{self._place.name}/{name}", _AGAIN)
                    self._joined[record_name(commit.unit)] = commit
        return self._joined

    def _record(self, unit: Unit) -> Commit | None:
        name = record_name(unit)
        commit = self._joined_records().get(name)
        if commit is None:
            try:
                commit = parse_commit(self._place.read(name), f"{self._place.name}/{name}", _AGAIN)
            except FileNotFoundError:
                return None
        if commit.unit != unit or misfits(self.store, commit, self._local.key_digest(unit.block)):
            raise CorruptError(f"{self._place.name}/{name} belongs elsewhere", _AGAIN)
        self._done.add(name)
        return commit

    # --- publishing -------------------------------------------------------------------------------

    def publish(
        self,
        unit: Unit,
        arrays: Mapping[str, np.ndarray],
        content: str,
        absent: Sequence[tuple[int, str]],
        made: dict[str, Any],
        seconds: float,
    ) -> bool:
        """See the base."""
        self._local.publish(unit, arrays, content, absent, made, seconds)
        commit = read_commit(self.layout, unit)
        assert commit is not None  # nobody else writes there
        try:
            return self._send(commit)
        finally:
            for _, _, path, _, _ in chunk_files(self.store, commit):
                path.unlink(missing_ok=True)
            self.layout.commit(unit).unlink()

    def gather(self, part: str) -> None:
        """See the base: one listing tells it all."""

    def finish(self, part: str) -> None:
        """See the base: there is nothing to tidy up in a store."""

    def _send(self, commit: Commit) -> bool:
        paths = [path for _, _, path, _, _ in chunk_files(self.store, commit)]
        sent = list(self._pool.map(lambda path: self._send_chunk(commit.unit, path), paths))
        if not all(sent) or not self.claims.keep(commit.unit):
            return False  # this process was taken for dead
        name = record_name(commit.unit)
        if self._place.put(name, json.dumps(seal(asdict(commit)), allow_nan=False).encode()) is None:
            self._settle(commit)
            return False
        self._done.add(name)
        return True

    def _send_chunk(self, unit: Unit, path: Path) -> bool:
        """Send a chunk; False when somebody else is at its unit, or has finished it."""
        name, data = path.relative_to(self.layout.root).as_posix(), read_own(path, CHUNK_BYTES + HEADER_BYTES)
        old = None
        while self._place.put(name, data, old) is None:
            try:
                _, old, _ = self._place.get(name, CHUNK_BYTES + HEADER_BYTES)
            except FileNotFoundError:
                old = None
            if not self.claims.keep(unit) or self.is_done(unit):
                return False
        return True

    def _settle(self, mine: Commit) -> None:
        """Somebody committed the same unit: make sure that the bytes in the store are the recorded ones."""
        theirs = self._record(mine.unit)
        if theirs is None or theirs.same_data(mine):
            return
        for _, _, path, size, crc in chunk_files(self.store, theirs):
            data = self._place.read(path.relative_to(self.layout.root).as_posix(), CHUNK_BYTES + HEADER_BYTES)
            if not is_as_recorded(self.store, data, size, crc):
                break
        else:
            return
        console.warn(f"{mine.unit}: two writers computed different bytes; it will be computed again")
        self._place.remove(record_name(mine.unit))
        self._done.discard(record_name(mine.unit))
