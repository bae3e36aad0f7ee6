"""One file that a packed cache travels in: HDF5, a Zarr group, or a Zarr group in one zip.

Arrays are real ones, cut into the cache's blocks, so that any tool of the format reads them; kd's own
records lie beside them as UTF-8 JSON. Everything is written and read chunk by chunk.
"""

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, final, get_args

import numpy as np

from kdcli.cache.arrays import ArrayExtent
from kdcli.cache.provenance import ArraySpec
from kdcli.errors import BadDataError, CorruptError, KdError, UsageError
from kdcli.files import storage_errors

Compression = Literal["none", "gzip", "zstd"]
Place = slice | tuple[slice, int]
GZIP_LEVEL, ZSTD_LEVEL = 4, 3
MAX_CHUNK_BYTES = 2**30
"""HDF5 takes chunks below 4 GiB, compressors buffers below 2: larger blocks are cut."""
PACK_AGAIN = "Copy the file again from where it came from, or pack the cache again: kd cache pack"
TEXT = ArraySpec((), "|u1", per_view=False)


class Container(ABC):
    """Named arrays and texts in one file. Made by :func:`create` and :func:`open_container`."""

    suffixes: ClassVar[tuple[str, ...]]
    compressions: ClassVar[tuple[Compression, ...]]

    def __init__(self, path: Path, compress: Compression = "none") -> None:
        self.path, self._compress = path, compress
        self._root: Any = None
        self._arrays: dict[str, Any] = {}

    @abstractmethod
    def start(self) -> None:
        """Make the file."""

    @abstractmethod
    def open(self) -> None:
        """Open the file for reading."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left, and close it."""

    @abstractmethod
    def _declare(self, extent: ArrayExtent, chunk: tuple[int, ...]) -> Any:
        """Make an array."""

    def declare(self, extent: ArrayExtent) -> None:
        """Make an array of which nothing is written yet."""
        rows = min(extent.chunk[0], extent.shape[0], MAX_CHUNK_BYTES // max(1, extent.spec.row_bytes))
        chunk = tuple(max(1, size) for size in (rows, *extent.chunk[1:]))
        self._arrays[extent.folder] = self._declare(extent, chunk)

    def write(self, name: str, place: Place, values: np.ndarray) -> None:
        """Write rows, all of a chunk at once."""
        self._arrays[name][place] = values

    def put(self, name: str, values: np.ndarray) -> None:
        """Make a whole array in one go."""
        spec = ArraySpec((), values.dtype.str, per_view=False)
        self.declare(ArrayExtent("", "", name, values.shape, values.shape, spec))
        self.write(name, slice(None), values)

    def put_text(self, name: str, text: str) -> None:
        """Write a text, as an array of bytes."""
        self.put(name, np.frombuffer(text.encode(), np.uint8))

    def read(self, name: str, place: Place, spec: ArraySpec) -> np.ndarray:
        """Rows of an array.

        Raises:
            CorruptError: they are not of that shape and type.
        """
        with _reading(self.path):
            if name not in self._arrays:
                self._arrays[name] = self._root[name]
            values = np.asarray(self._arrays[name][place])
        if values.dtype != np.dtype(spec.dtype) or values.shape[1:] != spec.row_shape:
            raise CorruptError(f"{self.path}: {name} holds {values.dtype} {values.shape}", PACK_AGAIN)
        return np.ascontiguousarray(values)

    def text(self, name: str) -> str:
        """A text that :meth:`put_text` wrote."""
        return self.read(name, slice(None), TEXT).tobytes().decode(errors="replace")

    def __contains__(self, name: str) -> bool:
        with _reading(self.path):
            return name in self._root


@final
class _Disk:
    """A file whose refusals HDF5 does not see: on a full disk its library crashes the process (measured).

    After the first failure nothing is written any more; whoever writes asks :meth:`check` each time.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._failure: OSError | None = None
        self.seek, self.tell, self.read = self._file.seek, self._file.tell, self._file.read
        self.close = self._file.close

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from where the file stands."""
        return self._file.readinto(buffer) or 0

    def write(self, data: Any) -> int:
        """Write all of ``data``, or remember why not."""
        left = memoryview(data).cast("B")
        size = len(left)
        while len(left) and self._failure is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self._failure = error
        return size

    def truncate(self, size: int) -> None:
        """Set the size of the file."""
        try:
            self._file.truncate(size)
        except OSError as error:
            self._failure = self._failure or error

    def flush(self) -> None:
        """Nothing: there is no buffer."""

    def check(self) -> None:
        """Raise what was remembered."""
        if self._failure is not None:
            raise self._failure


@final
class HDF5Container(Container):
    """One HDF5 file. Without a plug-in HDF5 knows no zstd, so gzip it is; fletcher32 guards every chunk."""

    suffixes = (".h5", ".hdf5")
    compressions = ("none", "gzip")
    _disk: _Disk | None = None

    def start(self) -> None:
        """See the base."""
        import h5py

        from kdcli.cache.backends.hdf5 import LIBVER

        self._disk = _Disk(self.path)
        self._root = h5py.File(self._disk, "w", libver=LIBVER)

    def open(self) -> None:
        """See the base."""
        import h5py

        if not h5py.is_hdf5(self.path):
            raise BadDataError(f"{self.path} is no HDF5 file", "Give what kd cache pack wrote.")
        self._root = h5py.File(self.path, "r")

    def close(self) -> None:
        """See the base."""
        if self._root is not None:
            self._root.close()
        if self._disk is not None:
            self._disk.close()
            self._disk.check()

    def write(self, name: str, place: Place, values: np.ndarray) -> None:
        """See the base."""
        super().write(name, place, values)
        if self._disk is not None:
            self._disk.check()

    def _declare(self, extent: ArrayExtent, chunk: tuple[int, ...]) -> Any:
        filters: dict[str, Any] = {"chunks": chunk, "fletcher32": True}
        if self._compress == "gzip":
            filters |= {"compression": "gzip", "compression_opts": GZIP_LEVEL, "shuffle": True}
        return self._root.create_dataset(
            extent.folder,
            shape=extent.shape,
            dtype=extent.spec.dtype,
            fillvalue=extent.spec.fill,
            track_times=False,
            **(filters if all(extent.shape) else {}),  # HDF5 has no chunks of nothing
        )


class ZarrContainer(Container):
    """A plain Zarr v3 group: one file a chunk, each with its crc32c."""

    compressions = ("none", "gzip", "zstd")

    @abstractmethod
    def _store(self, mode: Literal["r", "w"]) -> Any:
        """The store of zarr-python."""

    def start(self) -> None:
        """See the base."""
        import zarr

        self._root = zarr.create_group(self._store("w"))

    def open(self) -> None:
        """See the base."""
        import zarr

        try:
            self._root = zarr.open_group(self._store("r"), mode="r")
        except (FileNotFoundError, zipfile.BadZipFile) as error:
            raise BadDataError(f"{self.path} is no Zarr group", "Give what kd cache pack wrote.") from error

    def close(self) -> None:
        """See the base."""
        if self._root is not None:
            self._root.store.close()

    def _declare(self, extent: ArrayExtent, chunk: tuple[int, ...]) -> Any:
        from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec

        codecs: dict[Compression, list[Any]] = {
            "none": [],
            "gzip": [GzipCodec(level=GZIP_LEVEL)],
            "zstd": [ZstdCodec(level=ZSTD_LEVEL)],
        }
        for parent in reversed(Path(extent.folder).parents[:-1]):
            self._root.require_group(str(parent))
        return self._root.create_array(
            extent.folder,
            shape=extent.shape,
            dtype=extent.spec.dtype,
            chunks=chunk,
            fill_value=extent.spec.fill,
            compressors=[*codecs[self._compress], Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},  # else NaN of any bits would come back as one kind of NaN
        )


@final
class ZarrFolder(ZarrContainer):
    """The group as a folder."""

    suffixes = (".zarr",)

    def _store(self, mode: Literal["r", "w"]) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=mode == "r")


@final
class ZarrZip(ZarrContainer):
    """The group in one zip file, not compressed once more."""

    suffixes = (".zarr.zip",)

    def _store(self, mode: Literal["r", "w"]) -> Any:
        from zarr.storage import ZipStore

        return ZipStore(self.path, mode=mode, compression=zipfile.ZIP_STORED)


_KINDS: tuple[type[Container], ...] = (HDF5Container, ZarrFolder, ZarrZip)


def kind_of(path: Path) -> type[Container]:
    """The container that a file name asks for.

    Raises:
        UsageError: its ending is none of theirs.
    """
    for kind in _KINDS:
        if path.name.endswith(kind.suffixes):
            return kind
    endings = ", ".join(suffix for kind in _KINDS for suffix in kind.suffixes)
    raise UsageError(f"{path}: a packed cache is a file of {endings}", "For example --to packed.h5")


def require_compression(path: Path, compress: str) -> Compression:
    """Check what ``--compress`` says for this file.

    Raises:
        UsageError: unknown, or the format cannot do it.
    """
    kind = kind_of(path)
    for known in get_args(Compression):
        if compress == known and known in kind.compressions:
            return known  # type: ignore[no-any-return]
    can = ", ".join(kind.compressions)
    if compress == "zstd":
        raise UsageError(
            f"{path}: HDF5 reads zstd only where a plug-in is installed",
            "Use --compress gzip, or a name that ends in .zarr or .zarr.zip.",
        )
    raise UsageError(f"--compress {compress} is unknown for {path}", f"Choose one of: {can}.")


@contextmanager
def create(kind: type[Container], path: Path, compress: Compression) -> Iterator[Container]:
    """Write a container; any refusal of the disk is an error with a code."""
    container = kind(path, compress)
    with _storage(path):
        try:
            container.start()
            yield container
        finally:
            container.close()


@contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """Read a container.

    Raises:
        StorageError: it is not there, or cannot be read.
        BadDataError: it is something else.
        CorruptError: the library of the format refuses its bytes.
    """
    container = kind_of(path)(path)
    with _storage(path):
        path.stat()
        try:
            with _reading(path):
                container.open()
            yield container
        finally:
            container.close()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Each library and codec has errors of its own for bytes that make no sense: one of ours for them all."""
    try:
        yield
    except (KdError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise CorruptError(f"{path}: {type(error).__name__}: {error}", PACK_AGAIN) from error


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    with storage_errors(path):
        try:
            yield
        except OSError as error:
            if isinstance(error, KdError) or not error.errno:
                raise
            # HDF5 tells its whole inner life; the reason is enough.
            raise OSError(error.errno, os.strerror(error.errno), error.filename or str(path)) from error
