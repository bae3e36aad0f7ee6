"""Objects of any kind, brought whole to the stage: once, by whichever process comes first."""

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import BinaryIO, final

from kdcli.cache.shelf import STREAMS, Shelf, Stage, keep
from kdcli.cache.stores.places import Entry, Place, changed
from kdcli.console import Bar, console, size
from kdcli.errors import KdError, NotFoundError
from kdcli.files import storage_errors

_MB = 10**6


def bring(place: Place, entries: Mapping[str, Entry], stage: Stage) -> dict[str, Path]:
    """Have objects on this disk, whole, for as long as this process lives; what is here already is not fetched.

    Args:
        place: where they are.
        entries: what they are.
        stage: where they are brought to.

    Returns:
        The file of each: another edition has another one. Messages call it by its URL.

    Raises:
        UsageError: they are more than the stage may keep.
        NoSpaceError: they do not fit on the disk.
        NotFoundError: one is gone.
        StorageError: one was changed meanwhile; the store refuses, or does not answer.
    """
    shelves: dict[str, Shelf] = {}
    for name in entries:
        above = _above(place, name)
        shelves.setdefault(above, Shelf(stage, _digest(above)[:32]))
    copies = [_Copy(place, name, entry, shelves[_above(place, name)]) for name, entry in entries.items()]
    keep(stage, {copy.file: copy.entry.size for copy in copies})
    with storage_errors(stage.folder):
        missing = [copy for copy in copies if copy.shelf.use(copy.name) is None]
    if missing:
        for shelf in shelves.values():
            shelf.prepare()
        _fetch(missing, place)
    return {copy.path: copy.file for copy in copies}


def _above(place: Place, name: str) -> str:
    return f"{place.name}/{name}".rpartition("/")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@final
class _Copy:
    """An object, and its file here."""

    def __init__(self, place: Place, path: str, entry: Entry, shelf: Shelf) -> None:
        self.path, self.entry, self.shelf = path, entry, shelf
        self.name = f"{_digest(entry.edition)[:16]}/{PurePosixPath(path).name}"
        self.file = shelf.place / self.name
        self.url = KdError.names[str(self.file)] = f"{place.name}/{path}"


def _fetch(missing: list[_Copy], place: Place) -> None:
    total = sum(copy.entry.size for copy in missing)
    missing[0].shelf.require_space(total)
    console.note(f"{place.name}: {size(total)} are brought to {missing[0].shelf.stage.folder}")
    pool = ThreadPoolExecutor(STREAMS, "kd-bring")
    with console.progress(max(1, total // _MB), "MB", "fetch") as bar:
        fetcher = _Fetcher(place, bar)
        try:
            for future in as_completed([pool.submit(fetcher.make, copy) for copy in missing]):
                future.result()
        finally:
            fetcher.stop.set()
            pool.shutdown(cancel_futures=True)


@final
class _Fetcher:
    """Fetches, in several threads, until one fails or the user has enough."""

    def __init__(self, place: Place, bar: Bar) -> None:
        self._place, self._bar, self._lock, self._bytes = place, bar, threading.Lock(), 0
        self.stop = threading.Event()

    def make(self, copy: _Copy) -> None:
        """Make a copy, unless another process does."""

        def fill(file: BinaryIO) -> None:
            try:
                for piece in self._place.pieces(copy.path, copy.entry):
                    if self.stop.is_set():
                        raise InterruptedError("another object could not be had")
                    file.write(piece)
                    self._tell(len(piece))
                if file.tell() != copy.entry.size:
                    raise changed(copy.url)
            except FileNotFoundError:
                message = f"{copy.url} is gone: it was there when it was looked for"
                raise NotFoundError(message, "Run the same command again.") from None

        if not copy.shelf.make(copy.name, copy.entry.size, fill):
            self._tell(copy.entry.size)

    def _tell(self, count: int) -> None:
        with self._lock:
            before, self._bytes = self._bytes // _MB, self._bytes + count
            self._bar.advance(self._bytes // _MB - before)
