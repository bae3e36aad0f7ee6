"""What a storage backend must do: one file a chunk, written whole, mapped as it is."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np

from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import BackendName, Manifest
from kdcli.cache.memory import map_bytes
from kdcli.cache.owned import CHUNK_BYTES, read_own, regular_size, repair_hint
from kdcli.cache.provenance import ArraySpec, TeacherRecord
from kdcli.errors import CorruptError, StorageError
from kdcli.files import scratch_name, storage_errors

HEADER_BYTES: Final = 2**16
"""Most bytes of what is in a chunk file besides its rows."""


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """What a chunk file is now.

    Attributes:
        size: bytes of the file.
        crc: crc32c of what the backend's records vouch for.
        sound: whether the file agrees with the checksum that it carries itself.
    """

    size: int
    crc: int
    sound: bool


def checksum(data: bytes | memoryview) -> int:
    """crc32c (Castagnoli), the one Zarr's codec uses."""
    import google_crc32c

    return int(google_crc32c.value(bytes(data)))


class Backend(ABC):
    """How arrays lie on disk. A chunk is one block of one view; arrays of whole data sets are one chunk."""

    name: ClassVar[BackendName]

    @abstractmethod
    def chunk_name(self, block: int, view: int | None, row_axes: int) -> str:
        """File name of a chunk, within the folder of its array."""

    @abstractmethod
    def encode(self, values: np.ndarray) -> tuple[list[bytes], int]:
        """The pieces of the file that holds ``values``, and the crc32c to record for it."""

    @abstractmethod
    def file_size(self, rows: int, spec: ArraySpec) -> int:
        """Bytes of the file of ``rows`` rows."""

    @abstractmethod
    def payload_offset(self, path: Path, rows: int, spec: ArraySpec) -> int:
        """Where the raw rows start in a chunk file.

        Raises:
            CorruptError: it holds no rows of that shape and type.
        """

    @abstractmethod
    def rows_in(self, path: Path, spec: ArraySpec) -> int:
        """Number of rows of ``spec`` in a chunk file."""

    @abstractmethod
    def judge(self, data: bytes) -> Inspection:
        """What the bytes of a whole chunk file are."""

    def inspect(self, path: Path) -> Inspection:
        """Read a whole chunk file."""
        with storage_errors(path):
            return self.judge(read_own(path, CHUNK_BYTES + HEADER_BYTES))

    @abstractmethod
    def metadata(
        self, manifest: Manifest, keys: KeyTable, teachers: Mapping[str, TeacherRecord]
    ) -> dict[str, bytes]:
        """Files that describe the arrays to other tools: path below the data folder -> content.

        They follow from the manifest and the records alone, so they can be checked and made again.
        """

    def foresee(self, values: np.ndarray) -> list[int]:
        """What :meth:`write` would return, without writing."""
        pieces, crc = self.encode(np.ascontiguousarray(values))
        return [sum(map(len, pieces)), crc]

    def write(self, path: Path, values: np.ndarray, tmp: Path) -> list[int]:
        """Write one whole chunk: temporary file outside the array, fsync, rename.

        Returns:
            Size of the file in bytes and the crc32c, as the record has them.
        """
        pieces, crc = self.encode(np.ascontiguousarray(values))
        temporary = tmp / scratch_name()
        with storage_errors(path):
            try:
                with temporary.open("wb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return [sum(map(len, pieces)), crc]

    def map(self, path: Path, rows: int, spec: ArraySpec) -> np.ndarray:
        """Map the rows of a chunk file, read-only.

        Raises:
            CorruptError: the file is missing or has another size.
        """
        try:
            size, expected = regular_size(path), self.file_size(rows, spec)
            if size < 0:
                raise CorruptError(f"{path} is no regular file", repair_hint(path))
            if size != expected:
                raise CorruptError(f"{path} has {size} bytes, not {expected}", repair_hint(path))
            shape = (rows, *spec.row_shape)
            if not rows * spec.row_bytes:
                return np.empty(shape, spec.dtype)  # nothing can be mapped of nothing
            offset = self.payload_offset(path, rows, spec)
            payload = map_bytes(path, size)[offset : offset + rows * spec.row_bytes]
        except FileNotFoundError as error:
            raise CorruptError(f"{path} is committed but missing", repair_hint(path)) from error
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{path}: {error.strerror}", "Check its permissions.") from error
        return payload.view(spec.dtype).reshape(shape)
