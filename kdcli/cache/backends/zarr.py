"""Plain Zarr v3 whose chunk files are raw rows followed by their crc32c.

The metadata is written here, byte for byte the same for the same cache, so that it can be checked and
repaired; any Zarr v3 tool opens the group. Chunks are mapped as they are: zarr-python needs 112-195 ms
for 256 random rows where a map needs under 1 ms. No sharding codec: two writers in one shard lose rows
silently.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from kdcli.cache.arrays import ArrayExtent, array_extents
from kdcli.cache.backends.base import Backend, Inspection, checksum
from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import BackendName, Manifest
from kdcli.cache.owned import regular_size
from kdcli.cache.provenance import ArraySpec, TeacherRecord

CRC_BYTES = 4
_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


@final
class ZarrBackend(Backend):
    """One chunk file is ``rows * row_bytes`` bytes and 4 bytes of checksum."""

    name: ClassVar[BackendName] = "zarr"

    def chunk_name(self, block: int, view: int | None, row_axes: int) -> str:
        """The separator is a dot, so the chunks of an array are files of one folder."""
        place = [block] if view is None else [block, view]
        return ".".join(["c", *map(str, place), *["0"] * row_axes])

    def encode(self, values: np.ndarray) -> tuple[list[bytes], int]:
        """Raw rows, then their crc32c; the recorded crc is that of the rows."""
        payload = values.tobytes()
        crc = checksum(payload)
        return [payload, crc.to_bytes(CRC_BYTES, "little")], crc

    def file_size(self, rows: int, spec: ArraySpec) -> int:
        """See the base."""
        return rows * spec.row_bytes + CRC_BYTES

    def payload_offset(self, path: Path, rows: int, spec: ArraySpec) -> int:
        """0."""
        return 0

    def rows_in(self, path: Path, spec: ArraySpec) -> int:
        """See the base."""
        return (regular_size(path) - CRC_BYTES) // spec.row_bytes

    def judge(self, data: bytes) -> Inspection:
        """See the base."""
        stored = int.from_bytes(data[-CRC_BYTES:], "little") if len(data) >= CRC_BYTES else -1
        crc = checksum(memoryview(data)[:-CRC_BYTES])
        return Inspection(len(data), crc, stored == crc)

    def metadata(
        self, manifest: Manifest, keys: KeyTable, teachers: Mapping[str, TeacherRecord]
    ) -> dict[str, bytes]:
        """``zarr.json`` of every group and array."""
        groups = {f"{path}/zarr.json": _document(_GROUP) for path in ("samples", "views", "teachers")}
        return groups | describe(array_extents(manifest, keys, teachers))


def describe(extents: Iterable[ArrayExtent], codecs: Sequence[dict[str, Any]] = ()) -> dict[str, bytes]:
    """``zarr.json`` of some arrays and of every group above them; ``codecs`` compress the rows."""
    files = {}
    for extent in extents:
        for parent in reversed(Path(extent.folder).parents):
            files[str(parent / "zarr.json")] = _document(_GROUP)
        files[f"{extent.folder}/zarr.json"] = _document(_array(extent, codecs))
    return files


def _document(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _array(extent: ArrayExtent, codecs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metadata of an array, after the Zarr v3 specification."""
    kind = np.dtype(extent.spec.dtype)
    endian = {"endian": "little"} if kind.itemsize > 1 else {}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(extent.shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(extent.chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if kind.kind == "f" else extent.spec.fill,
        "codecs": [{"name": "bytes", "configuration": endian}, *codecs, {"name": "crc32c"}],
        "attributes": {},
    }
