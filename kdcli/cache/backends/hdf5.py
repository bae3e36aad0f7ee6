"""HDF5: each chunk is a small file with one contiguous data set, mapped where its rows lie.

Never one growing file: a killed writer leaves it unreadable (measured). hdf5_index.py joins the chunks for
other tools.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from kdcli.cache.backends.base import Backend, Inspection, checksum
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import BackendName, Manifest
from kdcli.cache.owned import open_own, regular_size, repair_hint
from kdcli.cache.provenance import ArraySpec, TeacherRecord
from kdcli.errors import CorruptError

DATASET = "data"
LIBVER = ("v110", "v110")  # one on-disk form whatever newer library writes it
BROKEN = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What h5py raises on a file with damaged headers."""
_FILTERS = {1, 2, 3}
"""deflate, shuffle, fletcher32: what kd packs with. Others may be anybody's code."""
_OTHERS = "Make the cache again, or pack it again; kd did not write this."
ALIGNMENT = 64
"""Rows start at a multiple of this, so that a map of them is aligned."""


@final
class HDF5Backend(Backend):
    """One chunk file is a whole HDF5 file; its recorded crc32c covers all of it, headers included."""

    name: ClassVar[BackendName] = "hdf5"

    def __init__(self) -> None:
        self._overheads: dict[tuple[int, ArraySpec], int] = {}
        self._heads: dict[tuple[int, ArraySpec], bytes] = {}

    def chunk_name(self, block: int, view: int | None, row_axes: int) -> str:
        """See the base."""
        return f"c.{block}.h5" if view is None else f"c.{block}.{view}.h5"

    def encode(self, values: np.ndarray) -> tuple[list[bytes], int]:
        """The HDF5 file and its crc32c."""
        content = _file_of(values)
        return [content], checksum(content)

    def file_size(self, rows: int, spec: ArraySpec) -> int:
        """See the base; headers depend on shape and type alone."""
        few = min(rows, 1)  # headers do not depend on the number of rows, once there is one (tested)
        if (few, spec) not in self._overheads:
            probe = _file_of(np.zeros((few, *spec.row_shape), spec.dtype))
            self._overheads[few, spec] = len(probe) - few * spec.row_bytes
        return self._overheads[few, spec] + rows * spec.row_bytes

    def payload_offset(self, path: Path, rows: int, spec: ArraySpec) -> int:
        """See the base. A file that begins as one that was looked into holds its rows in the same place."""
        head = self._heads.get((rows, spec))
        if head is not None and _beginning(path, len(head)) == head:
            return len(head)
        with _dataset(path) as dataset:
            offset = dataset.id.get_offset()
            if dataset.shape != (rows, *spec.row_shape) or dataset.dtype != np.dtype(spec.dtype):
                raise CorruptError(f"{path} holds {dataset.dtype} {dataset.shape}", repair_hint(path))
        if offset is None:
            raise CorruptError(f"{path} is not contiguous", repair_hint(path))
        self._heads[rows, spec] = _beginning(path, int(offset))
        return int(offset)

    def rows_in(self, path: Path, spec: ArraySpec) -> int:
        """See the base."""
        with _dataset(path) as dataset:
            return int(dataset.shape[0])

    def judge(self, data: bytes) -> Inspection:
        """See the base; such a file carries no checksum of its own."""
        return Inspection(len(data), checksum(data), sound=True)

    def metadata(
        self, manifest: Manifest, keys: KeyTable, teachers: Mapping[str, TeacherRecord]
    ) -> dict[str, bytes]:
        """None: every file describes itself."""
        return {}


@contextmanager
def _dataset(path: Path) -> Iterator[Any]:
    import h5py

    try:
        if regular_size(path) < 0:
            raise CorruptError(f"{path} is no regular file", repair_hint(path))
        with h5py.File(path, "r") as file:
            yield plain_dataset(file, DATASET, path)
    except (FileNotFoundError, PermissionError, CorruptError):
        raise
    except BROKEN as error:
        raise CorruptError(f"{path} is no HDF5 file of kd: {error}", repair_hint(path)) from error


def plain_dataset(file: Any, name: str, source: object) -> Any:
    """A data set that lies in this very file as numbers.

    Args:
        file: open.
        name: of the data set, with the groups above it.
        source: for messages.

    Raises:
        KeyError: there is none.
        CorruptError: a link leads to it, its rows are in other files, or they are no plain numbers: HDF5 would open
            what the file names, and make objects of any size.
    """
    import h5py

    found = file
    for part in name.split("/"):
        # h5py's own `in` and `get` follow links, into other files as well.
        links = found.id.links if isinstance(found, h5py.Group) else None
        if links is None or not links.exists(part.encode()):
            raise KeyError(f"no data set {name}")
        if links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise CorruptError(f"{source}: {name} is a link to elsewhere", _OTHERS)
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        raise CorruptError(f"{source}: {name} is no data set", _OTHERS)
    plist = found.id.get_create_plist()
    filters = {plist.get_filter(number)[0] for number in range(plist.get_nfilters())}
    if found.is_virtual or found.external or found.dtype.kind not in "fiu" or not filters <= _FILTERS:
        raise CorruptError(f"{source}: {name} is not stored as kd stores it", _OTHERS)
    return found


def _beginning(path: Path, size: int) -> bytes:
    with os.fdopen(open_own(path), "rb", buffering=0) as file:
        return file.read(size)


def _file_of(values: np.ndarray) -> bytes:
    import h5py

    buffer = io.BytesIO()
    aligned = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with h5py.File(buffer, "w", libver=LIBVER, **aligned) as file:
        file.create_dataset(DATASET, data=values, track_times=False)
    return buffer.getvalue()


@final
class RefusingFile:
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
