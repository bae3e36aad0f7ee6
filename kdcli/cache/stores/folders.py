"""Places in folders, as of a shared disk. Nothing in them is reached by a link."""

import os
from contextlib import suppress
from pathlib import Path
from typing import final

from kdcli.cache.owned import read_own, regular_size, require_unlinked, stamp_of
from kdcli.cache.stores.places import Place
from kdcli.errors import CorruptError
from kdcli.files import atomic_write_bytes, create_text, make_folder, storage_errors
from kdcli.reading import DOCUMENT_BYTES


@final
class FolderPlace(Place):
    """A folder, as of a shared disk."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self._root = name, root

    def read(self, path: str, most: int = DOCUMENT_BYTES) -> bytes:
        """See the base."""
        return read_own(self._own(path), most, "Put it there again.")

    def sizes(self, below: str) -> dict[str, int]:
        """See the base."""
        found = {}
        for folder, _, names in os.walk(self._own(below)):
            for path in (Path(folder, name) for name in names):
                with storage_errors(path):
                    size = regular_size(path)
                if size < 0:
                    raise CorruptError(f"{path} is no regular file", "Put the file itself in its place.")
                found[path.relative_to(self._root).as_posix()] = size
        return found

    def editions(self, below: str) -> dict[str, str]:
        """See the base."""
        found = {}
        for name in self.sizes(below):
            with suppress(FileNotFoundError):  # joined with others meanwhile
                found[name] = stamp_of(self._root / name)
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
        return create_text(self._new(path), data.decode(), self._root / "tmp")

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
