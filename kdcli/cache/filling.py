"""What fills a cache, unit by unit, wherever its finished units go."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from kdcli.cache.claiming import Claiming
from kdcli.cache.classifier import Classifier
from kdcli.cache.layout import Unit
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.store import Opened

Content = tuple[str, Int64[np.ndarray, " r"] | None, Int64[np.ndarray, " r"] | None]
"""Digest, sizes and crc32c of a block's images; the latter two where they are known."""


class Filling(Opened):
    """One process's hand on one cache: claims units, publishes them, knows what is missing.

    Use as a context manager; leaving it releases every claim.

    Attributes:
        claims: of this process.
    """

    claims: Claiming

    @abstractmethod
    def __enter__(self) -> "Filling":
        """Begin."""

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """End."""

    @abstractmethod
    def add_teacher(self, record: TeacherRecord) -> TeacherRecord:
        """Record a teacher, or the kinds of output that a recorded one is to keep besides.

        Raises:
            IdentityError: another teacher has this name in the cache, or keeps a kind differently.
        """

    @abstractmethod
    def add_classifier(self, name: str, classifier: Classifier) -> None:
        """Keep the linear classifier of a recorded teacher, unless one is kept already."""

    @abstractmethod
    def missing(self, part: str, withdraw: bool = True) -> list[Unit]:
        """Units of ``part`` that are not done, decided from records without touching an image.

        Args:
            part: samples or an output of a teacher.
            withdraw: also take back records whose files are gone; False only looks.
        """

    @abstractmethod
    def open_units(self, units: Collection[Unit]) -> tuple[set[Unit], set[Unit]]:
        """Which units seem to be nobody's, and which are claimed, by the living or the dead; the others are done.

        A guess that saves tries, decided by :meth:`~kdcli.cache.claiming.Claiming.acquire`.
        """

    @abstractmethod
    def is_done(self, unit: Unit) -> bool:
        """Whether a record of this unit exists now."""

    @abstractmethod
    def recorded_content(self, block: int) -> Content | None:
        """A block's images as an earlier unit saw them; None for a new block."""

    @abstractmethod
    def dropped(self) -> set[int]:
        """Rows whose images could not be read and were left out."""

    @abstractmethod
    def publish(
        self,
        unit: Unit,
        arrays: Mapping[str, np.ndarray],
        content: str,
        absent: Sequence[tuple[int, str]],
        made: dict[str, Any],
        seconds: float,
    ) -> bool:
        """Write a whole unit: data first, then the commit record.

        Args:
            unit: what it is.
            arrays: [rows of the block, views of the group, ...] per view array, [rows of the block, ...] others.
            content: digest of the block's content records.
            absent: (row, reason) of dropped images; their values must be the fill value.
            made: how it was computed (batch size, device, versions).
            seconds: how long it took.

        Returns:
            False when somebody else has committed the unit meanwhile, or is at it; nothing is lost then.
        """

    @abstractmethod
    def gather(self, part: str) -> None:
        """Make an unfinished part quick to look at, before a run goes on with it."""

    @abstractmethod
    def finish(self, part: str) -> None:
        """Tidy up a part once nothing of it is missing."""
