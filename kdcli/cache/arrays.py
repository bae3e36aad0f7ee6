"""Which arrays a cache has, of which shape, and in which chunks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import final

from kdcli.cache.keytable import KeyTable
from kdcli.cache.layout import SAMPLES, Manifest
from kdcli.cache.provenance import ArraySpec, TeacherRecord

WHOLE_ARRAYS: dict[str, ArraySpec] = {
    "key_bytes": ArraySpec((), "|u1", per_view=False),
    "key_offsets": ArraySpec((), "<i8", per_view=False),
    "labels/class": ArraySpec((), "<i8", per_view=False),
}
"""What is known of the samples before a task runs: keys and labels, each one chunk."""


@final
@dataclass(frozen=True, slots=True)
class ArrayExtent:
    """One array of a cache.

    Attributes:
        part: what it belongs to, see :class:`~kdcli.cache.layout.Unit`.
        name: within the part.
        folder: below the data folder.
        shape: of the whole array.
        chunk: of one chunk; arrays of whole data sets have one.
        spec: row shape and type.
        whole: it is one chunk.
    """

    part: str
    name: str
    folder: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    spec: ArraySpec
    whole: bool = False

    @property
    def rows(self) -> int:
        """Rows of one chunk file."""
        return self.shape[0] if self.whole else self.chunk[0]

    @property
    def chunks(self) -> int:
        """Number of chunk files when it is complete."""
        return (
            1
            if self.whole
            else prod(-(-n // size) for n, size in zip(self.shape, self.chunk, strict=True) if size)
        )


def sample_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """What a task learns of the samples as it decodes: size and crc32c of the bytes, view parameters."""
    return {
        "content_size": ArraySpec((), "<i8", per_view=False),
        "content_crc": ArraySpec((), "<u4", per_view=False),
        "params": ArraySpec((len(manifest.param_names),), "<i4"),
    }


def array_folder(part: str, name: str) -> str:
    """Folder of an array below the data folder. View parameters belong to the samples but lie apart."""
    if part != SAMPLES:
        return f"teachers/{part.partition('/')[0]}/{name}"
    return f"views/{name}" if name == "params" else f"{SAMPLES}/{name}"


def whole_arrays(manifest: Manifest, keys: KeyTable) -> dict[str, int]:
    """Lengths of the arrays that are one chunk."""
    lengths = {"key_bytes": len(keys.blob), "key_offsets": manifest.rows + 1}
    return lengths if manifest.data.labels is None else {**lengths, "labels/class": manifest.rows}


def whole_extent(name: str, length: int) -> ArrayExtent:
    """Keys or labels, which are one chunk."""
    folder, spec = array_folder(SAMPLES, name), WHOLE_ARRAYS[name]
    return ArrayExtent(SAMPLES, name, folder, (length,), (max(1, length),), spec, whole=True)


def array_extents(
    manifest: Manifest, keys: KeyTable, teachers: Mapping[str, TeacherRecord]
) -> Iterator[ArrayExtent]:
    """All arrays of a cache."""
    for name, length in whole_arrays(manifest, keys).items():
        yield whole_extent(name, length)
    for name, spec in sample_arrays(manifest).items():
        yield _extent(manifest, SAMPLES, name, spec, manifest.views)
    for teacher in teachers.values():
        yield from output_extents(manifest, teacher)


def output_extents(manifest: Manifest, teacher: TeacherRecord) -> Iterator[ArrayExtent]:
    """The arrays of a teacher."""
    for output in teacher.outputs.values():
        for name, spec in output.array_specs().items():
            part = f"{teacher.name}/{output.name}"
            yield _extent(manifest, part, name, spec, output.views(manifest.views))


def _extent(manifest: Manifest, part: str, name: str, spec: ArraySpec, views: int) -> ArrayExtent:
    axis = ((views,), (1,)) if spec.per_view else ((), ())
    shape = (manifest.rows, *axis[0], *spec.row_shape)
    chunk = (manifest.block_rows, *axis[1], *spec.row_shape)
    return ArrayExtent(part, name, array_folder(part, name), shape, chunk, spec)
