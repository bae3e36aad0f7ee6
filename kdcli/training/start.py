"""What a student starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import IdentityError, NotFoundError, UsageError, nearest
from kdcli.models.grammar import recorded_model
from kdcli.models.spec import ModelSpec, architecture_name, default_init, open_model, weights_sha256
from kdcli.types import Difference

FRESH = ("pretrained", "random", "xavier")
"""Values of ``--init`` that name no model: the student's own weights, or none."""
UNTRAINED = ("random", "xavier")
NEAREST_SOURCE = "nearest-source"


@final
@dataclass(frozen=True, slots=True)
class Start:
    """What a student starts from.

    Attributes:
        init: ``pretrained``, ``random``, ``xavier``, or the spec of a model.
        record: the cached teacher that this model is, if the student starts from it as a teacher: its weights
            must still be those that were cached.
    """

    init: str
    record: TeacherRecord | None = None


def resolve_start(
    init: str | None,
    student: ModelSpec,
    generalist: TeacherRecord | None,
    sources: Callable[[], Sequence[TeacherRecord]] | None = None,
) -> Start:
    """What the student starts from.

    A student of the generalist's architecture starts from the generalist (P1 section 2); any other
    from ``--init``, by default pretrained where the student's spec names weights and random for bare names.

    Args:
        init: what ``--init`` says.
        student: the student's spec.
        generalist: the generalist, if the method has one.
        sources: gives the ranking's sources, best first, or refuses; asked for ``nearest-source`` only.

    Raises:
        UsageError: ``--init`` contradicts that, or names a model of another architecture, or no source of the
            ranking has the student's.
        NotFoundError: it names no model.
    """
    own = architecture_name(student)
    if generalist is not None and own == generalist.architecture:
        start = str(ModelSpec.parse(recorded_model(generalist.spec)))
        if init not in (None, start) and not (init == "pretrained" and str(student) == start):
            raise UsageError(
                f"--init {init}, but a {own} starts from its generalist '{generalist.name}' ({start})",
                "Leave --init out, or choose a student of another architecture.",
            )
        return Start(start, generalist)
    if init is None:
        return Start(default_init(student))
    if init in FRESH:
        return Start(init)
    if init == NEAREST_SOURCE:
        return _nearest_source(own, sources() if sources is not None else ())
    return Start(str(_named(init, own)))


def as_told(init: str, student: ModelSpec) -> str:
    """What a student starts from, told the size and the arguments that the student's own string tells."""
    start = ModelSpec.parse(init)
    arguments = {**dict(start.arguments), **dict(student.arguments)}
    return str(replace(start, size=student.size or start.size, arguments=tuple(sorted(arguments.items()))))


def _nearest_source(own: str, sources: Sequence[TeacherRecord]) -> Start:
    """The best source of the student's architecture (P2 Table 1: "fine-tune selected source")."""
    for record in sources:
        if record.architecture == own:
            return Start(str(ModelSpec.parse(recorded_model(record.spec))), record)
    known = ", ".join(f"{record.architecture} ({record.name})" for record in sources)
    raise UsageError(
        f"--init {NEAREST_SOURCE}: no source of the ranking is a {own}",
        f"Choose a student of one of their architectures: {known or 'there are none'}.",
    )


def _named(init: str, own: str) -> ModelSpec:
    try:
        start = ModelSpec.parse(init)
    except NotFoundError as error:
        from timm import list_models

        near = nearest(init, (*FRESH, NEAREST_SOURCE, *list_models()))
        if near and near not in error.message:
            raise UsageError(
                f"--init {init}: must be {', '.join(FRESH)}, {NEAREST_SOURCE} or a model.{near}", error.hint
            ) from error
        raise
    if (other := architecture_name(start)) != own:
        raise UsageError(
            f"--init {init} is a {other}, the student a {own}",
            "Start from a model of the student's architecture.",
        )
    return start


def require_as_cached(record: TeacherRecord) -> None:
    """Refuse a teacher whose weights are not those that were cached any more.

    Raises:
        IdentityError: that.
    """
    # At its own size and with its own classes, as it was cached: the student may have others.
    if (now := weights_sha256(open_model(recorded_model(record.spec)).network)) != record.weights:
        raise IdentityError(
            f"{record.spec} is not the teacher '{record.name}' that was cached any more",
            f"Restore its weights, or cache it anew under another name: --teacher OTHER={record.spec}",
            [Difference("weights", record.weights, now)],
        )
