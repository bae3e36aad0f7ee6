"""What representations are probed on: images, labels and draws, the same for every representation."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64, Shaped

from kdcli.console import console
from kdcli.data.multilabel import labels_of
from kdcli.data.sources import ImageData, open_told
from kdcli.errors import BadDataError, UsageError, nearest
from kdcli.metrics.checks import check_classes
from kdcli.probing.config import ProbeConfig
from kdcli.probing.multilabel import check_labels, random_draws
from kdcli.probing.protocols import shot_draws

ALL = "all"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
_EXAMPLE = (
    "For example: kd eval-probe cars=cars/@split=train food=food/@split=train "
    "--test cars=cars/@split=test --test food=food/@split=test ..."
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Labelled images to probe on.

    Attributes:
        name: as the user calls it; its DATA where there is one without a name.
        train: images to train on; None for a kept head.
        train_labels: class index of each, or a row of its labels.
        test: images to test on.
        test_labels: in the numbering of ``train_labels``; of a kept head in that of ``test``.
        class_names: by index; None where the data has no names.
        relatedness: ``related``, ``unrelated`` or ``unmarked``.
        draws: rows of ``train``, one draw after the other; none before :func:`drawn`, or for a kept head.
    """

    name: str
    train: ImageData | None
    train_labels: Shaped[np.ndarray, "n ..."] | None
    test: ImageData
    test_labels: Shaped[np.ndarray, "m ..."]
    class_names: tuple[str, ...] | None
    relatedness: str
    draws: Int64[np.ndarray, "draws k"] | None = None

    @property
    def classes(self) -> int:
        """Classes, or labels, to tell apart."""
        labels = self.test_labels if self.train_labels is None else self.train_labels
        return int(labels.shape[1]) if labels.ndim == 2 else len(np.unique(labels))

    def identity(self) -> dict[str, Any]:
        """Which images and labels these are, wherever they lie."""
        train = None if self.train is None else _digests(self.train, self.train_labels)
        return {"train": train, "test": _digests(self.test, self.test_labels)}


def _digests(data: ImageData, labels: Shaped[np.ndarray, "n ..."] | None) -> dict[str, Any]:
    found = hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes()).hexdigest()
    return {"images": len(data), "keys": data.keys.digest(), "labels": found}


def open_targets(config: ProbeConfig) -> list[Target]:
    """Open all targets; nothing is drawn yet.

    Raises:
        UsageError: names that are missing, given twice or unknown.
        BadDataError: no labels, or test classes without a training image.
        KdError: see :func:`~kdcli.data.sources.open_data`.
    """
    words = read_pairs(config)
    for name in (*config.related, *config.unrelated):
        if name not in words:
            option = "--related" if name in config.related else "--unrelated"
            raise UsageError(
                f"{option} {name}: no target is called that.{nearest(name, words)}",
                f"The targets are {', '.join(words)}.",
            )
    if both := set(config.related) & set(config.unrelated):
        raise UsageError(f"'{both.pop()}' is marked as related and as unrelated", "Mark it once.")
    return [_open(name, train, test, config) for name, (train, test) in words.items()]


def read_pairs(config: ProbeConfig) -> dict[str, tuple[str | None, str]]:
    """DATA and ``--test`` of each target by its name; no DATA for a kept head.

    Raises:
        UsageError: names that are missing, given twice or unknown.
    """
    data = (config.data,) if isinstance(config.data, str) else config.data
    tests = (config.test,) if isinstance(config.test, str) else config.test
    if config.head is not None:
        if data:
            raise UsageError(
                f"--head {config.head} trains nothing, and training data is given: {data[0]}",
                "Leave DATA out; --test is what the head is tested on.",
            )
        named = {tests[0]: tests[0]} if len(tests) == 1 else _named(tests, "--test")
        return {name: (None, test) for name, test in named.items()}
    if not data or not tests:
        raise UsageError(f"{'--test' if data else 'DATA'} is missing", _EXAMPLE)
    if len(data) == len(tests) == 1 and not any(_is_named(text) for text in (data[0], tests[0])):
        return {data[0]: (data[0], tests[0])}
    trained, tested = _named(data, "DATA"), _named(tests, "--test")
    for name in (*trained, *tested):
        if name not in tested or name not in trained:
            given, lacking, there = (
                ("DATA", "--test", tested) if name in trained else ("--test", "DATA", trained)
            )
            raise UsageError(
                f"{given} {name}=... has no {lacking} {name}=....{nearest(name, there)}",
                f"Give both of every target. {_EXAMPLE}",
            )
    return {name: (trained[name], tested[name]) for name in trained}


def _is_named(text: str) -> bool:
    """Whether it is ``NAME=DATA``; a folder that is called so, such as ``split=train/``, is one."""
    return _NAMED.fullmatch(text) is not None and not Path(text.partition("@")[0]).exists()


def _named(values: Sequence[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        match = _NAMED.fullmatch(value)
        if match is None:
            raise UsageError(
                f"{what} '{value}' has no name",
                f"Both DATA and --test of several targets have one. {_EXAMPLE}",
            )
        if match[1] in found:
            raise UsageError(f"{what} '{match[1]}' is given twice", "Give every target its own name.")
        found[match[1]] = match[2]
    return found


def _open(name: str, train_text: str | None, test_text: str, config: ProbeConfig) -> Target:
    kind = "related" if name in config.related else "unrelated" if name in config.unrelated else "unmarked"
    test = open_told(test_text, config)
    if train_text is None:
        test = _labelled(test, test_text)
        return Target(name, None, None, test, test.labels, test.class_names, kind)
    train = open_told(train_text, config)
    if train.location == test.location:
        console.warn("DATA and --test are the same set: the probe is tested on its own training images too")
    train, test = _labelled(train, train_text), _labelled(test, test_text)
    if config.multi_label is not None:
        return _several_labels(name, train, test, config.multi_label, kind)
    return Target(name, train, train.labels, test, _labels_in(train, test), train.class_names, kind)


def _several_labels(name: str, train: ImageData, test: ImageData, separator: str, kind: str) -> Target:
    names, table = labels_of(train, separator)
    _, other = labels_of(test, separator, names)
    return Target(name, train, table[train.labels], test, other[test.labels], names, kind)


def _labelled(data: ImageData, text: str) -> ImageData:
    """The images of ``data`` that have a label."""
    rows = np.flatnonzero(data.labels >= 0)
    if not len(rows):
        raise BadDataError(
            f"{text} has no labels, and a probe needs them",
            "Leave labels=none out, or give the images class folders or a labels.csv.",
        )
    return data if len(rows) == len(data) else data.select(rows)


def _labels_in(train: ImageData, test: ImageData) -> Int64[np.ndarray, " m"]:
    """Labels of ``test`` as class indices of ``train``: by name where both have names.

    Raises:
        BadDataError: a class of ``test`` of which ``train`` has no image.
    """
    ours, theirs = train.class_names, test.class_names
    labels = test.labels
    if ours is not None and theirs is not None and ours != theirs:
        index = {name: number for number, name in enumerate(ours)}
        labels = np.array([index.get(name, -1) for name in theirs], np.int64)[test.labels]
    unknown = np.unique(test.labels[~np.isin(labels, train.labels)])
    if len(unknown):
        name = theirs[unknown[0]] if theirs else unknown[0]
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise BadDataError(
            f"class '{name}'{more} of --test has no training image in DATA",
            "DATA and --test must have the same classes, by name: choose them with @classes=...",
        )
    return labels


def narrowed(target: Target, train: Int64[np.ndarray, " i"] | None, test: Int64[np.ndarray, " j"]) -> Target:
    """A target of some of its images; before anything is drawn."""
    if target.train is not None and train is not None and target.train_labels is not None:
        target = replace(target, train=target.train.select(train), train_labels=target.train_labels[train])
    return replace(target, test=target.test.select(test), test_labels=target.test_labels[test])


def drawn(target: Target, config: ProbeConfig) -> Target:
    """Draw the training images; afterwards ``train`` holds only those that some draw uses.

    Raises:
        BadDataError: one class only, a class with a single image, or nothing to learn from several labels.
        UsageError: more folds than images of the largest class.
    """
    labels, train = target.train_labels, target.train
    if labels is None or train is None:
        return target
    everything = config.shots == ALL
    draws = 1 if everything else config.draws
    shots = len(labels) if isinstance(config.shots, str) else config.shots
    if labels.ndim == 2:
        check_labels(labels, target.test_labels, target.class_names or ())
        found = random_draws(labels, shots, draws, config.seed)
        largest = found.shape[1]
    elif everything:
        check_classes(labels, target.class_names)
        found = np.arange(len(labels))[None]
        largest = int(np.bincount(labels).max())
    else:
        found = shot_draws(labels, shots, draws, config.seed, target.class_names)
        largest = int(np.bincount(labels[found[0]]).max())
    if config.folds is not None and config.folds > largest and config.protocol in ("svm", "logistic"):
        raise UsageError(
            f"--folds {config.folds}, but no class of '{target.name}' has more than {largest} images in a draw",
            f"Use --folds {max(2, largest)} or fewer, or more --shots.",
        )
    used, positions = np.unique(found, return_inverse=True)
    return replace(
        target,
        train=train.select(used),
        train_labels=labels[used],
        draws=positions.reshape(found.shape),
    )
