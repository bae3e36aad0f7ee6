"""Places in data sets of the Hugging Face hub: blocks and their records come with the same commit, or in this order."""

from collections.abc import Iterator
from typing import Final, final

from kdcli.cache.stores.places import PIECE, Entry, Place
from kdcli.cards import CARD
from kdcli.hub import Address, Repository
from kdcli.reading import DOCUMENT_BYTES

_NOBODYS: Final = {".gitattributes", CARD}
"""What the hub puts, or lets its users put, into a new data set."""


@final
class HubPlace(Place):
    """A data set, or a folder in one, as of one commit.

    Args:
        url: where.
        private: see :class:`~kdcli.hub.Repository`.
    """

    def __init__(self, url: str, private: bool | None) -> None:
        self._repository = Repository(Address.parse(url, "dataset"), private)
        self.name = str(self._repository.address)

    def read(self, path: str, most: int = DOCUMENT_BYTES) -> bytes:
        """See the base."""
        return self._repository.read(path, most)

    def pieces(self, path: str, entry: Entry) -> Iterator[bytes]:
        """See the base."""
        for start in range(0, entry.size, PIECE):
            yield self._repository.read(path, entry.size, (start, min(start + PIECE, entry.size)))

    def entry(self, path: str) -> Entry | None:
        """See the base."""
        found = self._repository.files.get(path)
        return found and Entry(found.size, found.digest)

    def entries(self, below: str = "") -> dict[str, Entry]:
        """See the base."""
        files = self._repository.files.items()
        within = f"{below}/" if below else ""
        return {path: Entry(each.size, each.digest) for path, each in files if path.startswith(within)}

    def is_empty(self, but: str) -> bool:
        """See the base."""
        return all(path in _NOBODYS or path.startswith(f"{but}/") for path in self._repository.files)

    def write(self, path: str, data: bytes) -> None:
        """See the base; :meth:`flush` makes it lasting."""
        self._repository.write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """See the base; :meth:`flush` makes it lasting, and refuses it where another process was faster."""
        return self._repository.write(path, data, replace=False)

    def flush(self) -> None:
        """See the base."""
        self._repository.commit()
