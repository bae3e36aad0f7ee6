"""Running the teachers of a cache again as they ran: the same images, settings and batches."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, final

from kdcli.cache.pixels import as_pixels, require_same_pixels
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.console import console
from kdcli.errors import IdentityError, NotFoundError, UsageError
from kdcli.extract.config import CacheConfig
from kdcli.extract.opening import open_held
from kdcli.extract.teachers import describe_teacher
from kdcli.geometry import EvalGeometry
from kdcli.models.grammar import ModelSpec, recorded_model
from kdcli.outputs import STATS
from kdcli.runtime import pick_device

if TYPE_CHECKING:
    from kdcli.data.joined import Images
    from kdcli.data.views import ViewSet
    from kdcli.extract.worker import Worker


@final
@dataclass(frozen=True, slots=True)
class Sources:
    """Where images and teachers are now, and on what they run; what is not said is as recorded.

    Attributes:
        data: spec of the data set.
        teachers: specs by name.
        data_root: folder of relative and named data sets.
        device: auto, cpu, cuda or cuda:N.
        workers: decode processes; default: the processors of this job.
    """

    data: str | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
    data_root: Path | None = None
    device: str = "auto"
    workers: int | None = None

    def config(self, root: Path, record: TeacherRecord | None = None) -> CacheConfig:
        """The configuration that runs a recorded teacher, or only opens the images."""
        if record is None:
            return CacheConfig(data=self.data, cache=root, teacher=("SPEC",), data_root=self.data_root)
        return CacheConfig(
            data=self.data,
            cache=root,
            teacher=(f"{record.name}={self.spec(record)}",),
            keep=tuple(str(output.output) for output in record.outputs.values() if output.kind != STATS),
            dtype=record.dtype,
            temperatures=record.temperatures,
            batch_size=record.compute["batch_size"],
            device=self.device,
            data_root=self.data_root,
        )

    def spec(self, record: TeacherRecord) -> str:
        """Where a teacher is now, told its recorded size and arguments unless it is told others."""
        if (moved := self.teachers.get(record.name)) is None:
            return recorded_model(record.spec)
        own, was = ModelSpec.parse(moved), ModelSpec.parse(record.spec)
        return str(own if own != own.bare else own.telling(was.size, dict(was.arguments)))


def open_images(held: CacheReader, sources: Sources) -> "Images":
    """The images of a cache, row by row.

    Raises:
        KdError: they are not to be had, or are others.
    """
    root = held.layout.root
    try:
        return open_held(sources.config(root), held)
    except NotFoundError as error:
        raise NotFoundError(error.message, "Say where the images are now: --data SPEC") from error


def open_views(held: CacheReader) -> "ViewSet":
    """The views of a cache.

    Raises:
        IdentityError: this installation draws them otherwise.
    """
    from kdcli.data.views import ViewSet

    views = ViewSet.from_document(held.manifest.view_set)
    require_same_pixels(held.manifest.view_pixels, as_pixels(views.pixels()), held.layout.root)
    return views


def open_workers(
    held: CacheReader, sources: Sources, names: Collection[str], images: "Images"
) -> "dict[str, Worker]":
    """Teachers of a cache, ready to run as they ran.

    Raises:
        NotFoundError: a teacher is not to be had.
        IdentityError: it is not the recorded one.
    """
    return {name: _worker(held, sources, held.teachers[name], images) for name in names}


def _worker(held: CacheReader, sources: Sources, record: TeacherRecord, images: "Images") -> "Worker":
    from kdcli.extract.worker import Worker
    from kdcli.models.spec import open_model

    config, device = sources.config(held.layout.root, record), pick_device(sources.device)
    try:
        model = open_model(sources.spec(record))
        model = replace(model, preprocess=EvalGeometry.of(record.preprocess).applied(model.preprocess))
        teacher = describe_teacher(record.name, model, config, images, record)
    except NotFoundError as error:
        raise NotFoundError(
            f"teacher '{record.name}': {error.message}",
            f"Say where it is now: --teacher {quote(f'{record.name}=SPEC')}",
        ) from error
    except UsageError as error:  # it cannot give what is kept of the recorded one
        raise IdentityError(
            f"teacher '{record.name}' is another one at {sources.spec(record)}: {error.message}",
            f"Use the recorded one: {record.spec}",
        ) from error
    # Statistics are kept of as many views as what they come from was kept of when they were first asked for.
    outputs = {
        kind: output.model_copy(update={"eval_only": record.outputs[kind].eval_only})
        for kind, output in teacher.record.outputs.items()
    }
    record.require_same(teacher.record.model_copy(update={"outputs": outputs}), str(held.layout.root))
    if record.compute["device"] != device.split(":")[0]:
        console.warn(
            f"teacher '{record.name}' ran on {record.compute['device']} and runs on {device} now: rows may differ "
            "in their last bits"
        )
    return Worker.of(teacher, record.compute, device)


@contextmanager
def as_it_ran(records: Collection[TeacherRecord]) -> Iterator[None]:
    """Compute with the recorded number of threads, which changes last bits; the precision is each teacher's own."""
    import torch

    before = torch.get_num_threads()
    threads = {record.compute.get("threads", before) for record in records}
    if len(threads) > 1:
        console.warn("the teachers ran with different numbers of threads: rows may differ in their last bits")
    try:
        torch.set_num_threads(min(threads, default=before))
        yield
    finally:
        torch.set_num_threads(before)
