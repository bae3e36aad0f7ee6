"""``--train-from TAP``: the layers up to TAP stay as they start; the cache holds what they give, or they run.

They run on views that no cache holds: without a cache, and with ``--teacher-view eval``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import CacheMissingError, UsageError
from kdcli.methods.batch import TeacherOutputs
from kdcli.models.spec import ModelSpec
from kdcli.options.resolving import spelled
from kdcli.training.config import StudentConfig
from kdcli.training.start import UNTRAINED, Start


@final
@dataclass(frozen=True, slots=True)
class Lower:
    """The lower part of a student, as a cached teacher gave it.

    Attributes:
        teacher: the student's start, cached.
        tap: name of the last layer of the lower part.
    """

    teacher: TeacherRecord
    tap: str

    @property
    def array(self) -> str:
        """Name of its maps in the cache."""
        return f"maps/{self.tap}"

    def maps(self, outputs: TeacherOutputs) -> Float[Tensor, "b c h w"]:
        """The cached feature maps of a batch, in fp32 whatever they are stored in."""
        return outputs[self.teacher.name][self.array].float()

    def with_maps(self, reads: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """What is read of each teacher, the maps included."""
        own = reads.get(self.teacher.name, ())
        return {**reads, self.teacher.name: (*own, self.array)}


def choose_lower(config: StudentConfig, start: Start, cache: CacheSet | None) -> Lower | None:
    """The cached teacher whose maps the student is trained from; None where images are looked at.

    Args:
        config: the run.
        start: what the student starts from.
        cache: where the maps are.

    Raises:
        UsageError: another option contradicts it.
        CacheMissingError: the start, or its maps, are not cached; the hint is the command that adds them.
    """
    tap = config.train_from
    if tap is None:
        return None
    _require_options(config, start)
    if cache is None or config.teacher_view == "eval":
        return None
    spec = str(ModelSpec.parse(config.student)) if start.init == "pretrained" else start.init
    known = [record for record in cache.teachers.values() if record.spec == spec]
    if not known:
        raise CacheMissingError(
            f"--train-from {tap}: {spec}, which the student starts from, is not in the cache",
            spelled("cache-teachers", cache=config.cache[0], teacher=f"start={spec}", keep=f"maps:{tap}"),
        )
    array = f"maps/{tap}"
    teacher = next((record for record in known if record.output_of(array) is not None), known[0])
    cache.require_kept({teacher.name: [array]})
    size = tuple(teacher.declared_preprocess["size"])
    side, told = config.image_size, ModelSpec.parse(config.student).size
    flag, asked = ("--student", told) if side is None else ("--image-size", (*size[:-2], side, side))
    if asked not in (None, size):
        raise UsageError(
            f"{flag} {config.student if side is None else side}, but the maps of '{teacher.name}' are of "
            f"{' x '.join(map(str, size))} pixels",
            "Leave the size out with --train-from.",
        )
    return Lower(teacher, tap)


def _require_options(config: StudentConfig, start: Start) -> None:
    tap = config.train_from
    if config.freeze is not None:
        raise UsageError(
            f"--freeze {config.freeze} leaves --train-from {tap} nothing to train but the heads",
            "Leave one of them out.",
        )
    if start.init in UNTRAINED:
        raise UsageError(
            f"--train-from {tap} keeps the layers up to it as they start, and --init {start.init} gives untrained ones",
            "Start from trained weights: --init pretrained, or --init SPEC.",
        )
