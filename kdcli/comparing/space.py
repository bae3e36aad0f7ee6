"""One numbering of the classes for all models and the images, made by class names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Int64

from kdcli.console import console
from kdcli.errors import BadDataError

_HINT = (
    "P3 compares models of the same classes: give models of one data set, or fine-tune their classifiers first "
    "(kd train-student --freeze backbone)."
)


@final
@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model's logits.

    Attributes:
        names: of its classes, in order of the logits; None where it does not know them.
        count: width of its logits.
    """

    names: tuple[str, ...] | None
    count: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The classes that all models know.

    Attributes:
        names: of the classes; those that the images are of come first, in the order of the data set.
        labels: number in ``names`` of each class of the data set.
        columns: of each model, number in ``names`` of each of its logits.
    """

    names: tuple[str, ...]
    labels: Int64[np.ndarray, " k"]
    columns: dict[str, Int64[np.ndarray, " c"]]


def one_space(data: tuple[str, ...] | None, models: Mapping[str, Classes]) -> Space:
    """The label space of models and images.

    Models that do not know their classes' names are taken to have those of the data set, in its order,
    where they have as many, with a warning.

    Args:
        data: class names of the images.
        models: the classes of each model.

    Raises:
        BadDataError: models of different classes, images of classes that they do not know, or names missing.
    """
    for name, classes in models.items():
        if not classes.count:
            raise BadDataError(f"'{name}' has no classifier, so it predicts no class", "Leave it out.")
    known = {name: classes.names for name, classes in models.items() if classes.names is not None}
    if data is None:
        raise BadDataError("the images have no class names", "Name labelled data with --test.")
    reference = next(iter(known), None)
    names = data if reference is None else _in_order(data, known[reference], reference)
    columns = {}
    for name, classes in models.items():
        own = classes.names if classes.names is not None else _assumed(name, classes.count, data, names)
        _require_equal(name, own, reference or "the data", names)
        columns[name] = np.asarray(_numbers(own, names), np.int64)
    return Space(names, np.arange(len(data)), columns)


def _in_order(data: tuple[str, ...], names: tuple[str, ...], model: str) -> tuple[str, ...]:
    """The names of a model's classes, the data set's first."""
    if data == names:
        return names
    lost = [name for name in data if name not in set(names)]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise BadDataError(f"'{model}' does not know the class '{lost[0]}'{more} of the images", _HINT)
    for where, each in (("the images", data), (f"'{model}'", names)):
        if len(set(each)) < len(each):
            twice = next(name for name in each if each.count(name) > 1)
            raise BadDataError(
                f"two classes of {where} are both called '{twice}', so names do not tell them apart",
                "Give the classes names of their own.",
            )
    return (*data, *(name for name in names if name not in set(data)))


def _assumed(name: str, count: int, data: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    if count != len(data) or len(names) != len(data):
        raise BadDataError(
            f"'{name}' has {count} classes without names, and the images have {len(data)}",
            "Give a model with class names (label_names in its config.json), as kd train-student exports it.",
        )
    console.warn(
        f"'{name}' has no class names; taking its {count} classes to be the data set's, in their order"
    )
    return data


def _require_equal(name: str, own: tuple[str, ...], other: str, names: tuple[str, ...]) -> None:
    if sorted(own) == sorted(names):
        return
    extra, lost = sorted(set(own) - set(names)), sorted(set(names) - set(own))
    told = [f"only '{name}' knows '{extra[0]}'"] if extra else []
    told += [f"'{name}' lacks '{lost[0]}'"] if lost else []
    raise BadDataError(
        f"'{name}' ({len(own)} classes) and '{other}' ({len(names)} classes) have different label spaces: "
        f"{', '.join(told)} ({len(extra) + len(lost)} classes differ)",
        _HINT,
    )


def _numbers(own: Sequence[str], names: tuple[str, ...]) -> list[int]:
    if tuple(own) == names:  # two classes may share a name: then only their order tells them apart
        return list(range(len(names)))
    number = {name: index for index, name in enumerate(names)}
    return [number[name] for name in own]
