"""The data of a run, opened and checked: one data set, or several as ``NAME=DATA``, each with its own classes."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from kdcli.cache.shelf import Stage
from kdcli.console import console
from kdcli.data.multilabel import labels_of
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, UsageError, nearest
from kdcli.methods.base import Method, method_names
from kdcli.models.student import LABEL_HEAD
from kdcli.training.config import StudentConfig

OpenData = Callable[..., ImageData]
"""Opens a data set, as :func:`~kdcli.data.sources.open_data` does."""
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
_EXAMPLE = "For example: kd train-student greek=glyphs/greek lao=glyphs/lao ..."


@final
@dataclass(frozen=True, slots=True)
class NamedSet:
    """One of several data sets.

    Attributes:
        name: as the user calls it; of its head as well.
        data: the images to train on.
        test: labelled images to test its head on, if any.
    """

    name: str
    data: ImageData
    test: ImageData | None = None

    @property
    def classes(self) -> int:
        """Width of its head."""
        names = self.data.class_names
        return len(names) if names is not None else int(self.data.labels.max()) + 1


def require_sets(config: StudentConfig, method: Method) -> None:
    """Refuse one data set where a method learns from several, and several where it learns from one.

    Raises:
        UsageError: that, or names that are missing, given twice, unknown or taken.
    """
    several, needs = not isinstance(config.data, str), method.needs_of(config.options)
    if several and not needs.sets:
        raise UsageError(
            f"{method.name} learns from one data set, and {len(config.data)} are given",
            f"Use --method {' or '.join(method_names('sets'))}, or one DATA.",
        )
    if several and config.validation:
        raise UsageError(
            f"--validation is for one data set, and {len(config.data)} are given", "Leave --validation out."
        )
    if not several and needs.sets:
        raise UsageError(f"{method.name} learns from several data sets, each as NAME=DATA", _EXAMPLE)
    names = list(train_specs(config)) if several else []
    if several and len(names) < 2:
        raise UsageError(f"{method.name} learns from several data sets, and one is given", _EXAMPLE)
    taken = {LABEL_HEAD, method.generalist(config.options)} & set(names)
    if taken:
        raise UsageError(
            f"no data set may be called '{taken.pop()}': another head has that name", "Call it differently."
        )
    for name in test_specs(config) if several else {}:
        if name not in names:
            raise UsageError(
                f"--test {name}=..., but no data set is called '{name}'.{nearest(name, names)}",
                f"The data sets are {', '.join(names)}.",
            )
    if not several and not isinstance(config.test, str | None) and len(config.test) > 1:
        raise UsageError("one DATA is tested on one --test", "Give --test once.")


def train_specs(config: StudentConfig) -> dict[str, str]:
    """Name and spec of each of several data sets, in their order."""
    return {} if isinstance(config.data, str) else _named(config.data, "DATA")


def test_specs(config: StudentConfig) -> dict[str, str]:
    """Name and spec of what each of several data sets is tested on."""
    tests = (config.test,) if isinstance(config.test, str) else config.test or ()
    return _named(tests, "--test")


def _named(values: Sequence[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        match = _NAMED.fullmatch(value)
        if match is None:
            raise UsageError(f"{what} '{value}' has no name, and there are several data sets", _EXAMPLE)
        if match[1] in found:
            raise UsageError(f"{what} '{match[1]}' is given twice", "Give every data set its own name.")
        found[match[1]] = match[2]
    return found


def labelled_only(data: ImageData) -> ImageData:
    """The labelled images; all of them where none is."""
    labelled = np.flatnonzero(data.labels >= 0)
    return data if len(labelled) in (0, len(data)) else data.select(labelled)


def open_labelled(
    config: StudentConfig, spec: str, what: str, hint: str, opened: OpenData = open_data
) -> ImageData:
    """Open a data set and keep its labelled images.

    Args:
        config: where data sets are.
        spec: of this one.
        what: what a message calls it.
        hint: what to do where it has no labels.
        opened: opens it.

    Raises:
        BadDataError: it has no labels.
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    data = labelled_only(open_with(config, spec, opened))
    if not (data.labels >= 0).all():
        raise BadDataError(f"{what} {spec} has no labels", hint)
    return data


def open_with(config: StudentConfig, spec: str, opened: OpenData) -> ImageData:
    """A data set, opened as the options of a run say.

    Raises:
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    stage = Stage.told(config.stage, config.stage_limit)
    return opened(spec, data_root=config.data_root, download=config.download, exif=config.exif, stage=stage)


def open_sets(
    config: StudentConfig, first: ImageData, joint: bool, opened: OpenData = open_data
) -> tuple[NamedSet, ...]:
    """The named data sets; none where there is one without a name.

    Args:
        config: names them.
        first: the first one, as it was opened before.
        joint: renumber all labels within the union of their class names, in the order in which they come.
        opened: opens each.

    Raises:
        BadDataError: one of them has no labels, or no class names to join.
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    specs, tests = train_specs(config), test_specs(config) if train_specs(config) else {}
    sets = []
    for number, (name, spec) in enumerate(specs.items()):
        data = first
        if number:
            data = open_labelled(
                config, spec, f"{name}:", "Learn from data with labels, or leave it out.", opened
            )
        test = None
        if name in tests:
            hint = "Test on data with labels, or leave --test out."
            test = open_labelled(config, tests[name], "--test", hint, opened)
        sets.append(NamedSet(name, data, test))
    return _joined(sets) if joint else tuple(sets)


def _joined(sets: Sequence[NamedSet]) -> tuple[NamedSet, ...]:
    for each in sets:
        if each.data.class_names is None:
            raise BadDataError(
                f"the classes of {each.name} have no names, which one label space is made of",
                "Use --label-space separate.",
            )
    union = tuple(dict.fromkeys(name for each in sets for name in each.data.class_names or ()))
    number = {name: index for index, name in enumerate(union)}
    joined = []
    for each in sets:
        data = each.data
        table = np.array([*(number[name] for name in data.class_names or ()), -1], np.int64)
        labels = table[data.labels]  # -1 stays -1: the table's last entry
        joined.append(replace(each, data=ImageData(data.spec, data.source, data.keys, labels, union)))
    return tuple(joined)


def require_unlabelled(data: ImageData, name: str) -> None:
    """Refuse batches of unlabelled images where there are none.

    Raises:
        BadDataError: all images are labelled.
    """
    if not (data.labels < 0).any():
        raise BadDataError(
            f"{name} is fully labelled, so there are no unlabelled images for a batch of their own",
            "Add --unlabelled-includes-labelled, or keep the labels of a part: DATA@labelled=0.2",
        )


def require_classes(data: ImageData, name: str, spare: str | None = None) -> None:
    """Refuse data without at least two classes to tell apart.

    Args:
        data: to learn from.
        name: of it.
        spare: the option with which the method would need no labels, if there is one.

    Raises:
        BadDataError: naming the data set.
    """
    labelled = data.labels[data.labels >= 0]
    present = np.unique(labelled)
    if not len(present):
        raise BadDataError(
            f"{name} has no labels, and this method learns from labels",
            "Put the images into one folder a class (CLASS/NAME.jpg), "
            + (f"learn without labels ({spare}), " if spare else "")
            + "or use a method that needs no labels, such as --method kl (of logits) or feature (of features); see kd "
            "methods.",
        )
    if len(present) == 1:
        only = data.class_names[present[0]] if data.class_names is not None else str(present[0])
        raise BadDataError(
            f"{name} has labelled images of one class only ('{only}')",
            "Give at least two classes to tell apart.",
        )


def require_labels(data: ImageData, separator: str | None) -> None:
    """Refuse data without labels where an image may have several, and say where none has.

    Raises:
        BadDataError: the data has no class names, or none with a label in it.
    """
    if separator is None:
        return
    names, table = labels_of(data, separator)
    if not names:
        raise BadDataError("no image has a label", "Check --multi-label: it separates labels in class names.")
    if table.sum(axis=1).max() < 2:
        console.warn(
            f"no class name holds '{separator}' between labels: each image has one label, and is learnt from by a "
            "binary loss all the same (--multi-label)"
        )


def open_test(config: StudentConfig, labelled: bool = True, opened: OpenData = open_data) -> ImageData | None:
    """What one data set is tested on, if anything.

    Args:
        config: names it.
        labelled: whether only its labelled images will do.
        opened: opens it.

    Raises:
        BadDataError: it has no labels.
    """
    if config.test is None:
        return None
    spec = config.test if isinstance(config.test, str) else config.test[0]
    if not labelled:
        return open_with(config, spec, opened)
    return open_labelled(config, spec, "--test", "Test on data with labels, or leave --test out.", opened)


def data_identity(data: ImageData) -> dict[str, Any]:
    """What makes a data set this one: where it is, its keys in their order, its labels."""
    return {
        "location": data.location,
        "images": len(data),
        "keys": data.keys.digest(),
        "labels": _digest(data.labels),
        "classes": None if data.class_names is None else len(data.class_names),
    }


def _digest(values: Int64[np.ndarray, " n"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<i8").tobytes()).hexdigest()
