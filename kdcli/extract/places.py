"""Where the cache of a run is: a folder, or a path in a bucket, with a skeleton of it in a folder of the run's own."""

import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, final

from kdcli.cache.filling import Filling
from kdcli.cache.garbage import is_abandoned
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import Layout, Manifest
from kdcli.cache.stores.folders import FolderPlace
from kdcli.cache.stores.founding import adopt, found
from kdcli.cache.stores.growing import fetch_contents, growing
from kdcli.cache.stores.leases import Pace, probe
from kdcli.cache.stores.objects import ObjectPlace
from kdcli.cache.stores.opening import open_place
from kdcli.cache.stores.writer import StoreWriter
from kdcli.cache.writer import CacheWriter, create_cache
from kdcli.errors import KdError, UsageError
from kdcli.files import available_bytes, scratch_name, storage_errors

_SCRATCH = "kd-writer"


class CachePlace(ABC):
    """Where a cache is or will be.

    Attributes:
        root: folder with its manifest, keys and teachers, if it is there.
    """

    root: Path

    @abstractmethod
    def create(self, manifest: Manifest, keys: KeyTable, labels: Any) -> Manifest:
        """Make the cache; another process may be faster, whose manifest counts."""

    @abstractmethod
    def writer(self, manifest: Manifest, timeout: float | None = None) -> Filling:
        """Who fills it; without being entered, it only looks.

        Args:
            manifest: what it is.
            timeout: of its claims; default: the cache's.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room for it; None: nobody knows."""

    @abstractmethod
    def growing(self, images: bool, dry_run: bool) -> AbstractContextManager[None]:
        """Around :func:`~kdcli.extract.extend.extend_cache` of the root.

        Args:
            images: it compares and adds images.
            dry_run: it writes nothing.
        """

    @abstractmethod
    def named(self, text: str) -> str:
        """A text with the cache's name in the place of the root."""


@final
class FolderCache(CachePlace):
    """A cache in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, manifest: Manifest, keys: KeyTable, labels: Any) -> Manifest:
        """See the base."""
        return create_cache(self.root, manifest, keys, labels)

    def writer(self, manifest: Manifest, timeout: float | None = None) -> Filling:
        """See the base."""
        return CacheWriter(self.root, manifest, timeout=timeout)

    def free_bytes(self) -> int | None:
        """See the base."""
        return available_bytes(self.root.absolute())

    def growing(self, images: bool, dry_run: bool) -> AbstractContextManager[None]:
        """See the base."""
        return nullcontext()

    def named(self, text: str) -> str:
        """See the base."""
        return text


@final
class StoreCache(CachePlace):
    """A cache in a bucket."""

    def __init__(self, place: ObjectPlace, root: Path) -> None:
        self._place, self.root = place, root

    def create(self, manifest: Manifest, keys: KeyTable, labels: Any) -> Manifest:
        """See the base."""
        probe(self._place)  # before anything is there that would have to be removed again
        return found(self._place, self.root, manifest, keys, labels)

    def writer(self, manifest: Manifest, timeout: float | None = None) -> Filling:
        """See the base."""
        return StoreWriter(self._place, self.root, manifest, Pace.of(timeout or manifest.claim_timeout))

    def free_bytes(self) -> int | None:
        """See the base."""
        return None

    def growing(self, images: bool, dry_run: bool) -> AbstractContextManager[None]:
        """See the base."""
        there = Layout(self.root).manifest.is_file()
        if images and there:
            fetch_contents(self._place, self.root)
        return growing(self._place, self.root) if there and not dry_run else nullcontext()

    def named(self, text: str) -> str:
        """See the base."""
        return text.replace(str(self.root), self._place.name)


@contextmanager
def opened(cache: Path | str) -> Iterator[CachePlace]:
    """A cache in a folder, or by its URL in a store; what this process has of one in a bucket goes with the block.

    Raises:
        UsageError: the URL is of no bucket.
        StorageError: the store refuses, or does not answer.
        CorruptError: what is there is no sound cache.
    """
    if isinstance(cache, Path):
        yield FolderCache(cache)
        return
    place = open_bucket(cache)
    with _scratch() as root:
        here = StoreCache(place, root)
        try:
            adopt(place, root)
            yield here
        except KdError as error:  # of the skeleton, which nobody knows
            error.message, error.hint = here.named(error.message), here.named(error.hint)
            raise


def open_bucket(url: str) -> ObjectPlace:
    """The place of a cache that writers share; nothing is asked of it yet.

    Raises:
        UsageError: it is in no bucket.
    """
    place = open_place(url)
    if isinstance(place, FolderPlace):
        raise UsageError(f"{url} is a folder, which needs no URL", f"Give {url.removeprefix('file://')}")
    if not isinstance(place, ObjectPlace):
        raise UsageError(
            f"{url}: the hub has no conditional writes, so writers cannot share a cache there",
            "Cache into a folder or a bucket, then kd cache push.",
        )
    return place


@contextmanager
def _scratch() -> Iterator[Path]:
    """A path for a skeleton, and the blocks that are on their way; what killed processes left goes first."""
    parent = Path(tempfile.gettempdir())
    for litter in parent.glob(f"{_SCRATCH}.*"):
        if is_abandoned(litter, time.time()):
            shutil.rmtree(litter, ignore_errors=True)
    folder = parent / f"{_SCRATCH}.{scratch_name()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700)
    try:
        yield folder / "cache.kd"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
