"""P3's data partitioning (DP): each image from whoever is surer of it, a teacher or the student as it was.

The frozen student's outputs are read from the cache, where it is a cached teacher, or computed beside the
student's. :mod:`kdcli.methods.transfer` has the paper.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError, UsageError
from kdcli.geometry import EvalGeometry
from kdcli.methods.base import Method, Needs, Objective, Origin, Setup, equal_shares
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.comparison import compared
from kdcli.methods.labelled import require_cached_label, require_one_label
from kdcli.methods.logits import beside, standardised, warn_of_scale
from kdcli.methods.losses import (
    Columns,
    beside_labels,
    choose_source,
    chosen_logits,
    kl_divergence,
    kl_name,
    teacher_divergence,
)
from kdcli.methods.options import KlOptions, kl_weight_option, method_option
from kdcli.methods.transfer import PAPER, PRINTED
from kdcli.models.network import Classifier
from kdcli.models.spec import Model, open_model, weights_sha256
from kdcli.models.student import LABEL_HEAD, StudentOutput
from kdcli.options.resolving import spelled
from kdcli.types import Difference

FROZEN = "frozen student"
"""Name of the frozen student's outputs where no cache holds them; no cached teacher's name has a space."""
_NAME = "start"
"""What a hint calls the student as a teacher of a cache."""


class PartitionOptions(KlOptions):
    """What DP can be told."""

    frozen: Literal["auto", "cache", "live"] = method_option(
        "auto",
        "Where DP has the student as it was from: cache, live, or auto: cached if it is there.",
    )
    frozen_teacher: str | None = method_option(
        None,
        "Cached teacher that is the student as it was; default: the one of its weights.",
        complete="teacher",
        metavar="NAME",
    )


class LabelledPartitionOptions(PartitionOptions):
    """With labels."""

    kl_weight: float = kl_weight_option(1.0)


# --- the loss ---------------------------------------------------------------------------------


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


@final
class DataPartitioning(Objective):
    """Each image from whoever is surer of it: a teacher or the student as it was (P3 Eq. 4, 5).

    Args:
        teachers: their names; of equally sure ones the first is taken.
        frozen: the frozen student: the name of a cached teacher, or the network.
        options: temperature of the loss (never of the comparison), direction, and lambda where labels are compared:
            without, the largest probabilities are.
        columns: see :class:`~kdcli.methods.losses.Columns`.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(
        self,
        teachers: Sequence[str],
        frozen: str | nn.Module,
        options: PartitionOptions,
        columns: Mapping[str, Sequence[int]] | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._teachers = tuple(teachers)
        if isinstance(frozen, str):
            self._network = None
            self._sources = self._read = (frozen, *teachers)
        else:
            self._network = frozen
            self._sources, self._read = (FROZEN, *teachers), self._teachers
        self._confidence, self._kl_weight = "logp_max", 1.0
        if isinstance(options, LabelledPartitionOptions):
            self._confidence, self._kl_weight = "logp_label", options.kl_weight
        self._options, self._smoothing = options, smoothing
        self._columns = Columns(columns or {})

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Logits, and the exact log-probabilities that are compared: half precision makes ties."""
        return dict.fromkeys(self._read, ("logits", self._confidence))

    def live(self) -> Mapping[str, nn.Module]:
        """The frozen student, where it is not cached."""
        return {} if self._network is None else {FROZEN: self._network}

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """P3 Eq. 5; the parts ``distill``, ``kl``, ``label`` if lambda < 1, and ``share/TEACHER`` of the images."""
        count = batch.count("images") or len(batch.labels)
        choice = choose_source([teacher[name][self._confidence] for name in self._sources])
        targets = chosen_logits(
            [self._columns(name, teacher[name]["logits"]) for name in self._sources], choice
        )
        logits, options = student.logits[LABEL_HEAD], self._options
        logits, targets = compared(options, logits), compared(options, targets)
        parts = {
            "distill": kl_divergence(logits, targets, options.temperature, options.kl_direction, count),
            "kl": teacher_divergence(logits, targets, options.temperature, count=count),
        }
        for number, name in enumerate(self._teachers, start=1):
            parts[f"share/{name}"] = (choice == number).sum() / count
        return beside_labels(student, batch, parts, self._kl_weight, self._smoothing)


# --- the method -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Frozen:
    """Where the frozen student's outputs come from.

    Attributes:
        teacher: the cached teacher that it is; None: a copy of it is run.
    """

    teacher: TeacherRecord | None = None

    @property
    def place(self) -> str:
        """What ``--frozen`` calls it."""
        return "live" if self.teacher is None else "cache"


@final
class Partition(Method):
    """DP; :attr:`Setup.own` is a :class:`Frozen`."""

    tunes = True

    def check(self, setup: Setup) -> Setup:
        """Decides where the frozen student is from; it is none of the teachers unless asked for."""
        if "logp_label" in self.needs.kinds:
            does = f"{self.name} compares what teachers and student give an image's label"
            require_one_label(setup, does, f"--method {DP_UNSUP.name}")
            require_cached_label(setup, f"--method {DP_UNSUP.name}")
        warn_of_scale(setup.options, 1 - getattr(setup.options, "kl_weight", 1.0))
        frozen = choose_frozen(setup, self.needs.kinds)
        weights, teacher = dict(setup.weights), frozen.teacher
        if teacher is not None and not setup.asked and len(weights) > 1 and teacher.name in weights:
            weights = equal_shares([name for name in weights if name != teacher.name])
        return replace(
            setup,
            own=frozen,
            options=setup.options.model_copy(update={"frozen": frozen.place}),
            weights=weights,
            teachers={name: setup.teachers[name] for name in weights},
        )

    def arrays(self, setup: Setup) -> dict[str, tuple[str, ...]]:
        """With the cached frozen student's."""
        own = [] if setup.own is None or setup.own.teacher is None else [setup.own.teacher.name]
        return dict.fromkeys([*setup.weights, *own], tuple(sorted(self.needs.kinds)))

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With what the frozen student is."""
        teacher = setup.own.teacher
        known = {"frozen": setup.own.place, "frozen_teacher": None if teacher is None else teacher.id}
        return {**Method.identity(self, setup), **known}

    def describe(self, setup: Setup) -> list[str]:
        """P3 Eq. 5 with its numbers, and where the frozen student is from."""
        teacher = setup.own.teacher
        place = (
            "run live on the same images" if teacher is None else f"read from the cache as '{teacher.name}'"
        )
        return [
            f"{kl_name(setup.options)}{beside(setup.options)}; teachers: {', '.join(setup.weights)}",
            *standardised(setup.options),
            f"frozen student: {place}",
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`DataPartitioning`."""
        teacher = setup.own.teacher
        return DataPartitioning(
            tuple(setup.weights),
            FrozenStudent(setup.opened().network) if teacher is None else teacher.name,
            setup.options,
            setup.columns,
            setup.settings.label_smoothing,
        )


def choose_frozen(setup: Setup, arrays: Collection[str]) -> Frozen:
    """Where the frozen student comes from.

    Args:
        setup: of the run.
        arrays: that are read of it.

    Raises:
        UsageError: options contradict each other.
        NotFoundError: no cached teacher has the given name.
        IdentityError: the teacher of that name is not the student.
        CacheMissingError: it is to be read from the cache, which lacks it, with the command that fills the gap.
    """
    options: PartitionOptions = setup.options
    _, cache = _there(setup)
    named = options.frozen_teacher
    place = options.frozen
    if place == "auto":
        place = setup.before.get("frozen", "auto" if named is None else "cache")
    if options.frozen == "live" and named is not None:
        raise UsageError(
            f"--frozen live runs the student, and --frozen-teacher {named} reads it", "Leave one of them out."
        )
    why, remedy = _why_not_live(setup), _remedy(setup.origin, cache)
    if place == "live":
        if why is not None:
            raise UsageError(f"--frozen live, but {why}", remedy)
        return Frozen()
    record = _cached(setup.origin, cache, named)
    lacking = None if record is None else _lacking(setup, record, arrays)
    if record is not None and lacking is None:
        return Frozen(record)
    missing = lacking or CacheMissingError(
        f"the student as it starts ({setup.origin.start}) is no teacher of the cache, and "
        + ("--frozen cache reads it there" if place == "cache" else f"it cannot run live: {why}"),
        remedy,
    )
    if place == "cache" or why is not None:
        raise missing
    if lacking is not None:
        console.note(f"the frozen student is run live: {lacking.message}")
    return Frozen()


def _there(setup: Setup) -> tuple[ImageData, CacheSet]:
    if setup.data is None or setup.cache is None:
        raise ValueError("this method reads a cache")
    return setup.data, setup.cache


def _why_not_live(setup: Setup) -> str | None:
    if setup.teacher_view == "eval":
        return "with --teacher-view eval the teachers saw view 0, which the student does not see"
    if setup.origin.train_from is not None:
        return f"with --train-from {setup.origin.train_from} no image is drawn that it could see"
    return None


def _remedy(origin: Origin, cache: CacheSet) -> str:
    if not origin.trained:
        return "Start from trained weights: --student local-dir:RUN/export"
    return spelled("cache-teachers", cache=cache.members[0].layout.root, teacher=f"{_NAME}={origin.start}")


def _cached(origin: Origin, cache: CacheSet, name: str | None) -> TeacherRecord | None:
    """The cached teacher that gives what the student gives at its start, if there is one."""
    named = None if name is None else cache.teacher(name)
    if not origin.trained or not (named or cache.teachers):
        return None
    model = open_model(origin.start, image_size=origin.image_size, arguments=origin.arguments)
    if named is None:
        return next((each for each in cache.teachers.values() if not _differences(each, model)), None)
    if found := _differences(named, model):
        raise IdentityError(
            f"--frozen-teacher {named.name} is not the student as it starts ({model.spec})",
            f"Leave it out, or cache the student: {_remedy(origin, cache)}",
            found,
        )
    return named


def _differences(record: TeacherRecord, model: Model) -> list[Difference]:
    own = EvalGeometry.of(record.preprocess).applied(model.preprocess)  # the student is shown it so, too
    found = [
        Difference(field, old, new)
        for field, old, new in (
            ("architecture", record.architecture, model.architecture),
            ("preprocess", record.declared_preprocess, own.document()),
        )
        if old != new
    ]
    if not found and record.weights != (now := weights_sha256(model.network)):
        found = [Difference("weights", record.weights, now)]
    return found


def _lacking(setup: Setup, record: TeacherRecord, arrays: Collection[str]) -> CacheMissingError | None:
    """What keeps it from being read, if anything does."""
    data, cache = _there(setup)
    try:
        cache.require({record.name: arrays}, cache.rows_of(data, check_content=False), setup.views, None)
    except CacheMissingError as error:
        return error
    return None


DP = Partition(
    name="dp", paper=PAPER, equation="Eq. 4, 5",
    summary="KL from whoever gives the label more: teachers, or the frozen student.",
    Options=LabelledPartitionOptions,
    needs=Needs(frozenset({"logits", "logp_label"}), labels=True, classes=True, frozen=True), defaults=PRINTED,
)  # fmt: skip
DP_UNSUP = Partition(
    name="dp-unsup", paper=PAPER, equation="Eq. 4, 5, largest probability",
    summary="KL from whoever is surer; no labels.", Options=PartitionOptions,
    needs=Needs(frozenset({"logits", "logp_max"}), classes=True, frozen=True), defaults=PRINTED,
)  # fmt: skip
