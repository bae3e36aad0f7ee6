"""Whether teachers and student tell apart the same classes, and in which order the teachers number them."""

from dataclasses import dataclass
from typing import final

from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError, UsageError
from kdcli.methods.base import Method, Settings
from kdcli.models.spec import Model
from kdcli.training.config import StudentConfig
from kdcli.training.teachers import Teachers


@final
@dataclass(frozen=True, slots=True)
class Classes:
    """What teachers and student tell apart.

    Attributes:
        names: in the student's order, where known.
        count: how many.
    """

    names: tuple[str, ...] | None
    count: int


def shared_classes(method: Method, teachers: Teachers | None, data: ImageData) -> Classes | None:
    """The classes that the student has in common with its teachers: the data's, of unnamed ones the first teacher's.

    None where the method does not ask for it.
    """
    if teachers is None or not method.needs.classes:
        return None
    if (names := data.class_names) is not None:
        return Classes(names, len(names))
    first = next(iter(teachers.records.values()))
    return Classes(first.class_names, first.num_classes)


def columns_of(method: Method, teachers: Teachers | None, data: ImageData) -> dict[str, tuple[int, ...]]:
    """Of each teacher whose order of the classes differs, its number of each of the student's.

    Args:
        method: whose classifier learns from their logits.
        teachers: of the run.
        data: whose classes the student tells apart.

    Raises:
        BadDataError: a teacher tells apart other classes.
    """
    space = shared_classes(method, teachers, data)
    found: dict[str, tuple[int, ...]] = {}
    if space is None or teachers is None:
        return found
    names, count = space.names, space.count
    for record in teachers.records.values():
        theirs = record.class_names
        if record.num_classes != count or (theirs and names and set(theirs) != set(names)):
            raise BadDataError(
                f"teacher '{record.name}' tells apart {record.num_classes} classes and the data {count}"
                f"{_first_difference(theirs, names)}; {method.name} needs the same ones",
                "Fine-tune the teacher's classifier on this data first (kd train-student DATA --student SPEC "
                "--method labels-only --freeze backbone) and cache its export, or use --method distill-equal, "
                "whose heads are the teachers'.",
            )
        if theirs is None and names is not None:
            console.warn(
                f"teacher '{record.name}' has no class names; its {count} classes are taken to be the data's, in order"
            )
        elif theirs is not None and names is not None and theirs != names:
            place = {name: number for number, name in enumerate(theirs)}
            found[record.name] = tuple(place[name] for name in names)
    return found


def require_method(
    method: Method,
    settings: Settings,
    classes: Classes | None,
    mixes: bool,
) -> None:
    """Refuse what one of P3's methods cannot do with these classes and views.

    Raises:
        UsageError: saying why.
    """
    count = 0 if classes is None else classes.count
    if "top_classes" in method.options and settings.top_classes > count:
        raise UsageError(
            f"--top-classes {settings.top_classes}, but there are {count} classes",
            f"Use --top-classes {max(1, count // 2)}, or --method kl, which compares all of them.",
        )
    if "logp_label" in method.needs.kinds and mixes:
        raise UsageError(
            f"{method.name} compares what teachers and student give an image's label, and mixed images have two",
            "Use --method dp-unsup, or views of a recipe without MixUp and CutMix.",
        )


def require_own_classes(
    config: StudentConfig, model: Model, names: tuple[str, ...] | None, count: int
) -> None:
    """Refuse a student whose own classifier, which is to learn on, is for other classes than the data's.

    Raises:
        BadDataError: saying in what they differ.
    """
    own = model.class_names
    if model.num_classes == count and (own is None or names is None or own == names):
        return
    raise BadDataError(
        f"the student {model.spec} tells apart {model.num_classes} classes and the data {count}"
        f"{_first_difference(own, names)}; {config.method} goes on from its classifier",
        "Train its classifier on this data first (kd train-student DATA --student SPEC --method labels-only "
        "--freeze backbone), then start from that: --student local-dir:RUN/export",
    )


def _first_difference(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> str:
    if theirs is None or ours is None:
        return ""
    pairs = enumerate(zip((*theirs, *[None] * len(ours)), (*ours, *[None] * len(theirs)), strict=True))
    different = ((place, one, other) for place, (one, other) in pairs if one != other)
    place, one, other = next(different, (-1, None, None))
    shown = ("no more" if each is None else f"'{each}'" for each in (one, other))
    return "" if place < 0 else f", first class {place}: {' and '.join(shown)}"
