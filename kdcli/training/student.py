"""The student: what it starts from, and its heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import IdentityError, NotFoundError, UsageError, nearest
from kdcli.methods.base import Objective
from kdcli.models.cut import cut_at
from kdcli.models.spec import Model, ModelSpec, architecture_name, default_init, open_model, weights_sha256
from kdcli.models.student import Student
from kdcli.registry import recorded
from kdcli.training.classes import require_own_classes
from kdcli.training.levels import fit_matching
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.training.frozen import FrozenStudent
    from kdcli.training.lower import Lower
    from kdcli.training.plan import Plan

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
        start = str(ModelSpec.parse(generalist.spec))
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


def _nearest_source(own: str, sources: Sequence[TeacherRecord]) -> Start:
    """The best source of the student's architecture (P2 Table 1: "fine-tune selected source")."""
    for record in sources:
        if record.architecture == own:
            return Start(str(ModelSpec.parse(record.spec)), record)
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


@final
@dataclass(frozen=True, slots=True)
class Built:
    """A student ready to train.

    Attributes:
        model: the open network and how it wants its pixels.
        student: the same network with the objective's heads.
        objective: what it learns from.
        lower: what the cache holds of its lower part, with ``--train-from``.
        frozen: a copy of the network as it starts, where the training loop asks it.
    """

    model: Model
    student: Student
    objective: Objective
    lower: "Lower | None" = None
    frozen: "FrozenStudent | None" = None


def build_student(plan: "Plan") -> Built:
    """Open the network, make the heads and the objective.

    The network and its classifier come first after seeding, the extra heads after seeding again: with
    equal ``--seed``, students of all methods start from the same weights.

    Raises:
        NotFoundError: the weights cannot be had.
        IdentityError: the weights of a teacher that it starts from are not those that were cached.
        UsageError: BatchNorm cannot work with one image at a time, some process would have none at all, or the
            network cannot be cut at ``--train-from``.
    """
    config, seed = plan.config, plan.config.seed
    for record in (plan.start.record, plan.lower.teacher if plan.lower is not None else None):
        if record is not None:
            require_as_cached(record)
    torch.manual_seed(seed)
    own = plan.method.needs.classes and plan.init not in UNTRAINED  # its classifier learns on
    model = open_model(
        config.student if plan.init in FRESH else plan.init,
        weights="random" if plan.init in UNTRAINED else "pretrained",
        num_classes=None if own else plan.num_classes,
        image_size=config.image_size,
    )
    if own:
        require_own_classes(config, model, plan.class_names, plan.num_classes)
    if plan.init == "xavier":
        draw_xavier(model.network.plain)
    frozen = plan.freeze(model.network)
    matching = None if plan.matching is None else fit_matching(plan.matching, model)
    objective = plan.method.build(plan.setup(model.num_features, matching))
    torch.manual_seed(seed)
    student = Student(model, objective.heads())
    student.set_batchnorm(frozen=plan.settings.bn != "train", affine=plan.settings.bn != "frozen-affine")
    if config.freeze == "backbone":
        student.freeze_backbone()
    if plan.lower is not None:
        student.freeze_up_to(cut_at(model, plan.lower.tap))
    _require_pieces(plan, student)
    return Built(model, student, objective, plan.lower, frozen)


def draw_xavier(network: nn.Module) -> None:
    """Draw all weights of convolutions and linear layers from N(0, 2 / (fan_in + fan_out)); biases become 0.

    That is how P4 (Algorithm 1, steps 2 and 16) prints Xavier initialisation. Norms keep their start.

    Args:
        network: the whole student, its classifier included; drawn from torch's generator, layer by layer.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def require_as_cached(record: TeacherRecord) -> None:
    """Refuse a teacher whose weights are not those that were cached any more.

    Raises:
        IdentityError: that.
    """
    # At its own size and with its own classes, as it was cached: the student may have others.
    if (now := weights_sha256(open_model(recorded(record.spec)).network)) != record.weights:
        raise IdentityError(
            f"{record.spec} is not the teacher '{record.name}' that was cached any more",
            f"Restore its weights, or cache it anew under another name: --teacher OTHER={record.spec}",
            [Difference("weights", record.weights, now)],
        )


def _require_pieces(plan: "Plan", student: Student) -> None:
    """Refuse steps of which some process, or some piece of --accumulate, has too few images."""
    images, numbers = len(plan.data), plan.settings
    step = images // -(-images // numbers.batch_size)  # batches are of equal size up to one image
    pieces = numbers.accumulate * plan.processes
    least = 2 if numbers.bn == "train" and _has_batchnorm(student) else 1
    if step // pieces >= least:
        return
    if pieces == 1:
        raise UsageError(
            "batch size 1 leaves BatchNorm nothing to average over",
            "Use --batch-size 2 or more, or --bn frozen.",
        )
    raise UsageError(
        f"a step has {step} images, too few for {pieces} pieces (processes times --accumulate)"
        + (": BatchNorm needs two in each" if least == 2 else ""),
        f"Use --batch-size {least * pieces} or more"
        + (", or fewer pieces (--accumulate)." if numbers.accumulate > 1 else ", or fewer processes."),
    )


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
