"""What a packed cache travels in: an HDF5 file, a Zarr group in a folder, or that group in one zip.

Arrays are real ones, cut into the cache's blocks, so that any tool of the format reads them; kd's own records
lie beside them as UTF-8 JSON. The Zarr group has the files of a cache's ``data.zarr`` as they are there; only
HDF5 needs its arrays written one by one.
"""

import gzip
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, final, get_args

import numpy as np

from kdcli.cache.arrays import ArrayExtent
from kdcli.cache.backends.base import checksum
from kdcli.cache.backends.zarr import CRC_BYTES, ZarrBackend, describe
from kdcli.cache.provenance import ArraySpec
from kdcli.errors import Advice, BadDataError, CorruptError, KdError, UsageError
from kdcli.files import storage_errors

Compression = Literal["none", "gzip", "zstd"]
GZIP_LEVEL, ZSTD_LEVEL = 4, 3
MAX_CHUNK_BYTES = 2**30
"""HDF5 takes chunks below 4 GiB, compressors buffers below 2: larger blocks are cut, or not compressed."""
PACK_AGAIN = Advice("pack-again")
_TEXT = ArraySpec((), "|u1", per_view=False)
_ZARR = ZarrBackend()


class Container(ABC):
    """Named arrays and texts in one file. Made by :func:`create` and :func:`open_container`."""

    suffixes: ClassVar[tuple[str, ...]]
    compressions: ClassVar[tuple[Compression, ...]]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compression: Compression = "none"

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
    def declare(self, extent: ArrayExtent) -> None:
        """Make an array of which nothing is written yet."""

    @abstractmethod
    def write(self, extent: ArrayExtent, block: int, view: int | None, values: np.ndarray) -> None:
        """Write a chunk: all rows of a block, fill values past the end of the array."""

    @abstractmethod
    def read(self, extent: ArrayExtent, block: int, view: int | None) -> np.ndarray:
        """What :meth:`write` wrote.

        Raises:
            CorruptError: the chunk is not there, or is damaged.
        """

    @abstractmethod
    def put_text(self, name: str, text: str) -> None:
        """Write a text, as an array of bytes."""

    @abstractmethod
    def text(self, name: str) -> str:
        """A text that :meth:`put_text` wrote.

        Raises:
            CorruptError: it is not there, or is damaged.
        """

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...


# --- HDF5 -----------------------------------------------------------------------------------------


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
    _file: Any = None

    def start(self) -> None:
        """See the base."""
        import h5py

        from kdcli.cache.backends.hdf5 import LIBVER

        self._disk = _Disk(self.path)
        self._file = h5py.File(self._disk, "w", libver=LIBVER)

    def open(self) -> None:
        """See the base."""
        import h5py

        if not h5py.is_hdf5(self.path):
            raise BadDataError(f"{self.path} is no HDF5 file", Advice("not-packed"))
        self._file = h5py.File(self.path, "r")

    def close(self) -> None:
        """See the base."""
        if self._file is not None:
            self._file.close()
        if self._disk is not None:
            self._disk.close()
            self._disk.check()

    def declare(self, extent: ArrayExtent) -> None:
        """See the base."""
        rows = min(extent.chunk[0], extent.shape[0], MAX_CHUNK_BYTES // max(1, extent.spec.row_bytes))
        chunks = tuple(max(1, size) for size in (rows, *extent.chunk[1:]))
        filters: dict[str, Any] = {"chunks": chunks, "fletcher32": True}
        if self.compression == "gzip":
            filters |= {"compression": "gzip", "compression_opts": GZIP_LEVEL, "shuffle": True}
        self._file.create_dataset(
            extent.folder,
            shape=extent.shape,
            dtype=extent.spec.dtype,
            fillvalue=extent.spec.fill,
            track_times=False,
            **(filters if all(extent.shape) else {}),  # HDF5 has no chunks of nothing
        )

    def write(self, extent: ArrayExtent, block: int, view: int | None, values: np.ndarray) -> None:
        """See the base; rows past the end are not in an HDF5 array."""
        rows = self._rows(extent, block)
        self._file[extent.folder][rows if view is None else (rows, view)] = values[: rows.stop - rows.start]
        if self._disk is not None:
            self._disk.check()

    def read(self, extent: ArrayExtent, block: int, view: int | None) -> np.ndarray:
        """See the base."""
        rows = self._rows(extent, block)
        with _reading(self.path):
            array = self._file[extent.folder]
            if (array.shape, array.dtype) != (extent.shape, np.dtype(extent.spec.dtype)):
                message = f"{self.path}: {extent.folder} holds {array.dtype} {array.shape}"
                raise CorruptError(message, PACK_AGAIN)
            found = array[rows if view is None else (rows, view)]
        values = np.full((extent.rows, *extent.spec.row_shape), extent.spec.fill, extent.spec.dtype)
        values[: len(found)] = found
        return values

    @staticmethod
    def _rows(extent: ArrayExtent, block: int) -> slice:
        start = block * extent.chunk[0]
        return slice(start, min(start + extent.chunk[0], extent.shape[0]))

    def put_text(self, name: str, text: str) -> None:
        """See the base."""
        extent = _text_extent(name, text.encode())
        self.declare(extent)
        self.write(extent, 0, None, np.frombuffer(text.encode(), np.uint8))

    def text(self, name: str) -> str:
        """See the base."""
        with _reading(self.path):
            return bytes(self._file[name][:]).decode()

    def __contains__(self, name: str) -> bool:
        with _reading(self.path):
            return name in self._file


# --- Zarr -----------------------------------------------------------------------------------------


class ZarrContainer(Container):
    """A plain Zarr v3 group: one file a chunk, each with its crc32c, as in a cache of that backend."""

    compressions = ("none", "gzip", "zstd")
    _described: frozenset[str] = frozenset()

    @abstractmethod
    def _put(self, name: str, pieces: list[bytes]) -> None:
        """Write a file of the group."""

    @abstractmethod
    def _get(self, name: str, most: int | None = None) -> bytes:
        """A file of the group, refused where it has more than ``most`` bytes."""

    def declare(self, extent: ArrayExtent) -> None:
        """See the base."""
        codec: dict[str, Any] = {
            "gzip": {"name": "gzip", "configuration": {"level": GZIP_LEVEL}},
            "zstd": {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},
        }.get(self.compression, {})
        documents = describe([extent], [codec] if codec and extent.part else [])
        for name, document in documents.items():
            if name not in self._described:
                self._put(name, [document])
        self._described |= documents.keys()

    def write(self, extent: ArrayExtent, block: int, view: int | None, values: np.ndarray) -> None:
        """See the base."""
        pieces, _ = _ZARR.encode(values)
        if extent.part and self.compression != "none":
            if len(pieces[0]) > MAX_CHUNK_BYTES:
                size = f"{len(pieces[0]) / 1e9:.1f} GB"
                raise UsageError(f"{extent.folder} has blocks of {size}, too large to be compressed")
            body = _compress(pieces[0], self.compression)
            pieces = [body, checksum(body).to_bytes(CRC_BYTES, "little")]
        self._put(self._chunk(extent, block, view), pieces)

    def read(self, extent: ArrayExtent, block: int, view: int | None) -> np.ndarray:
        """See the base."""
        size, name = extent.rows * extent.spec.row_bytes, self._chunk(extent, block, view)
        squeezed = extent.part and self.compression != "none"
        with _reading(self.path):
            # What cannot be made smaller grows by a little.
            body = self._body(name, size + (size // 64 + 1024 if squeezed else 0))
            payload = _expand(body, self.compression, size) if squeezed else body
            return np.frombuffer(payload, extent.spec.dtype).reshape(extent.rows, *extent.spec.row_shape)

    @staticmethod
    def _chunk(extent: ArrayExtent, block: int, view: int | None) -> str:
        return f"{extent.folder}/{_ZARR.chunk_name(block, view, len(extent.spec.row_shape))}"

    def _body(self, name: str, most: int | None = None) -> bytes:
        """A chunk file without its checksum, which has to fit."""
        data = self._get(name, None if most is None else most + CRC_BYTES)
        if checksum(memoryview(data)[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
            raise CorruptError(f"{self.path}: {name} does not fit its checksum", PACK_AGAIN)
        return data[:-CRC_BYTES]

    def put_text(self, name: str, text: str) -> None:
        """See the base."""
        extent = _text_extent(name, text.encode())
        self.declare(extent)
        self.write(extent, 0, None, np.frombuffer(text.encode(), np.uint8))

    def text(self, name: str) -> str:
        """See the base."""
        with _reading(self.path):
            return self._body(f"{name}/c.0").decode()


@final
class ZarrFolder(ZarrContainer):
    """The group as a folder."""

    suffixes = (".zarr",)

    def start(self) -> None:
        """See the base."""
        self.path.mkdir()

    def open(self) -> None:
        """See the base."""
        if not self.path.is_dir():
            raise BadDataError(f"{self.path} is no Zarr group", Advice("not-packed"))

    def close(self) -> None:
        """See the base."""

    def _put(self, name: str, pieces: list[bytes]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(pieces)

    def _get(self, name: str, most: int | None = None) -> bytes:
        path = self.path / name
        if most is not None and path.stat().st_size > most:
            raise CorruptError(f"{self.path}: {name} is larger than its chunk", PACK_AGAIN)
        return path.read_bytes()

    def __contains__(self, name: str) -> bool:
        return (self.path / name).exists()


@final
class ZarrZip(ZarrContainer):
    """The group in one zip file, its files in the order they were written and not compressed once more."""

    suffixes = (".zarr.zip",)
    _zip: zipfile.ZipFile | None = None

    def start(self) -> None:
        """See the base."""
        self._zip = zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED)

    def open(self) -> None:
        """See the base."""
        try:
            self._zip = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise BadDataError(f"{self.path} is no Zarr group", Advice("not-packed")) from error

    def close(self) -> None:
        """See the base."""
        if self._zip is not None:
            self._zip.close()

    def _put(self, name: str, pieces: list[bytes]) -> None:
        assert self._zip is not None
        info = zipfile.ZipInfo(name)  # of 1980: the same cache makes the same file
        info.file_size = sum(map(len, pieces))
        with self._zip.open(info, "w") as file:
            for piece in pieces:
                file.write(piece)

    def _get(self, name: str, most: int | None = None) -> bytes:
        assert self._zip is not None
        info = self._zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or (most is not None and info.file_size > most):
            raise CorruptError(f"{self.path}: {name} is not stored as kd stores it", PACK_AGAIN)
        return self._zip.read(info)

    def __contains__(self, name: str) -> bool:
        assert self._zip is not None
        return f"{name}/zarr.json" in self._zip.namelist()


def _text_extent(name: str, data: bytes) -> ArrayExtent:
    """A text as an array; it belongs to no part, and is never compressed."""
    return ArrayExtent("", "", name, (len(data),), (max(1, len(data)),), _TEXT, whole=True)


def _compress(data: bytes, compression: Compression) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, GZIP_LEVEL, mtime=0)
    from numcodecs.zstd import Zstd

    return bytes(Zstd(level=ZSTD_LEVEL).encode(data))


def _expand(data: bytes, compression: Compression, size: int) -> bytes:
    """Undo :func:`_compress`; never makes more than ``size`` bytes of it, whatever it says of itself."""
    if compression == "gzip":
        return zlib.decompressobj(wbits=31).decompress(data, max(1, size))
    from numcodecs.zstd import Zstd

    out = np.empty(size, np.uint8)
    return bytes(memoryview(Zstd().decode(data, out=out)))


# --- choosing, writing, reading -------------------------------------------------------------------

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
    raise UsageError(f"{path}: a packed cache is a file of {endings}", Advice("pack-ending"))


def require_compression(path: Path, compress: str) -> Compression:
    """Check a compression for this file.

    Raises:
        UsageError: unknown, or the format cannot do it.
    """
    kind = kind_of(path)
    for known in get_args(Compression):
        if compress == known and known in kind.compressions:
            return known  # type: ignore[no-any-return]
    if compress == "zstd":
        raise UsageError(f"{path}: HDF5 reads zstd only where a plug-in is installed", Advice("pack-zstd"))
    raise UsageError(
        f"compression {compress} is unknown for {path}", f"Choose one of: {', '.join(kind.compressions)}."
    )


@contextmanager
def create(kind: type[Container], path: Path, compress: Compression) -> Iterator[Container]:
    """Write a container; any refusal of the disk is an error with a code."""
    container = kind(path)
    container.compression = compress
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
        if isinstance(error, OSError) and error.errno and not isinstance(error, FileNotFoundError):
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
