"""What ``kd cache-teachers`` did, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from kdcli.cache.admin.progress import percent
from kdcli.cache.arrays import output_extents
from kdcli.cache.layout import Manifest
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.store import stored_bytes
from kdcli.documents import to_document
from kdcli.results import Result, Table


@final
@dataclass(frozen=True, slots=True)
class TeacherProgress:
    """One teacher's part of the result: tasks (blocks x view groups) in total, done now, written by this run."""

    id: str
    arrays: dict[str, dict[str, Any]]
    total: int
    done: int
    written: int


@final
@dataclass(frozen=True, slots=True)
class CacheResult(Result):
    """What ``kd cache-teachers`` did. ``bytes`` are those of the named teachers' arrays on disk."""

    bars: ClassVar = ("teacher", "tasks.done")

    cache_id: str | None
    rows: int
    views: int
    teachers: dict[str, TeacherProgress]
    images_per_second: float | None
    bytes: int
    dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        teachers = {
            name: {
                **to_document(part, "id", "arrays"),
                "tasks": to_document(part, "total", "done", "written"),
            }
            for name, part in self.teachers.items()
        }
        document = {
            **to_document(self, "cache_id", "rows", "views"),
            "teachers": teachers,
            **to_document(self, "images_per_second", "bytes"),
        }
        return document | ({"dry_run": True} if self.dry_run else {})

    def records(self) -> list[dict[str, Any]]:
        """A teacher each."""
        return [{"teacher": name, **one} for name, one in self.document()["teachers"].items()]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        rows = [
            [name, percent(part.done, part.total), percent(part.written, part.total), _kept(part)]
            for name, part in self.teachers.items()
        ]
        return (Table(("teacher", "complete", "in this run", "kept of every view of an image"), rows),)


def _kept(part: TeacherProgress) -> str:
    """Shapes without the axes of images and views, and without the statistics that are kept with logits."""
    kept = [
        f"{name} {'x'.join(map(str, spec['shape'][2:]))} {spec['dtype']}"
        for name, spec in part.arrays.items()
        if len(spec["shape"]) > 2 and name != "lse"
    ]
    return ", ".join(kept) or "-"


def payload_bytes(manifest: Manifest, record: TeacherRecord) -> dict[str, int]:
    """Bytes on disk of each of a teacher's arrays when complete."""
    return stored_bytes(manifest, output_extents(manifest, record))


def shapes(manifest: Manifest, record: TeacherRecord) -> dict[str, dict[str, Any]]:
    """Full shape and type of a teacher's arrays."""
    extents = output_extents(manifest, record)
    return {e.name: {"shape": list(e.shape), "dtype": np.dtype(e.spec.dtype).name} for e in extents}
