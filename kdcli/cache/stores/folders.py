"""Places in folders, as of a shared disk. Nothing in them is reached by a link."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import final

from kdcli.cache.owned import read_own, regular_size, require_unlinked, stamp_of
from kdcli.cache.stores.places import PIECE, Entry, Place, changed
from kdcli.errors import CorruptError
from kdcli.files import atomic_write_bytes, create_bytes, make_folder, storage_errors
from kdcli.reading import DOCUMENT_BYTES, open_regular


@final
class FolderPlace(Place):
    """A folder, as of a shared disk."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self._root = name, root

    def read(self, path: str, most: int = DOCUMENT_BYTES) -> bytes:
        """See the base."""
        return read_own(self._own(path), most, "Put it there again.")

    def pieces(self, path: str, entry: Entry) -> Iterator[bytes]:
        """See the base."""
        own = self._own(path)
        with os.fdopen(open_regular(own, None, CorruptError, links=False), "rb") as file:
            while data := file.read(PIECE):
                yield data
            if stamp_of(own) != entry.edition or not os.path.samestat(own.lstat(), os.fstat(file.fileno())):
                raise changed(str(own))

    def entry(self, path: str) -> Entry | None:
        """See the base."""
        own = self._own(path)
        with storage_errors(own), suppress(FileNotFoundError, NotADirectoryError):
            size = regular_size(own)
            return Entry(size, stamp_of(own)) if size >= 0 else None
        return None

    def entries(self, below: str = "") -> dict[str, Entry]:
        """See the base."""
        found = {}
        for folder, _, names in os.walk(self._own(below) if below else self._root):
            for path in (Path(folder, name) for name in names):
                with storage_errors(path), suppress(FileNotFoundError):  # joined with others meanwhile
                    size = regular_size(path)
                    if size < 0:
                        raise CorruptError(f"{path} is no regular file", "Put the file itself in its place.")
                    found[path.relative_to(self._root).as_posix()] = Entry(size, stamp_of(path))
        return found

    def is_empty(self, but: str) -> bool:
        """See the base."""
        with storage_errors(self._root):
            return not self._root.is_dir() or all(each.name == but for each in self._root.iterdir())

    def write(self, path: str, data: bytes) -> None:
        """See the base."""
        atomic_write_bytes(self._new(path), data, self._root / "tmp")

    def create(self, path: str, data: bytes) -> bool:
        """See the base."""
        return create_bytes(self._new(path), data, self._root / "tmp")

    def _own(self, path: str) -> Path:
        own = self._root / path
        require_unlinked(self._root, [own.parent])
        return own

    def _new(self, path: str) -> Path:
        own = self._own(path)
        require_unlinked(self._root, [self._root / "tmp"])
        make_folder(self._root / "tmp")
        make_folder(own.parent)
        return own
