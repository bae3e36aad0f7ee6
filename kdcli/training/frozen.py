"""The frozen student: the student as it starts, of which P3's data partitioning asks what it says of each image."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError, CacheMissingError, IdentityError, UsageError
from kdcli.methods.base import Method
from kdcli.models.network import Classifier
from kdcli.models.spec import Model, open_model, weights_sha256
from kdcli.options.resolving import spelled
from kdcli.training.config import StudentConfig
from kdcli.training.student import FRESH, UNTRAINED, Start
from kdcli.types import Difference

NAME = "start"
"""What a hint calls the student as a teacher of a cache."""


@final
@dataclass(frozen=True, slots=True)
class Frozen:
    """Where the frozen student's outputs come from.

    Attributes:
        teacher: the cached teacher that it is; None: the training loop runs a copy of it.
    """

    teacher: TeacherRecord | None = None

    @property
    def place(self) -> str:
        """What ``--frozen`` calls it."""
        return "live" if self.teacher is None else "cache"


@final
class FrozenStudent(nn.Module):
    """A copy of a student's network that stays in eval mode and learns nothing.

    Args:
        network: as it starts; copied.
    """

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FrozenStudent":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b 3 h w"], labels: Int64[Tensor, " b"]
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """What a cache would hold of these images: ``logits``, and exact ``logp_label`` and ``logp_max``.

        Run without mixed precision, as half precision makes ties.

        Args:
            images: normalised, in the view that the student sees.
            labels: class indices; where it is -1, ``logp_label`` means nothing.
        """
        with torch.autocast(images.device.type, enabled=False):
            logits = self.network.outputs(images, ("logits",))["logits"].float()
        exact = logits.double().log_softmax(dim=1)
        label = exact.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return {"logits": logits, "logp_label": label.float(), "logp_max": exact.amax(dim=1).float()}


def choose_frozen(
    config: StudentConfig,
    start: Start,
    cache: CacheSet,
    arrays: Collection[str],
    data: ImageData,
    views: Sequence[int],
    pinned: str | None = None,
) -> Frozen:
    """Where the frozen student comes from.

    Args:
        config: says ``--frozen`` and ``--frozen-teacher``.
        start: what the student starts from.
        cache: may hold it.
        arrays: that are read of it.
        data: the images.
        views: of them that the teachers are asked about.
        pinned: what ``auto`` meant when this run began.

    Raises:
        UsageError: options contradict each other.
        NotFoundError: no cached teacher has the given name.
        IdentityError: the teacher of that name is not the student.
        CacheMissingError: it is to be read from the cache, which lacks it, with the command that fills the gap.
    """
    asked: str = config.frozen or ("auto" if config.frozen_teacher is None else "cache")
    if asked == "auto":
        asked = pinned or asked
    if asked == "live" and config.frozen_teacher is not None:
        raise UsageError(
            f"--frozen live runs the student, and --frozen-teacher {config.frozen_teacher} reads it",
            "Leave one of them out.",
        )
    why = _why_not_live(config)
    if asked == "live":
        if why is not None:
            raise UsageError(f"--frozen live, but {why}", _remedy(config, start))
        return Frozen()
    record = _cached(config, start, cache)
    lacking = None if record is None else _lacking(cache, record, arrays, data, views)
    if record is not None and lacking is None:
        return Frozen(record)
    missing = lacking or CacheMissingError(
        f"the student as it starts ({_spec(config, start)}) is no teacher of the cache, and "
        + ("--frozen cache reads it there" if asked == "cache" else f"it cannot run live: {why}"),
        _remedy(config, start),
    )
    if asked == "cache" or why is not None:
        raise missing
    if lacking is not None:
        console.note(f"the frozen student is run live: {lacking.message}")
    return Frozen()


def _why_not_live(config: StudentConfig) -> str | None:
    if config.teacher_view == "eval":
        return "with --teacher-view eval the teachers saw view 0, which the student does not see"
    if config.train_from is not None:
        return f"with --train-from {config.train_from} no image is drawn that it could see"
    return None


def _spec(config: StudentConfig, start: Start) -> str:
    return config.student if start.init in FRESH else start.init


def _remedy(config: StudentConfig, start: Start) -> str:
    if start.init in UNTRAINED:
        return "Start from trained weights: --student local-dir:RUN/export"
    return spelled("cache-teachers", cache=config.cache[0], teacher=f"{NAME}={_spec(config, start)}")


def _cached(config: StudentConfig, start: Start, cache: CacheSet) -> TeacherRecord | None:
    """The cached teacher that gives what the student gives at its start, if there is one."""
    named = None if config.frozen_teacher is None else cache.teacher(config.frozen_teacher)
    if start.init in UNTRAINED or not (named or cache.teachers):
        return None
    model = open_model(_spec(config, start), image_size=config.image_size)
    if named is None:
        return next((each for each in cache.teachers.values() if not _differences(each, model)), None)
    if found := _differences(named, model):
        raise IdentityError(
            f"--frozen-teacher {named.name} is not the student as it starts ({model.spec})",
            f"Leave it out, or cache the student: {_remedy(config, start)}",
            found,
        )
    return named


def _differences(record: TeacherRecord, model: Model) -> list[Difference]:
    declared = {key: value for key, value in record.declared_preprocess.items() if key != "crop_fraction"}
    found = [
        Difference(field, old, new)
        for field, old, new in (
            ("architecture", record.architecture, model.architecture),
            ("preprocess", declared, model.preprocess.document()),
        )
        if old != new
    ]
    if not found and record.weights != (now := weights_sha256(model.network)):
        found = [Difference("weights", record.weights, now)]
    return found


def _lacking(
    cache: CacheSet, record: TeacherRecord, arrays: Collection[str], data: ImageData, views: Sequence[int]
) -> CacheMissingError | None:
    """What keeps it from being read, if anything does."""
    try:
        cache.require({record.name: arrays}, cache.rows_of(data, check_content=False), views, None)
    except CacheMissingError as error:
        return error
    return None


def require_comparable(method: Method, data: ImageData, cache: CacheSet) -> None:
    """Refuse data whose labels are not those that the cached log-probabilities are of.

    Raises:
        BadDataError: some images have no label, or another one in the cache.
    """
    if "logp_label" not in method.needs.kinds:
        return
    unlabelled = int((data.labels < 0).sum())
    if unlabelled:
        raise BadDataError(
            f"{unlabelled} of {len(data)} images have no label, and {method.name} compares what teachers and "
            "student give the label",
            "Use --method dp-unsup, which needs none, or labelled images only.",
        )
    names, known = data.class_names, cache.class_names
    if names is None or known is None or not set(names) <= set(known):
        raise BadDataError(
            "the labels are not those that the cache was made with, and the teachers' log-probabilities are of those",
            f"Make a cache of these labels, or use --method dp-unsup instead of {method.name}.",
        )
    rows = cache.rows_of(data, check_content=False)  # refuses images whose class differs
    without = int((cache.labels[rows] < 0).sum())
    if without:
        raise BadDataError(
            f"{without} of {len(data)} images had no label when they were cached, so nothing is known of what "
            "teachers give it",
            f"Cache the labelled data set anew, or use --method dp-unsup instead of {method.name}.",
        )
