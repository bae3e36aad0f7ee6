"""Labelled images set aside of the training data: judged after every epoch, never trained on.

Tests never select, but where ``--select best-on-test`` says so, as P4 did: then the result is marked.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.data.subset import draw, fractions_of
from kdcli.errors import BadDataError, UsageError
from kdcli.methods.base import Method
from kdcli.models.student import Student
from kdcli.training.config import StudentConfig
from kdcli.training.scores import main_score

VAL = "val"
"""What the names of scores on the validation split begin with in metrics.jsonl: ``val_top1``."""
ON_TEST = "best-on-test"
"""P4's selection, by the test data."""


def split_off(config: StudentConfig, method: Method, data: ImageData) -> tuple[ImageData, ImageData | None]:
    """Set aside ``--validation`` of the labelled images, as large a share of every class; at least one of each
    class stays for training, and unlabelled images all stay. With ``--multi-label``, and where teachers judge them and
    not labels, they are drawn at random.

    Args:
        config: the share, and the data seed that draws it.
        method: that is to be trained.
        data: what there is to train on.

    Returns:
        What is left to train on, and what was set aside; None without ``--validation``.

    Raises:
        UsageError: a method without labels, or ``--select`` without a split, or test data, to select by.
        BadDataError: there are too few labelled images.
    """
    if config.select == ON_TEST:
        _require_test(config, method)
    if config.validation is None:
        if config.select == "best":
            raise UsageError(
                "--select best needs a validation split; a test set never selects",
                "Add --validation 0.2, or leave --select out.",
            )
        return data, None
    by_teachers = method.predicts(config.options)
    if not method.needs_of(config.options).labels and not by_teachers:
        raise UsageError(
            f"--validation judges the classifier on labels, and {method.name} learns from none",
            "Leave --validation out; judge the finished student by kd eval-probe.",
        )
    # Images of several labels cannot be drawn label by label: as many of all that have any.
    groups = data.labels if config.multi_label is None else np.minimum(data.labels, 0)
    groups = np.zeros_like(groups) if by_teachers else groups
    aside = draw(groups, _quotas(groups, config.validation), "validation", config.data_seed)
    if not aside.any():
        raise BadDataError(
            f"--validation {config.validation:g} of {config.data} is no image: no class has two labelled ones",
            "Give more labelled images, or leave --validation out.",
        )
    return data.select(np.flatnonzero(~aside)), data.select(np.flatnonzero(aside))


def _require_test(config: StudentConfig, method: Method) -> None:
    if config.test is None or not method.needs_of(config.options).labels or not isinstance(config.data, str):
        reason = (
            "no --test is given" if config.test is None else f"{method.name} has no one test to select by"
        )
        raise UsageError(
            f"--select {ON_TEST}, but {reason}",
            "Give --test (of one data set, with a method that learns from labels), or select otherwise.",
        )
    console.warn(
        "--select best-on-test chooses the epoch on the test data, as P4 did: the accuracy that is reported is "
        "too high, and result.json says so"
    )


def _quotas(labels: Int64[np.ndarray, " n"], share: float) -> Int64[np.ndarray, " k1"]:
    sizes = np.bincount(labels + 1, minlength=1)
    quotas: Int64[np.ndarray, " k1"] = np.minimum(fractions_of(labels, share), np.maximum(sizes - 1, 0))
    return quotas


@final
class BestEpoch(nn.Module):
    """A copy of the student, or another module, as it was after its best epoch. A module: a checkpoint holds it.

    Args:
        student: to copy from, and into at the end.
    """

    accuracy: Tensor
    epoch: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._names = list(student.state_dict())
        for index, tensor in enumerate(student.state_dict().values()):
            self.register_buffer(f"copy{index}", tensor.detach().clone())
        self.register_buffer("accuracy", torch.tensor(-torch.inf, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(0))

    def offer(self, student: nn.Module, accuracy: float, epoch: int) -> None:
        """Copy the student if it is better than the best one so far; of equals, the first stays."""
        if accuracy <= float(self.accuracy):
            return
        self.accuracy.fill_(accuracy)
        self.epoch.fill_(epoch)
        for index, tensor in enumerate(student.state_dict().values()):
            self.get_buffer(f"copy{index}").copy_(tensor)

    def restore(self, student: nn.Module) -> None:
        """Make the student what it was after its best epoch."""
        copies = {name: self.get_buffer(f"copy{index}") for index, name in enumerate(self._names)}
        student.load_state_dict(copies)


Judge = Callable[[], dict[str, float]]
"""Gives the student's scores, see :func:`~kdcli.training.evaluate.accuracies`."""


@final
class Watch:
    """Judges the student after every epoch, and keeps the best one if asked to.

    Args:
        student: that is trained.
        judges: by the prefix of what metrics.jsonl calls their scores: ``val``, ``test``.
        keep_best: the judge that chooses, if any does (``--select``).
        kept: what is kept of the best epoch; default: the student.
    """

    def __init__(
        self,
        student: Student,
        judges: Mapping[str, Judge],
        keep_best: str | None,
        kept: nn.Module | None = None,
    ) -> None:
        self._student, self._judges, self._chooser = student, judges, keep_best
        self._kept = kept or student
        self.best = BestEpoch(self._kept) if keep_best is not None else None

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Judge epoch ``epoch`` (from 1).

        Returns:
            What metrics.jsonl records of it.

        Raises:
            StoppedEarly: a signal arrived.
        """
        scores = {name: judge() for name, judge in self._judges.items()}
        self._student.train()
        if self.best is not None and self._chooser is not None:
            self.best.offer(self._kept, main_score(scores[self._chooser]), epoch)
        return {f"{name}_{key}": value for name, own in scores.items() for key, value in own.items()}

    def settle(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Choose the student that is exported, the best or the last, and say how well it did.

        Args:
            history: of all epochs.

        Returns:
            ``epoch``, and the scores of what was chosen on the validation split, if there is one.
        """
        epoch = len(history)
        if self.best is not None:
            self.best.restore(self._kept)
            epoch = int(self.best.epoch)
        chosen = history[epoch - 1]
        start = f"{VAL}_"
        scores = {name.removeprefix(start): chosen[name] for name in chosen if name.startswith(start)}
        return {"epoch": epoch, **scores}
