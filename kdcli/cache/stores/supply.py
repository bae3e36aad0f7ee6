"""Chunks of a cache in a store: fetched when they are read, checked, and kept on a disk of this machine.

The client of the store runs threads, which a process that was forked (a decode worker, say) has not: it would wait for
ever. Such a process lets a child of its own fetch. That is for chunks that are not there yet, or any more; those that a
run needs are brought before it begins.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

from kdcli import errors
from kdcli.cache.backends.base import HEADER_BYTES
from kdcli.cache.copies import Copies, is_recorded
from kdcli.cache.layout import BackendName
from kdcli.cache.origin import ChunkFile, Origin, stands_for
from kdcli.cache.owned import CHUNK_BYTES
from kdcli.cache.shelf import Stage
from kdcli.cache.store import BACKENDS
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.places import Place
from kdcli.console import console
from kdcli.errors import Advice, CorruptError, DeviceError, KdError, StorageError

_ATTEMPTS: Final = 4
"""How often a copy is fetched that other processes remove at once."""
_MAPPED: Final = 4
"""Copies that are mapped may take this part of the limit after they were removed."""
_HELPER: Final = "from kdcli.cache.stores.supply import serve; serve()"


@final
class Supplier(Origin):
    """See the base.

    Args:
        url: of the cache.
        root: the folder here that stands for it.
        stage: where copies are.
        cache_id, backend: of the cache.
    """

    def __init__(self, url: str, root: Path, stage: Stage, cache_id: str, backend: BackendName) -> None:
        self.name, self._root, self._cache_id, self._backend = url, root, cache_id, backend
        self._copies = Copies(stage, cache_id, BACKENDS[backend])
        self._place: Place | None = None
        self._helper: subprocess.Popen[str] | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_place": None, "_helper": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        stands_for(self._root, self)

    def read(self, path: Path) -> bytes:
        """See the base."""
        if self._place is None:
            self._place = open_place(self.name)
        return self._place.read(path.relative_to(self._root).as_posix(), CHUNK_BYTES + HEADER_BYTES)

    def bring(self, chunks: Sequence[ChunkFile], title: str = "", recheck: bool = False) -> None:
        """See the base."""
        if not _Forked.now:
            self._copies.fill(chunks, self._checked, title, recheck)
        elif recheck or self._copies.lacking(chunks):
            self._let_fetch(chunks)

    def copy(self, chunk: ChunkFile) -> Path:
        """See the base."""
        for _ in range(_ATTEMPTS):
            if (found := self._copies.use(chunk)) is not None:
                return found
            self.bring([chunk])
        raise StorageError(
            f"copies of {self.name} in {self._copies.place} are removed as soon as they are made",
            Advice("stage-limit"),
        )

    def most_maps(self, largest: int) -> int:
        """See the base."""
        limit = self._copies.stage.limit
        return sys.maxsize if limit is None else max(16, limit // _MAPPED // largest)

    def _checked(self, chunk: ChunkFile) -> bytes:
        try:
            data = self.read(chunk.path)
        except FileNotFoundError:
            raise CorruptError(f"{chunk.path} is recorded, but gone", Advice("push-again")) from None
        if not is_recorded(BACKENDS[self._backend], data, chunk):
            raise CorruptError(
                f"{chunk.path}: its bytes are not those that were committed", Advice("push-changed")
            )
        return data

    # --- in a process that was forked ---------------------------------------------------------------

    def _let_fetch(self, chunks: Sequence[ChunkFile]) -> None:
        if self._helper is None or self._owner != os.getpid():
            self._helper, self._owner = self._started(), os.getpid()
        helper = self._helper
        assert helper.stdin is not None
        assert helper.stdout is not None
        asked = [[str(c.path.relative_to(self._root)), c.copy_name, c.size, c.crc] for c in chunks]
        try:
            helper.stdin.write(json.dumps(asked) + "\n")
            helper.stdin.flush()
            answer = helper.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._helper = None
            raise DeviceError(
                f"the process that fetches chunks of {self.name} ended", "Run the same command again."
            )
        if refusal := json.loads(answer):
            kind, message, hint = refusal
            raise getattr(errors, kind)(message, hint)

    def _started(self) -> "subprocess.Popen[str]":
        stage = self._copies.stage
        about = [self.name, str(self._root), str(stage.folder), stage.limit, self._cache_id, self._backend]
        path = os.pathsep.join(each for each in sys.path if each)
        return subprocess.Popen(
            [sys.executable, "-c", _HELPER, json.dumps(about)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip


class _Forked:
    """Whether this process was forked by one that may have asked a store."""

    now = False


def _remember() -> None:
    _Forked.now = _Forked.now or "obstore" in sys.modules


os.register_at_fork(after_in_child=_remember)


def serve() -> None:
    """Fetch what is asked for, a list of chunks a line, until whoever asks is gone; see :meth:`Supplier.bring`."""
    url, root, folder, limit, cache_id, backend = json.loads(sys.argv[1])
    console.silent = True
    supplier = Supplier(url, Path(root), Stage(Path(folder), limit), cache_id, backend)
    stands_for(Path(root), supplier)
    for line in sys.stdin:
        chunks = [ChunkFile(Path(root, path), *facts) for path, *facts in json.loads(line)]
        answer = None
        try:
            supplier.bring(chunks)
        except KdError as error:
            answer = (type(error).__name__, error.message, error.hint)
        print(json.dumps(answer), flush=True)
