"""What a packed cache travels in: an HDF5 file, a Zarr group in a folder, or that group in one zip.

Arrays are real ones, cut into the cache's blocks, so that any tool of the format reads them; kd's own records
lie beside them as UTF-8 JSON, in arrays of bytes. The Zarr group has the files of a cache's ``data.zarr`` as they
are there; only HDF5 needs its arrays written one by one.
"""

import gzip
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, final, get_args

import numpy as np

from kdcli.cache.admin.zips import PACK_AGAIN, TEXT_BYTES, require_plain
from kdcli.cache.arrays import ArrayExtent
from kdcli.cache.backends.base import checksum
from kdcli.cache.backends.hdf5 import LIBVER, RefusingFile, plain_dataset
from kdcli.cache.backends.zarr import CRC_BYTES, ZarrBackend, describe
from kdcli.cache.owned import read_own, require_unlinked
from kdcli.cache.provenance import ArraySpec
from kdcli.console import size
from kdcli.errors import Advice, BadDataError, CorruptError, KdError, UsageError
from kdcli.files import storage_errors
from kdcli.reading import require_regular

Compression = Literal["none", "gzip", "zstd"]
GZIP_LEVEL, ZSTD_LEVEL = 4, 3
MAX_CHUNK_BYTES = 2**30
"""HDF5 takes chunks below 4 GiB, compressors buffers below 2: larger blocks are cut, or not compressed."""
_HDF5, _FOLDER, _ZIP = (".h5", ".hdf5"), (".zarr",), (".zarr.zip",)
_CODECS: Final[dict[Compression, list[dict[str, Any]]]] = {
    "none": [],
    "gzip": [{"name": "gzip", "configuration": {"level": GZIP_LEVEL}}],
    "zstd": [{"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}],
}
_GZIP: Final = {"compression": "gzip", "compression_opts": GZIP_LEVEL, "shuffle": True}
_ZARR = ZarrBackend()


class Container(ABC):
    """Named arrays and documents in one file. Made by :func:`create` and :func:`open_container`.

    Attributes:
        path: the file.
        compression: of the chunks of arrays; documents are not compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compression: Compression = "none"

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

    def put_bytes(self, name: str, content: bytes) -> None:
        """Write a document."""
        data = np.frombuffer(content, np.uint8)
        spec = ArraySpec((), "|u1", per_view=False)
        extent = ArrayExtent("", "", name, data.shape, (max(1, len(data)),), spec, whole=True)
        self.declare(extent)
        self.write(extent, 0, None, data)

    @abstractmethod
    def bytes_of(self, name: str) -> bytes:
        """What :meth:`put_bytes` wrote.

        Raises:
            CorruptError: it is not there, or is damaged.
        """

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...
    @abstractmethod
    def close(self) -> None:
        """Write what is left, and close the file."""


# --- HDF5 -----------------------------------------------------------------------------------------


@final
class _HDF5File(Container):
    """Without a plug-in HDF5 knows no zstd, so gzip it is; fletcher32 guards every chunk."""

    def __init__(self, path: Path, write: bool) -> None:
        import h5py

        super().__init__(path)
        if not write and not h5py.is_hdf5(path):
            raise BadDataError(f"{path} is no HDF5 file", Advice("not-packed"))
        self._disk = RefusingFile(path) if write else None
        self._file = h5py.File(self._disk, "w", libver=LIBVER) if write else h5py.File(path, "r")

    def close(self) -> None:
        self._file.close()
        if self._disk is not None:
            self._disk.close()
            self._disk.check()

    def declare(self, extent: ArrayExtent) -> None:
        filters: dict[str, Any] = {"chunks": _chunk_shape(extent), "fletcher32": True}
        filters |= _GZIP if self.compression == "gzip" else {}
        self._file.create_dataset(
            extent.folder,
            shape=extent.shape,
            dtype=extent.spec.dtype,
            fillvalue=extent.spec.fill,
            track_times=False,
            **(filters if all(extent.shape) else {}),  # HDF5 has no chunks of nothing
        )

    def write(self, extent: ArrayExtent, block: int, view: int | None, values: np.ndarray) -> None:
        rows = _rows(extent, block)  # those past the end are not in the array
        self._file[extent.folder][rows if view is None else (rows, view)] = values[: rows.stop - rows.start]
        if self._disk is not None:
            self._disk.check()

    def read(self, extent: ArrayExtent, block: int, view: int | None) -> np.ndarray:
        rows = _rows(extent, block)
        with _reading(self.path):
            array = plain_dataset(self._file, extent.folder, self.path)
            if (array.shape, array.dtype) != (extent.shape, np.dtype(extent.spec.dtype)):
                message = f"{self.path}: {extent.folder} holds {array.dtype} {array.shape}"
                raise CorruptError(message, PACK_AGAIN)
            if array.chunks not in (None, _chunk_shape(extent)):  # HDF5 reads whole ones, of any size
                raise CorruptError(f"{self.path}: {extent.folder} is in chunks of {array.chunks}", PACK_AGAIN)
            found = array[rows if view is None else (rows, view)]
        values = np.full((extent.rows, *extent.spec.row_shape), extent.spec.fill, extent.spec.dtype)
        values[: len(found)] = found
        return values

    def bytes_of(self, name: str) -> bytes:
        with _reading(self.path):
            array = plain_dataset(self._file, name, self.path)
            if array.dtype != np.uint8 or array.ndim != 1 or len(array) > TEXT_BYTES:
                raise CorruptError(f"{self.path}: {name} holds {array.dtype} {array.shape}", PACK_AGAIN)
            if array.chunks not in (None, (max(1, len(array)),)):
                raise CorruptError(f"{self.path}: {name} is in chunks of {array.chunks}", PACK_AGAIN)
            return bytes(array[:])

    def __contains__(self, name: str) -> bool:
        with _reading(self.path):
            try:
                plain_dataset(self._file, name, self.path)
            except KeyError:
                return False
            return True


def _chunk_shape(extent: ArrayExtent) -> tuple[int, ...]:
    rows = min(extent.chunk[0], extent.shape[0], MAX_CHUNK_BYTES // max(1, extent.spec.row_bytes))
    return (max(1, rows), *extent.chunk[1:])


def _rows(extent: ArrayExtent, block: int) -> slice:
    start = block * extent.chunk[0]
    return slice(start, min(start + extent.chunk[0], extent.shape[0]))


# --- Zarr -----------------------------------------------------------------------------------------


class _ZarrGroup(Container):
    """A plain Zarr v3 group: one file a chunk, each with its crc32c, as in a cache of that backend."""

    _described: frozenset[str] = frozenset()

    @abstractmethod
    def _put(self, name: str, pieces: list[bytes]) -> None:
        """Write a file of the group."""

    @abstractmethod
    def _get(self, name: str, most: int) -> bytes:
        """A file of the group; one of more than ``most`` bytes is refused."""

    def close(self) -> None:
        """See the base: nothing is open."""

    def declare(self, extent: ArrayExtent) -> None:
        documents = describe([extent], _CODECS[self.compression] if extent.part else [])
        for name, document in documents.items():
            if name not in self._described:
                self._put(name, [document])
        self._described |= documents.keys()

    def write(self, extent: ArrayExtent, block: int, view: int | None, values: np.ndarray) -> None:
        pieces, _ = _ZARR.encode(values)
        if extent.part and self.compression != "none":
            if len(pieces[0]) > MAX_CHUNK_BYTES:
                raise UsageError(f"blocks of {size(len(pieces[0]))} are too much to compress")
            body = _compress(pieces[0], self.compression)
            pieces = [body, checksum(body).to_bytes(CRC_BYTES, "little")]
        self._put(_chunk(extent, block, view), pieces)

    def read(self, extent: ArrayExtent, block: int, view: int | None) -> np.ndarray:
        size, squeezed = extent.rows * extent.spec.row_bytes, extent.part and self.compression != "none"
        with _reading(self.path):
            self._require_described(extent)
            # What cannot be made smaller grows by a little.
            body = self._body(_chunk(extent, block, view), size + (size // 64 + 1024 if squeezed else 0))
            payload = _expand(body, self.compression, size) if squeezed else body
            return np.frombuffer(payload, extent.spec.dtype).reshape(extent.rows, *extent.spec.row_shape)

    def _require_described(self, extent: ArrayExtent) -> None:
        """Refuse an array that other tools would read otherwise: of objects, through other codecs, elsewhere."""
        for name, document in describe([extent], _CODECS[self.compression]).items():
            if name not in self._described and self._get(name, 2**20) != document:
                raise CorruptError(f"{self.path}: {name} does not describe what kd packs there", PACK_AGAIN)
            self._described |= {name}

    def bytes_of(self, name: str) -> bytes:
        with _reading(self.path):
            return self._body(f"{name}/c.0", TEXT_BYTES)

    def _body(self, name: str, most: int) -> bytes:
        """A chunk file without its checksum, which has to fit."""
        data = self._get(name, most + CRC_BYTES)
        if checksum(memoryview(data)[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
            raise CorruptError(f"{self.path}: {name} does not fit its checksum", PACK_AGAIN)
        return data[:-CRC_BYTES]


@final
class _ZarrFolder(_ZarrGroup):
    def __init__(self, path: Path, write: bool) -> None:
        super().__init__(path)
        if write:
            path.mkdir()
        elif not path.is_dir():
            raise BadDataError(f"{path} is no Zarr group", Advice("not-packed"))

    def _put(self, name: str, pieces: list[bytes]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(pieces)

    def _get(self, name: str, most: int) -> bytes:
        require_unlinked(self.path, [(self.path / name).parent])
        return read_own(self.path / name, most)

    def __contains__(self, name: str) -> bool:
        return (self.path / name).exists()


@final
class _ZarrZip(_ZarrGroup):
    """The files in the order in which they were written, not compressed once more."""

    def __init__(self, path: Path, write: bool) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path, "w" if write else "r")
        except zipfile.BadZipFile as error:
            raise BadDataError(f"{path} is no Zarr group", Advice("not-packed")) from error
        self.close = self._zip.close  # type: ignore[method-assign]
        if not write:
            require_plain(self._zip, path)

    def _put(self, name: str, pieces: list[bytes]) -> None:
        info = zipfile.ZipInfo(name)  # of 1980: the same cache makes the same file
        info.file_size = sum(map(len, pieces))
        with self._zip.open(info, "w") as file:
            file.writelines(pieces)

    def _get(self, name: str, most: int) -> bytes:
        info = self._zip.getinfo(name)
        if info.file_size > most:
            raise CorruptError(f"{self.path}: {name} is not stored as kd stores it", PACK_AGAIN)
        return self._zip.read(info)

    def __contains__(self, name: str) -> bool:
        return f"{name}/zarr.json" in self._zip.namelist()


def _chunk(extent: ArrayExtent, block: int, view: int | None) -> str:
    return f"{extent.folder}/{_ZARR.chunk_name(block, view, len(extent.spec.row_shape))}"


def _compress(data: bytes, compression: Compression) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, GZIP_LEVEL, mtime=0)
    from numcodecs.zstd import Zstd

    return bytes(Zstd(level=ZSTD_LEVEL).encode(data))


def _expand(data: bytes, compression: Compression, size: int) -> bytes:
    """Undo :func:`_compress`; never makes more than ``size`` bytes of it, whatever the data claim."""
    if compression == "gzip":
        return zlib.decompressobj(wbits=31).decompress(data, max(1, size))
    from numcodecs.zstd import Zstd

    return bytes(memoryview(Zstd().decode(data, out=np.empty(size, np.uint8))))


# --- choosing, writing, reading -------------------------------------------------------------------


def require_compression(path: Path, compress: str) -> Compression:
    """Check a compression for this file.

    Raises:
        UsageError: unknown, or the format cannot do it; or the ending of the name is that of no format.
    """
    if not path.name.endswith((*_HDF5, *_FOLDER, *_ZIP)):
        endings = ", ".join((*_HDF5, *_FOLDER, *_ZIP))
        raise UsageError(f"{path}: a packed cache is a file of {endings}", Advice("pack-ending"))
    if compress == "zstd" and path.name.endswith(_HDF5):
        raise UsageError(f"{path}: HDF5 reads zstd only where a plug-in is installed", Advice("pack-zstd"))
    for known in get_args(Compression):
        if compress == known:
            return known  # type: ignore[no-any-return]
    can = ", ".join(get_args(Compression)[: 2 if path.name.endswith(_HDF5) else 3])
    raise UsageError(f"compression {compress} is unknown for {path}", f"Choose one of: {can}.")


@contextmanager
def create(path: Path, target: Path, compress: Compression) -> Iterator[Container]:
    """Write a container, of the form that the name of ``target`` asks for, to ``path``."""
    with _storage(path):
        container = _form(target)(path, True)
        container.compression = compress
        try:
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
    require_compression(path, "none")
    with _storage(path):
        if _form(path) is _ZarrFolder:
            path.stat()
        else:
            require_regular(path)
        with _reading(path):
            container = _form(path)(path, False)
        try:
            yield container
        finally:
            container.close()


def _form(path: Path) -> type[_HDF5File] | type[_ZarrFolder] | type[_ZarrZip]:
    if path.name.endswith(_HDF5):
        return _HDF5File
    return _ZarrZip if path.name.endswith(_ZIP) else _ZarrFolder


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
