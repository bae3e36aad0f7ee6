"""What killed writers leave behind: found, counted, removed. Nothing of a writer that may be alive is touched.

    tmp/*, .*.tmp                unpublished files, beside records as well
    .NAME.*.tmp beside NAME      a cache that was being created
    claims/**                    claims of dead writers
    chunks without a record      of a unit whose writer died before its commit

Readers never look at any of it, and a rerun needs none of it removed: it only takes space.
"""

import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kdcli.cache.claims import STALE_SECONDS, Claims, filesystem_now, is_running
from kdcli.cache.commits import read_commit, read_commits
from kdcli.cache.layout import Layout, Unit, load_manifest
from kdcli.cache.store import Store
from kdcli.files import sizes_in, storage_errors
from kdcli.runtime import machine

SCRATCH = re.compile(r"([0-9a-f]{12})-(\d+)-[0-9a-f]{16}")
"""What :func:`~kdcli.files.scratch_name` makes, wherever it stands in a name."""


@final
@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What was removed, or would be: number of files, their bytes, and the paths, folders as one."""

    files: int
    bytes: int
    paths: tuple[str, ...]


def collect_garbage(root: Path, dry_run: bool = False) -> GarbageReport:
    """Remove what killed writers left in a cache and beside it; safe while others write.

    Args:
        root: the cache.
        dry_run: only count.

    Raises:
        KdError: there is no sound cache, or something cannot be removed.
    """
    store = Store(root, load_manifest(root))
    bin_ = _Bin(dry_run)
    _sweep(store.layout, bin_)
    claims = Claims(store.layout)
    for part in store.parts():
        for unit, files in _uncommitted(store, part):
            if dry_run:
                if not claims.is_live(unit):
                    bin_.add(files)
            elif claims.acquire(unit):  # from here on nobody else writes these files
                try:
                    if read_commit(store.layout, unit) is None:
                        bin_.add(files)
                finally:
                    claims.release([unit])
    return bin_.report()


def sweep(layout: Layout) -> GarbageReport:
    """Remove unpublished files and claims of dead writers: quick, so that every run does it when it starts."""
    bin_ = _Bin(dry_run=False)
    _sweep(layout, bin_)
    return bin_.report()


@final
class _Bin:
    """Removes and counts."""

    def __init__(self, dry_run: bool) -> None:
        self._dry_run = dry_run
        self._sizes: dict[Path, int] = {}
        self._paths: list[Path] = []

    def add(self, paths: list[Path], claims: Claims | None = None) -> None:
        """Remove files and folders that may be gone already; dead claims through ``claims``."""
        for path in paths:
            sizes = sizes_in(path)
            if not self._dry_run and not self._remove(path, claims):
                continue
            self._sizes |= sizes
            self._paths.append(path)

    @staticmethod
    def _remove(path: Path, claims: Claims | None) -> bool:
        if claims is not None:
            return claims.discard(path)
        with storage_errors(path), suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return True

    def report(self) -> GarbageReport:
        """What it holds."""
        paths = tuple(str(path) for path in self._paths)
        return GarbageReport(len(self._sizes), sum(self._sizes.values()), paths)


def _sweep(layout: Layout, bin_: _Bin) -> None:
    with storage_errors(layout.root):
        if scratch := list(_scratch(layout)):  # asking for the time makes a file: a sound cache is left alone
            now = filesystem_now(layout.tmp)
            bin_.add([path for path in scratch if is_abandoned(path, now)])
        judge = Claims(layout)
        claimed = [path for path in layout.claims.rglob("*") if path.is_file()]
        bin_.add([path for path in claimed if judge.is_dead(path)], judge)


def _scratch(layout: Layout) -> Iterator[Path]:
    """Everything that is not published yet."""
    yield from layout.tmp.glob("*")
    yield from layout.root.glob(".*.tmp")
    for folder in (layout.teachers, layout.commits, layout.verified):
        yield from folder.rglob(".*.tmp")
    yield from layout.root.absolute().parent.glob(f".{glob.escape(layout.root.name)}.*.tmp")


def is_abandoned(path: Path, now: float) -> bool:
    """Whether the process that was writing ``path`` is dead: known on its machine, else told by silence."""
    owner = SCRATCH.search(path.name)
    if owner and owner[1] == machine():
        return not is_running(int(owner[2]))
    try:
        touched = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
    except FileNotFoundError:
        return False  # somebody is at work here
    return now - touched > STALE_SECONDS


def _uncommitted(store: Store, part: str) -> Iterator[tuple[Unit, list[Path]]]:
    """Units without a record of which there are files."""
    there = {path for name in store.specs(part) for path in store.folder(part, name).glob("c.*")}
    commits = read_commits(store.layout, part)
    for block, group in store.units_of(part):
        if (block, group) in commits:
            continue
        arrays = store.arrays_in(part, group).items()
        chunks = [path for name, spec in arrays for path in store.chunks_of(part, name, spec, block, group)]
        files = [path for path in chunks if path in there]
        if files:
            yield Unit(part, block, group), files
