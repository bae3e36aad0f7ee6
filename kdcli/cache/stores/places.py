"""Where a cache is kept away from the machine that uses it: a bucket and a path in it, or a folder.

Objects are called as the files of a cache are (docs/format.md), so a cache in a bucket is a cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from kdcli.errors import StorageError
from kdcli.reading import DOCUMENT_BYTES

PIECE: Final = 8 * 2**20
"""Bytes of an object that are asked for at a time."""


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """An object as it was when it was looked at.

    Attributes:
        size: its bytes.
        edition: is another for another content.
    """

    size: int
    edition: str


class Place(ABC):
    """Objects by name, below one URL. Made by :func:`~kdcli.cache.stores.opening.open_place`.

    Attributes:
        name: the URL.
    """

    name: str

    @abstractmethod
    def read(self, path: str, most: int = DOCUMENT_BYTES) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is none.
            CorruptError: it has more than ``most`` bytes.
        """

    @abstractmethod
    def pieces(self, path: str, entry: Entry) -> Iterator[bytes]:
        """The bytes of an object of any size, one after another.

        Args:
            path: its name.
            entry: what it was when it was looked at.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it is another one now.
        """

    @abstractmethod
    def entry(self, path: str) -> Entry | None:
        """The object of this name, if there is one."""

    @abstractmethod
    def entries(self, below: str = "") -> dict[str, Entry]:
        """Every object below a folder, by name."""

    def sizes(self, below: str) -> dict[str, int]:
        """Bytes of every object below a folder, by name."""
        return {name: entry.size for name, entry in self.entries(below).items()}

    def editions(self, below: str) -> dict[str, str]:
        """What is another for another content, of every object below a folder, by name."""
        return {name: entry.edition for name, entry in self.entries(below).items()}

    @abstractmethod
    def is_empty(self, but: str) -> bool:
        """Whether there is no object at all, but such as are below one folder."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Make or replace an object; nobody sees a part of it."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Make an object; False, and nothing changed, when there is one."""

    def flush(self) -> None:  # noqa: B027 - most places have nothing that waits
        """Make lasting what was written, in the order in which it was; elsewhere it is at once."""


def changed(name: str) -> StorageError:
    """The error for an object that was replaced while it was read."""
    return StorageError(f"{name} was changed while it was read", "Run the same command again.")
