"""What a supervisor sees of the cache that its workers fill, from names alone: in a folder, or in a bucket."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kdcli.cache.claims import Claims
from kdcli.cache.commits import parse_commit, read_commits, single_names
from kdcli.cache.layout import Layout, Manifest, Unit, load_manifest
from kdcli.cache.owned import RECORDS_BYTES, stamp_of
from kdcli.cache.stores.leases import Leases, Pace, probe
from kdcli.cache.stores.marks import manifest_in
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.errors import Advice


@final
@dataclass(frozen=True, slots=True)
class Look:
    """A cache as it was found.

    Attributes:
        manifest: what it is.
        done: stems of the units that have a record, by part; others may be among them.
    """

    manifest: Manifest
    done: Mapping[str, Collection[str]]

    def has(self, unit: Unit) -> bool:
        """Whether a unit is done."""
        return unit.stem in self.done[unit.part]


class Overseen(ABC):
    """Abstract: a cache that others fill.

    Attributes:
        pause: least seconds between two looks that nobody waits for.
    """

    pause: float

    @abstractmethod
    def look(self, parts: Collection[str]) -> Look | None:
        """How far it is; None while there is no cache.

        Args:
            parts: samples or outputs of teachers; of others nothing is asked.
        """

    @abstractmethod
    def bury(self, *workers: str) -> None:
        """Free at once what dead workers hold; see :meth:`~kdcli.cache.claims.Claims.bury`."""


@final
class OverseenFolder(Overseen):
    """A cache in a folder."""

    pause = 0.0

    def __init__(self, root: Path) -> None:
        self._layout = Layout(root)
        self._claims = Claims(self._layout)
        self._joined: dict[str, tuple[str, frozenset[str]]] = {}

    def look(self, parts: Collection[str]) -> Look | None:
        """See the base."""
        if not self._layout.manifest.is_file():
            return None
        return Look(load_manifest(self._layout.root), {part: self._done(part) for part in parts})

    def _done(self, part: str) -> Collection[str]:
        found, file = single_names(self._layout, part), self._layout.compacted(part)
        with suppress(FileNotFoundError):  # read after what vanishes into it was listed
            stamp = stamp_of(file)
            if self._joined.get(part, ("", None))[0] != stamp:
                commits = read_commits(self._layout, part).values()
                self._joined[part] = stamp, frozenset(commit.unit.stem for commit in commits)
            found |= self._joined[part][1]
        return found

    def bury(self, *workers: str) -> None:
        """See the base."""
        if self._layout.claims.is_dir():
            self._claims.bury(*workers)


@final
class OverseenBucket(Overseen):
    """A cache in a bucket. A look asks for its manifest and the names of its records; joined ones are read once."""

    pause = 3.0

    def __init__(self, place: ObjectPlace) -> None:
        self._place = place
        self._joined: dict[str, tuple[str, frozenset[str]]] = {}

    def look(self, parts: Collection[str]) -> Look | None:
        """See the base."""
        manifest = manifest_in(self._place)
        if manifest is None:
            return None
        listed = self._place.editions("commits")
        done: dict[str, set[str]] = {part: set() for part in parts}
        for name in listed:
            part, _, file = name.removeprefix("commits/").rpartition("/")
            if part in done:
                done[part].add(file.removesuffix(".json"))
        for part, found in done.items():
            name = f"commits/{part}.jsonl"
            if name in listed:
                found |= self._read(name, listed[name])
        return Look(manifest, done)

    def _read(self, name: str, edition: str) -> frozenset[str]:
        """Stems of the units whose records are joined in an object."""
        if self._joined.get(name, ("", None))[0] != edition:
            try:
                lines = self._place.read(name, RECORDS_BYTES).splitlines()
            except FileNotFoundError:  # gone since it was listed
                return frozenset()
            source, hint = f"{self._place.name}/{name}", Advice("push-again")
            commits = [parse_commit(line, source, hint) for line in lines]
            self._joined[name] = edition, frozenset(commit.unit.stem for commit in commits)
        return self._joined[name][1]

    def bury(self, *workers: str) -> None:
        """See the base."""
        Leases(self._place, probe(self._place), Pace()).bury(*workers)
