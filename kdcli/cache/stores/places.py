"""Where a cache is kept away from the machine that uses it: a bucket and a path in it, or a folder.

Objects are called as the files of a cache are (docs/format.md), so a cache in a bucket is a cache.
"""

from abc import ABC, abstractmethod

from kdcli.reading import DOCUMENT_BYTES


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
    def sizes(self, below: str) -> dict[str, int]:
        """Bytes of every object below a folder, by name."""

    @abstractmethod
    def editions(self, below: str) -> dict[str, str]:
        """What is another for another content, of every object below a folder, by name."""

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
