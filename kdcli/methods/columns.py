"""Which logit of a teacher is of which of the student's classes."""

from collections.abc import Sequence

from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import IdentityError
from kdcli.types import Difference


def choose_columns(
    record: TeacherRecord, data: ImageData, method: str, labels: bool = True
) -> tuple[int, ...] | None:
    """The teacher's logit of each of the student's classes; None where they are in the same order.

    Args:
        record: of the teacher.
        data: the images, with the classes that the student learns.
        method: what messages call the method.
        labels: whether labels are learnt from, too; else images that name no classes take the teacher's.

    Raises:
        IdentityError: the teacher knows other classes than the student learns.
    """
    names = data.class_names
    if names is None and not labels:
        return None
    count = len(names) if names is not None else int(data.labels.max()) + 1
    known = record.class_names
    hint = (
        f"{method} compares one classifier with one: distil from a teacher of these classes (kd fuse-teachers makes "
        "one a data set), or use a method that gives a teacher of other classes a head of its own; see kd methods."
    )
    if known is None or names is None:
        if record.num_classes != count:
            raise IdentityError(
                f"'{record.name}' knows other classes than the student learns",
                hint,
                [Difference("number of classes", record.num_classes, count)],
            )
        console.note(f"'{record.name}' or the data name no classes; they are taken to be in the same order")
        return None
    if set(known) != set(names):
        only = [name for name in known if name not in set(names)]
        lacking = [name for name in names if name not in set(known)]
        raise IdentityError(
            f"'{record.name}' knows other classes than the student learns",
            hint,
            [Difference("classes", f"{len(known)}{_such_as(only)}", f"{len(names)}{_such_as(lacking)}")],
        )
    place = {name: number for number, name in enumerate(known)}
    columns = tuple(place[name] for name in names)
    return None if columns == tuple(range(len(columns))) else columns


def _such_as(names: Sequence[str]) -> str:
    return f" (among them '{names[0]}')" if names else ""
