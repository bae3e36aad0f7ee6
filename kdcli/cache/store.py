"""The files of one cache, whatever its backend: records of teachers, arrays, chunks."""

import os
from abc import ABC
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.arrays import WHOLE_ARRAYS, ArrayExtent, array_folder, sample_arrays
from kdcli.cache.backends.base import Backend, Inspection
from kdcli.cache.backends.hdf5 import HDF5Backend
from kdcli.cache.backends.zarr import ZarrBackend
from kdcli.cache.classifier import CLASSIFIER, Classifier, read_classifier
from kdcli.cache.keytable import KeyTable, block_digest
from kdcli.cache.layout import SAMPLES, BackendName, Layout, Manifest
from kdcli.cache.origin import origin_of
from kdcli.cache.owned import CHUNK_BYTES, read_own, repair_hint, require_unlinked
from kdcli.cache.provenance import ArraySpec, OutputRecord, TeacherRecord, read_record, seal
from kdcli.errors import Advice, CorruptError, IdentityError, StorageError, UsageError
from kdcli.files import atomic_write_bytes, create_bytes, create_json, make_folder, storage_errors
from kdcli.outputs import MAPS, PIXELS, STATS
from kdcli.types import Difference

BACKENDS: dict[BackendName, Backend] = {"zarr": ZarrBackend(), "hdf5": HDF5Backend()}
KIND_ORDER = ("logits", "topk", STATS, "features", "maps", PIXELS)


@final
class Store:
    """Where the arrays of a cache lie, and what they are.

    Attributes:
        layout: paths of the bookkeeping.
        manifest: what the cache is.
        backend: how its chunks are stored.
        origin: where they come from; None: they are in the folder.
        teachers: records by name, as they were when the store was opened or :meth:`refresh` was called.

    Args:
        root: folder of the cache.
        manifest: what it is.
        teachers: those that are known to be sound; default: all, and each has to be.
    """

    def __init__(
        self, root: Path, manifest: Manifest, teachers: dict[str, TeacherRecord] | None = None
    ) -> None:
        self.layout, self.manifest = Layout(root), manifest
        self.backend, self.origin = BACKENDS[manifest.backend], origin_of(root)
        require_unlinked(root, self._common_folders())
        self.teachers = load_teachers(self.layout) if teachers is None else teachers
        for record in self.teachers.values():
            self._require_usable(record, CorruptError)

    def _common_folders(self) -> list[Path]:
        """Folders that every cache has, or may have."""
        layout = self.layout
        claims = [layout.claims / name for name in (SAMPLES, "index", "manifest")]
        arrays = [self.folder(SAMPLES, name) for name in (*WHOLE_ARRAYS, *sample_arrays(self.manifest))]
        return [
            layout.teachers, layout.commits / SAMPLES, layout.verified, layout.tmp, self.data / "teachers",
            *claims, *arrays,
        ]  # fmt: skip

    def _require_usable(self, record: TeacherRecord, error: type[CorruptError] | type[UsageError]) -> None:
        """Refuse a teacher whose folders are links, or whose blocks are larger than any memory."""
        layout, name, most = self.layout, record.name, CHUNK_BYTES // self.manifest.block_rows
        folders = [layout.teachers / name]
        for kind, output in record.outputs.items():
            part = f"{name}/{kind}"
            folders += [layout.commits / part, layout.claims / part]
            for array, spec in output.array_specs().items():
                folders.append(self.folder(part, array))
                if spec.row_bytes > most:
                    raise error(
                        f"{layout.output(name, kind)}: arrays.{array}: blocks of {self.manifest.block_rows} rows of "
                        f"{spec.row_bytes} bytes are larger than {CHUNK_BYTES} bytes",
                        "Use smaller blocks.",
                    )
        require_unlinked(layout.root, folders)

    @property
    def data(self) -> Path:
        """Folder of the arrays."""
        return self.layout.data(self.manifest.backend)

    def refresh(self) -> None:
        """Read the teachers' records again."""
        self.teachers = load_teachers(self.layout)

    def parts(self) -> list[str]:
        """Every part of the cache: the samples, and each kind of output of each teacher."""
        outputs = ((name, kind) for name, record in self.teachers.items() for kind in record.outputs)
        return [SAMPLES, *(f"{name}/{kind}" for name, kind in outputs)]

    def specs(self, part: str) -> dict[str, ArraySpec]:
        """The arrays of a part."""
        if part == SAMPLES:
            return sample_arrays(self.manifest)
        return self.output(part).array_specs()

    def output(self, part: str) -> OutputRecord:
        """The record of a part that is an output of a teacher."""
        teacher, _, kind = part.partition("/")
        return self.teachers[teacher].outputs[kind]

    def part_id(self, part: str) -> str:
        """The id that commit records of this part carry."""
        if part == SAMPLES:
            return self.manifest.cache_id
        return self.teachers[part.partition("/")[0]].id

    def views(self, part: str) -> int:
        """How many views a part holds: the first so many of the cache's."""
        count = self.manifest.views
        return count if part == SAMPLES else self.output(part).views(count)

    def units_of(self, part: str) -> Iterator[tuple[int, int]]:
        """(block, group) of every unit that a part has when it is complete."""
        groups = self.manifest.groups_of(self.views(part))
        return ((block, group) for block in range(self.manifest.blocks) for group in range(groups))

    def arrays_in(self, part: str, group: int) -> dict[str, ArraySpec]:
        """The arrays that a unit of this view group holds: those without views are in group 0 only."""
        return {name: spec for name, spec in self.specs(part).items() if spec.per_view or group == 0}

    # --- chunks ----------------------------------------------------------------------------------

    def folder(self, part: str, name: str) -> Path:
        """Folder of an array."""
        return self.data / array_folder(part, name)

    def chunk(self, part: str, name: str, spec: ArraySpec, block: int, view: int | None) -> Path:
        """File of a chunk; ``view`` is ignored for arrays without views."""
        place = view if spec.per_view else None
        return self.folder(part, name) / self.backend.chunk_name(block, place, len(spec.row_shape))

    def chunks_of(self, part: str, name: str, spec: ArraySpec, block: int, group: int) -> list[Path]:
        """Files of an array that one unit holds, in view order."""
        if not spec.per_view:
            return [self.chunk(part, name, spec, block, None)]
        views = self.manifest.views_of(group, self.views(part))
        return [self.chunk(part, name, spec, block, view) for view in views]

    def write(self, path: Path, values: np.ndarray) -> list[int]:
        """Write a chunk; [size, crc32c] for the record."""
        return self.backend.write(path, values, self.layout.tmp)

    def inspect(self, path: Path) -> Inspection:
        """Read a chunk and say what it is."""
        if self.origin is None:
            return self.backend.inspect(path)
        with storage_errors(path):
            return self.backend.judge(self.origin.read(path))

    # --- arrays of whole data sets ---------------------------------------------------------------

    def whole(self, name: str, length: int) -> np.ndarray:
        """Map the first ``length`` values of keys or labels: a growing cache may have more already.

        Raises:
            CorruptError: there are fewer.
        """
        spec = WHOLE_ARRAYS[name]
        path = self.chunk(SAMPLES, name, spec, 0, None)
        count = -1
        while True:
            try:
                with storage_errors(path):
                    before, count = count, self.backend.rows_in(path, spec)
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                raise CorruptError(f"{path} is missing", repair_hint(path)) from error
            if count < length:
                raise CorruptError(f"{path} holds {count} values, not {length}", repair_hint(path))
            try:
                return self.backend.map(path, count, spec)[:length]
            except CorruptError:
                if count == before:  # else a longer array may have taken its place in between
                    raise

    def load_keys(self) -> KeyTable:
        """The keys of all rows, checked against the manifest.

        Raises:
            CorruptError: they are not the manifest's.
        """
        offsets = self.whole("key_offsets", self.manifest.rows + 1)
        keys = KeyTable(self.whole("key_bytes", max(0, int(offsets[-1]))), offsets)
        if not keys.is_sound() or keys.digest() != self.manifest.data.keys:
            raise CorruptError(
                f"{self.layout.root}: its keys are not those of its manifest", repair_hint(self.layout.root)
            )
        return keys

    def load_labels(self) -> Int64[np.ndarray, " n"]:
        """The labels of all rows, -1 = unlabelled, checked against the manifest."""
        rows, recorded = self.manifest.rows, self.manifest.data.labels
        if recorded is None:
            return np.full(rows, -1, np.int64)
        labels = self.whole("labels/class", rows)
        if block_digest(labels) != recorded:
            raise CorruptError(
                f"{self.layout.root}: its labels are not those of its manifest", repair_hint(self.layout.root)
            )
        require_classes(labels, self.manifest, self.layout.root)
        return labels

    # --- records and metadata --------------------------------------------------------------------

    def add_teacher(self, record: TeacherRecord) -> None:
        """Record a teacher and its outputs where they are not there yet; the first writer of a record wins.

        Raises:
            IdentityError: another process was faster with another teacher of this name; it gets none of the
                outputs of this one.
        """
        path = self.layout.teacher(record.name)
        self._require_usable(record, UsageError)
        with storage_errors(path):
            make_folder(path.parent)
        create_json(path, seal(record.document()), self.layout.tmp)
        read_teacher(path).require_same(record, str(self.layout.root))
        for kind, output in record.outputs.items():
            document = output.model_dump(mode="json")
            create_json(self.layout.output(record.name, kind), seal(document), self.layout.tmp)
        self.refresh()

    def classifier(self, name: str) -> Classifier | None:
        """The linear classifier that is kept of a teacher; None: it has none, or none is kept.

        Raises:
            CorruptError: it was changed after it was written.
        """
        return read_classifier(self.layout, self.teachers[name])

    def add_classifier(self, name: str, classifier: Classifier) -> Path:
        """Keep the classifier of a recorded teacher, where none is kept yet; its file."""
        path = self.layout.teacher(name).with_name(CLASSIFIER)
        create_bytes(path, classifier.to_bytes(self.teachers[name].id), self.layout.tmp)
        return path

    def write_metadata(self, keys: KeyTable) -> None:
        """Make every folder, and every metadata file that is missing or out of date."""
        documents = self.backend.metadata(self.manifest, keys, self.teachers)
        folders = {self.folder(part, name) for part in self.parts() for name in self.specs(part)}
        with storage_errors(self.data):
            for folder in sorted(folders | {(self.data / path).parent for path in documents}):
                make_folder(folder)
            for path, content in documents.items():
                target = self.data / path
                if not target.is_file() or target.is_symlink() or read_own(target) != content:
                    atomic_write_bytes(target, content, self.layout.tmp)


class Opened(ABC):
    """What a reader and a writer of one cache share.

    Attributes:
        store: its files.
    """

    store: Store

    @property
    def layout(self) -> Layout:
        """Paths of the cache."""
        return self.store.layout

    @property
    def manifest(self) -> Manifest:
        """What the cache is."""
        return self.store.manifest

    @property
    def teachers(self) -> dict[str, TeacherRecord]:
        """Recorded teachers by name."""
        return self.store.teachers

    def specs(self, part: str) -> dict[str, ArraySpec]:
        """The arrays of a part."""
        return self.store.specs(part)


def require_classes(labels: Int64[np.ndarray, " n"], manifest: Manifest, source: object) -> None:
    """Refuse labels that are no class of a cache.

    Raises:
        CorruptError: naming the first one.
    """
    classes = len(manifest.data.class_names or ())
    wrong = np.flatnonzero((labels < -1) | (labels >= classes))
    if len(wrong):
        raise CorruptError(
            f"{source}: labels/class: row {wrong[0]} is of class {labels[wrong[0]]} of {classes}",
            "Make the cache again.",
        )


def load_teachers(layout: Layout) -> dict[str, TeacherRecord]:
    """The teachers of a cache, by name, each with the kinds that are kept of it.

    Raises:
        CorruptError: a record was changed after it was written.
        IdentityError: a folder was renamed.
    """
    found = {}
    with storage_errors(layout.teachers):
        folders = sorted(layout.teachers.iterdir()) if layout.teachers.is_dir() else []
        require_unlinked(layout.root, folders)
        for folder in folders:
            path = folder / "teacher.json"
            if not os.path.lexists(path):
                continue  # being made, or being removed
            record = read_teacher(path)
            outputs = in_order(read_output(file) for file in folder.glob("*.json") if file != path)
            found[record.name] = keeping(record, outputs, folder)
    return found


def names_output(stem: str) -> bool:
    """Whether a record or a file of commits that is called so may be one of a kind of output."""
    return stem in KIND_ORDER or stem.startswith(MAPS)


def read_output(path: Path) -> OutputRecord:
    """The record of a kind of output.

    Raises:
        CorruptError: it was changed after it was written, or is of another kind.
    """
    if not names_output(path.stem):
        raise CorruptError(f"{path} is no record of an output of a teacher", repair_hint(path))
    hint = Advice("restore-output")
    record = read_record(OutputRecord, path, hint)
    if record.name != path.stem:
        raise CorruptError(f"{path} is the record of {record.name}", hint)
    return record


def keeping(record: TeacherRecord, outputs: dict[str, OutputRecord], source: Path) -> TeacherRecord:
    """A teacher with the outputs that are recorded beside it.

    Raises:
        CorruptError: they are not its own.
    """
    try:
        return record.keeping(outputs)
    except ValueError as refusal:
        raise CorruptError(f"{source}: {refusal}", Advice("restore-teacher")) from refusal


def read_teacher(path: Path) -> TeacherRecord:
    """The record in ``teacher.json``, still without its outputs.

    Raises:
        CorruptError: it was changed after it was written.
        IdentityError: its folder was renamed.
    """
    record = read_record(TeacherRecord, path, Advice("restore-teacher"))
    if record.name != path.parent.name:
        difference = Difference("name", record.name, path.parent.name)
        raise IdentityError(f"{path.parent} was renamed", f"Rename it back to '{record.name}'.", [difference])
    return record


def in_order(outputs: Iterable[OutputRecord]) -> dict[str, OutputRecord]:
    """Outputs by name, in a fixed order."""
    ordered = sorted(
        outputs, key=lambda output: (KIND_ORDER.index(output.kind), output.tap, output.pool, output.pool_time)
    )
    return {output.name: output for output in ordered}


def stored_bytes(manifest: Manifest, extents: Iterable[ArrayExtent]) -> dict[str, int]:
    """Bytes on disk of arrays when they are complete, the padding of the last block included, by name."""
    backend = BACKENDS[manifest.backend]
    return {e.name: e.chunks * backend.file_size(e.rows, e.spec) for e in extents}
