"""The records of a part, as a process that works on it sees them: a look reads only what is new.

A part of a large cache has some hundred thousand records, and every process of a fleet wants to know again and again
which there are. To read them all each time bent the line of many workers (docs/scale.md).
"""

from collections.abc import Iterator
from typing import final

from kdcli.cache.commits import Commit, parse_commit, read_singles, single_names
from kdcli.cache.layout import Layout, Unit
from kdcli.cache.owned import RECORDS_BYTES, read_own, repair_hint, stamp_of
from kdcli.errors import CorruptError


@final
class WatchedRecords:
    """Which units of a part are done.

    Args:
        layout: of the cache.
        part: samples, or an output of a teacher.
    """

    def __init__(self, layout: Layout, part: str) -> None:
        self._layout, self._part, self._hint = layout, part, repair_hint(layout.root)
        self._looked = False
        self._single: set[str] = set()
        self._joined: dict[str, bytes] = {}
        self._stamp = ""

    def look(self) -> Iterator[Commit]:
        """Bring :meth:`is_done` up to date.

        The first look reads every record, and gives it. Later ones go by names: what came since is the work of writers
        that run now. Who reads the cache reads, and checks, all of them.

        Raises:
            CorruptError: one is damaged, or in another's place.
        """
        first, self._looked = not self._looked, True
        self._single = single_names(self._layout, self._part)
        seen = set()
        for commit in read_singles(self._layout, self._part) if first else ():
            seen.add(commit.unit.stem)
            yield commit
        for commit in self._join():  # last: what vanished from the folder is in here by now
            if first and commit.unit.stem not in seen:
                yield commit

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit of this part had a record at the last look."""
        return unit.stem in self._single or unit.stem in self._joined

    def read(self, unit: Unit) -> Commit | None:
        """The record of a unit of this part as it is now; None: it has none."""
        path = self._layout.commit(unit)
        try:
            commit = parse_commit(read_own(path, hint=self._hint), path, self._hint)
        except FileNotFoundError:
            self._join()
            line, path = self._joined.get(unit.stem), self._layout.compacted(self._part)
            return None if line is None else parse_commit(line, path, self._hint)
        if commit.unit != unit:
            raise CorruptError(f"{path} is the record of {commit.unit}", self._hint)
        return commit

    def forget(self, unit: Unit) -> None:
        """Take a unit for not done until the next look."""
        self._single.discard(unit.stem)
        self._joined.pop(unit.stem, None)
        self._stamp, self._looked = "", False

    def _join(self) -> list[Commit]:
        """The joined records, if they changed since they were read."""
        path = self._layout.compacted(self._part)
        try:
            stamp = stamp_of(path)
            if stamp == self._stamp:
                return []
            lines = read_own(path, RECORDS_BYTES, self._hint).splitlines()
        except FileNotFoundError:
            self._stamp, self._joined = "", {}
            return []
        commits = [parse_commit(line, path, self._hint) for line in lines]
        for commit in commits:
            if commit.part != self._part:
                raise CorruptError(f"{path} holds the record of {commit.unit}", self._hint)
        self._joined = {commit.unit.stem: line for commit, line in zip(commits, lines, strict=True)}
        self._stamp = stamp
        return commits
