"""Whether teachers and student tell apart the same classes, and in which order the teachers number them."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int64

from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.multilabel import labels_of
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError
from kdcli.methods.base import Method, method_names
from kdcli.models.spec import Model
from kdcli.training.config import StudentConfig
from kdcli.training.teachers import Teachers


@final
@dataclass(frozen=True, slots=True)
class Classes:
    """What a classifier tells apart.

    Attributes:
        names: in their order, where known.
        count: how many.
        separator: between labels in a class name, where they are labels of which an image may have several.
    """

    names: tuple[str, ...] | None
    count: int
    separator: str | None = None

    @classmethod
    def of(cls, data: ImageData, separator: str | None = None) -> "Classes":
        """Of a data set; unnamed ones up to the largest label, 0 without any.

        Raises:
            BadDataError: there is a separator, but no class name.
        """
        if separator is not None:
            labels, _ = labels_of(data, separator)
            return cls(labels, len(labels), separator)
        names = data.class_names
        return cls(names, len(names) if names is not None else int(data.labels.max()) + 1)

    def table(self, data: ImageData) -> Bool[np.ndarray, "c l"] | None:
        """Which labels each class of a data set stands for; None where an image has one.

        Raises:
            BadDataError: a label that is none of these, or no class names.
        """
        return None if self.separator is None else labels_of(data, self.separator, self.names)[1]

    def of_teacher(self, teacher: TeacherRecord) -> Int64[np.ndarray, " c"] | None:
        """The class that each logit of a teacher stands for, -1 for another one.

        None where the teacher does not know these classes: then right and wrong mean nothing.
        """
        if self.names is None or teacher.class_names is None:
            return np.arange(self.count) if teacher.num_classes == self.count else None
        if (
            self.names == teacher.class_names
        ):  # two classes may share a name: only their order tells them apart
            return np.arange(self.count)
        if not set(self.names) <= set(teacher.class_names):
            return None
        number = {name: index for index, name in enumerate(self.names)}
        return np.asarray([number.get(name, -1) for name in teacher.class_names], np.int64)


def classes_of(config: StudentConfig, method: Method, teachers: Teachers | None, data: ImageData) -> Classes:
    """What the student's own classifier tells apart.

    Nothing where no class is learnt. The generalist's classes; else the data's, or unnamed ones of the first teacher
    where teachers must know the same.
    """
    if method.predicts(config.options):
        return Classes(None, 0)
    needs = method.needs_of(config.options)
    if teachers is not None and teachers.generalist is not None:
        record = teachers.generalist
        return Classes(record.class_names, record.num_classes)
    if teachers is not None and (needs.classes or needs.same) and data.class_names is None:
        first = next(iter(teachers.records.values()))
        return Classes(first.class_names, first.num_classes)
    return Classes.of(data, config.multi_label)


def columns_of(method: str, teachers: Teachers | None, classes: Classes) -> dict[str, tuple[int, ...]]:
    """Of each teacher whose order of the classes differs, its number of each of the student's.

    Args:
        method: name of that whose classifier learns from their logits.
        teachers: of the run.
        classes: of the student.

    Raises:
        BadDataError: a teacher tells apart other classes.
    """
    found: dict[str, tuple[int, ...]] = {}
    if teachers is None:
        return found
    names, count = classes.names, classes.count
    for record in teachers.records.values():
        theirs = record.class_names
        if record.num_classes != count or (theirs and names and set(theirs) != set(names)):
            raise BadDataError(
                f"teacher '{record.name}' tells apart {record.num_classes} classes and the data {count}"
                f"{_first_difference(theirs, names)}; {method} needs the same ones",
                f"Fine-tune the teacher's classifier on this data first ({_fine_tuning()}) and cache its export, or "
                "use a method whose heads are the teachers'; see kd methods.",
            )
        if theirs is None and names is not None:
            console.warn(
                f"teacher '{record.name}' has no class names; its {count} classes are taken to be the data's, in order"
            )
        elif theirs is not None and names is not None and theirs != names:
            place = {name: number for number, name in enumerate(theirs)}
            found[record.name] = tuple(place[name] for name in names)
    return found


def require_own_classes(method: str, model: Model, classes: Classes) -> None:
    """Refuse a student whose own classifier, which is to learn on, is for other classes than the data's.

    Raises:
        BadDataError: saying in what they differ.
    """
    own, names, count = model.class_names, classes.names, classes.count
    if model.num_classes == count and (own is None or names is None or own == names):
        return
    raise BadDataError(
        f"the student {model.spec} tells apart {model.num_classes} classes and the data {count}"
        f"{_first_difference(own, names)}; {method} goes on from its classifier",
        f"Train its classifier on this data first ({_fine_tuning()}), then start from that: "
        "--student local-dir:RUN/export",
    )


def _fine_tuning() -> str:
    """The command that trains a classifier on labels alone."""
    (labels_only,) = method_names("only_labels")[:1]
    return f"kd train-student DATA --student SPEC --method {labels_only} --freeze backbone"


def _first_difference(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> str:
    if theirs is None or ours is None:
        return ""
    pairs = enumerate(zip((*theirs, *[None] * len(ours)), (*ours, *[None] * len(theirs)), strict=True))
    different = ((place, one, other) for place, (one, other) in pairs if one != other)
    place, one, other = next(different, (-1, None, None))
    shown = ("no more" if each is None else f"'{each}'" for each in (one, other))
    return "" if place < 0 else f", first class {place}: {' and '.join(shown)}"
