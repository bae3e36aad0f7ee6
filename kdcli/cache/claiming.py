"""Who is working on what, wherever that is kept: in files beside a cache, or in the store that it lies in."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from kdcli.cache.layout import Unit


class Claiming(ABC):
    """The claims of this process on one cache. Use as a context manager: leaving releases them all."""

    @abstractmethod
    def __enter__(self) -> "Claiming":
        """Keep what is claimed alive from now on."""

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """Release everything."""

    @abstractmethod
    def acquire(self, unit: Unit) -> bool:
        """Claim ``unit``; take it over when its owner is dead. False when a live writer has it."""

    @abstractmethod
    def release(self, units: Iterable[Unit]) -> None:
        """Give units back, whether they were finished or not. A claim that cannot be removed goes stale."""

    @abstractmethod
    def is_live(self, unit: Unit) -> bool:
        """Whether somebody who seems alive holds ``unit``."""

    @abstractmethod
    def holder(self, unit: Unit) -> str:
        """Who holds ``unit``, for a message."""
