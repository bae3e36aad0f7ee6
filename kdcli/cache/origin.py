"""Caches whose chunks are elsewhere: their folder holds what they say of themselves, the rest comes when it is read."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from kdcli.errors import KdError

_ORIGINS: Final[dict[Path, "Origin"]] = {}


@final
@dataclass(frozen=True, slots=True)
class ChunkFile:
    """A committed chunk.

    Attributes:
        path: in the cache.
        copy_name: of a copy, below the folder that a cache is staged in; another content, another name.
        size, crc: recorded.
    """

    path: Path
    copy_name: str
    size: int
    crc: int


class Origin(ABC):
    """Where the chunks of a cache come from. Picklable; a process that is forked may ask it, too.

    Attributes:
        name: of the cache, as it is told: its URL.
    """

    name: str

    @abstractmethod
    def read(self, path: Path) -> bytes:
        """The bytes of a chunk as they are there, checked against nothing.

        Args:
            path: what the chunk is called in the folder of the cache.

        Raises:
            FileNotFoundError: it is gone.
        """

    @abstractmethod
    def bring(self, chunks: Sequence[ChunkFile], title: str = "", recheck: bool = False) -> None:
        """Have copies of these on this machine, as many as it may keep; each is checked before it has its name.

        Args:
            chunks: any.
            title: of the progress; empty: none is shown.
            recheck: read the copies that are here already, too, and compare them with their records.

        Raises:
            CorruptError: one is gone, or its bytes are not those that were committed.
            NoSpaceError: they do not fit.
            StorageError: the store refuses, or does not answer.
        """

    @abstractmethod
    def copy(self, chunk: ChunkFile) -> Path:
        """A checked copy, fetched where there is none. Another process may remove it before it is opened.

        Raises:
            KdError: see :meth:`bring`.
        """

    @abstractmethod
    def most_maps(self, largest: int) -> int:
        """How many copies of at most so many bytes may stay mapped: one that was removed takes its space till then."""


def stands_for(root: Path, origin: Origin) -> None:
    """Let a folder of this process stand for a cache elsewhere; messages call it by its origin's name."""
    _ORIGINS[root] = origin
    KdError.names[str(root)] = origin.name


def origin_of(root: Path) -> Origin | None:
    """What a folder stands for; None: itself."""
    return _ORIGINS.get(root)
