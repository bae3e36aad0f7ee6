"""What a report was given, read: runs, rankings, probes, comparisons, joint teachers, caches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A student, finished or not.

    Attributes:
        name: its folder's, with as much of the path as tells it from others.
        folder: where it is; None for a printed result whose folder is gone.
        result: of a finished one; empty otherwise.
        identity: that of its run.json; empty without one.
        config: its options; empty where they are not known.
        history: one document per epoch.
    """

    name: str
    folder: Path | None
    result: Mapping[str, Any]
    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return bool(self.result)

    @property
    def method(self) -> str:
        """That trained it."""
        return str(self.result.get("method") or self.identity.get("method") or "?")


@final
@dataclass(frozen=True, slots=True)
class Joint:
    """A joint teacher, finished or not.

    Attributes:
        name: its folder's.
        result: of a finished one; empty otherwise.
        identity: that of its run.json; empty without one.
        parents: of its fused.json, each with name, spec, architecture, array; empty without one.
        history: one document per epoch; empty of a printed result whose folder is gone.
    """

    name: str
    result: Mapping[str, Any]
    identity: Mapping[str, Any]
    parents: tuple[Mapping[str, Any], ...]
    history: tuple[Mapping[str, Any], ...]


@final
@dataclass(frozen=True, slots=True)
class Origin:
    """The command that made a result, as the result recorded it, and what the result is called."""

    title: str
    command: str


@final
@dataclass(frozen=True, slots=True)
class Ranked:
    """A ranking and, where it was compared with students, the evidence."""

    path: Path
    ranking: Ranking
    evidence: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison; ``folder`` holds the predictions it was made of, if they were kept."""

    path: Path
    document: Mapping[str, Any]
    folder: Path | None


@final
@dataclass(slots=True)
class Material:
    """All inputs of a report, by kind, in the order given; ``versions`` are what each of them recorded."""

    runs: list[Run] = field(default_factory=list)
    diverged: list[tuple[str, str]] = field(default_factory=list)
    rankings: list[Ranked] = field(default_factory=list)
    evidence: list[Mapping[str, Any]] = field(default_factory=list)
    probes: list[Mapping[str, Any]] = field(default_factory=list)
    contrasts: list[Mapping[str, Any]] = field(default_factory=list)
    tallies: list[Mapping[str, Any]] = field(default_factory=list)
    comparisons: list[Compared] = field(default_factory=list)
    joints: list[Joint] = field(default_factory=list)
    caches: list[Path] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    versions: list[Mapping[str, Any]] = field(default_factory=list)

    def count(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {
            "runs": len(self.runs),
            "rankings": len(self.rankings),
            "probes": len(self.probes),
            "comparisons": len(self.comparisons),
            "joint teachers": len(self.joints),
            "caches": len(self.caches),
        }
