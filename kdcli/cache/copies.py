"""Checked copies of the chunks of a cache: see :mod:`kdcli.cache.shelf`.

``teachers/t/logits/c.3.0.CRC`` is a copy of c.3.0, named by the recorded checksum. A copy is there whole and checked,
or not at all; one that goes between its naming and its mapping is made again by who was to map it.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, Final, final

from kdcli.cache.backends.base import HEADER_BYTES, Backend
from kdcli.cache.origin import ChunkFile
from kdcli.cache.owned import CHUNK_BYTES, read_own
from kdcli.cache.shelf import KEPT, STREAMS, Shelf, Stage
from kdcli.console import console, size
from kdcli.errors import Advice, UsageError
from kdcli.files import storage_errors

_MEMORY: Final = 2**30
"""Bytes of the chunks that are in memory at a time; at least one is."""

Read = Callable[[ChunkFile], bytes]


def is_recorded(backend: Backend, data: bytes, chunk: ChunkFile) -> bool:
    """Whether these bytes of a chunk are those that were committed."""
    found = backend.judge(data)
    return (found.size, found.crc, found.sound) == (chunk.size, chunk.crc, True)


@final
class Copies:
    """The copies of one cache."""

    def __init__(self, stage: Stage, cache_id: str, backend: Backend) -> None:
        self._shelf, self._backend = Shelf(stage, cache_id), backend
        self.stage, self.place = stage, self._shelf.place

    def fill(self, chunks: Sequence[ChunkFile], read: Read, title: str = "", recheck: bool = False) -> int:
        """Make the copies that are lacking, as many as the limit lets stay, several at a time.

        Args:
            chunks: what will be read, in any order.
            read: the bytes of one, compared with its record.
            title: of the progress; empty: none is shown.
            recheck: also read the copies that are here, and make those again that are not as recorded.

        Returns:
            Bytes copied.

        Raises:
            UsageError: the limit is smaller than a chunk.
            NoSpaceError: they do not fit on the disk.
        """
        chunks = self._within_limit(chunks, bool(title))
        with storage_errors(self.place):
            missing = self.lacking(chunks)
        if not recheck and not missing:
            return 0
        self._shelf.prepare()
        if recheck:
            self._drop_damaged(chunks)
            missing = self.lacking(chunks)
        self._shelf.require_space(sum(chunk.size for chunk in missing))
        copied, largest = 0, max((chunk.size for chunk in missing), default=1)
        random.shuffle(missing)  # processes that begin together share the work
        bar = console.progress(len(missing), "chunks", title) if title and missing else nullcontext()
        pool = ThreadPoolExecutor(max(1, min(STREAMS, _MEMORY // max(1, largest))), "kd-copy")
        with bar as shown:
            try:
                for future in as_completed([pool.submit(self.make, chunk, read) for chunk in missing]):
                    copied += future.result()
                    if shown is not None:
                        shown.advance(1, copied=size(copied))
            finally:
                pool.shutdown(cancel_futures=True)
        return copied

    def _within_limit(self, chunks: Sequence[ChunkFile], told: bool) -> Sequence[ChunkFile]:
        """The first of them that fit together."""
        limit = self.stage.limit
        if limit is None:
            return chunks
        most, used, fit = int(limit * KEPT), 0, []
        for chunk in chunks:
            if chunk.size > most:
                raise UsageError(
                    f"the stage may hold {size(limit)}, and a chunk of this cache has {size(chunk.size)}",
                    Advice("stage-limit"),
                )
            used += chunk.size
            if used <= most:
                fit.append(chunk)
        if told and used > most:
            console.warn(
                f"{size(used)} will be read, and the stage may hold {size(most)} on this disk: the rest is "
                "fetched again whenever it is read"
            )
        return fit

    def _drop_damaged(self, chunks: Sequence[ChunkFile]) -> None:
        for chunk in chunks:
            copy = self.place / chunk.copy_name
            if copy.is_file() and not is_recorded(
                self._backend, read_own(copy, CHUNK_BYTES + HEADER_BYTES), chunk
            ):
                copy.unlink()

    def lacking(self, chunks: Iterable[ChunkFile]) -> list[ChunkFile]:
        """Those without a copy as it was left."""
        by_name = {chunk.copy_name: chunk for chunk in chunks}
        return [by_name[name] for name in self._shelf.lacking(by_name)]

    def use(self, chunk: ChunkFile) -> Path | None:
        """The copy, for who is about to map it: it is the last to be removed now. None: there is none."""
        return self._shelf.use(chunk.copy_name)

    def make(self, chunk: ChunkFile, read: Read) -> int:
        """Make a copy; see :meth:`~kdcli.cache.shelf.Shelf.make`, and :meth:`fill` for ``read``."""

        def fill(file: BinaryIO) -> None:
            file.write(read(chunk))

        return self._shelf.make(chunk.copy_name, chunk.size, fill)
