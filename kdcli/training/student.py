"""The student: what it starts from, and its heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import nn

from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import IdentityError, NotFoundError, UsageError, nearest
from kdcli.models.grammar import TORCHVISION
from kdcli.models.spec import Model, ModelSpec, default_init, open_model, weights_sha256
from kdcli.models.student import Student
from kdcli.models.timm_models import TimmArchitecture
from kdcli.models.torchvision_models import TorchvisionArchitecture
from kdcli.objectives.base import Objective
from kdcli.types import Difference

if TYPE_CHECKING:
    from kdcli.training.plan import Plan


def architecture_name(spec: ModelSpec) -> str:
    """The architecture of a spec, from its configuration alone; no weights are read."""
    known = TorchvisionArchitecture(spec) if spec.name.startswith(TORCHVISION) else TimmArchitecture(spec)
    return known.name


def resolve_init(init: str | None, student: ModelSpec, generalist: TeacherRecord | None) -> str:
    """What the student starts from: ``pretrained``, ``random``, or the spec of a model.

    A student of the generalist's architecture starts from the generalist (P1 section 2); any other
    from ``--init``, by default pretrained where the student's spec names weights and random for bare names.

    Raises:
        UsageError: ``--init`` contradicts that, or names a model of another architecture.
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
        return start
    if init is None:
        return default_init(student)
    if init in ("pretrained", "random"):
        return init
    try:
        start_spec = ModelSpec.parse(init)
    except NotFoundError as error:
        from timm import list_models

        near = nearest(init, ("pretrained", "random", *list_models()))
        if near and near not in error.message:
            raise UsageError(
                f"--init {init}: must be pretrained, random or a model.{near}", error.hint
            ) from error
        raise
    if (other := architecture_name(start_spec)) != own:
        raise UsageError(
            f"--init {init} is a {other}, the student a {own}",
            "Start from a model of the student's architecture.",
        )
    return str(start_spec)


@final
@dataclass(frozen=True, slots=True)
class Built:
    """A student ready to train.

    Attributes:
        model: the open network and how it wants its pixels.
        student: the same network with the objective's heads.
        objective: what it learns from.
    """

    model: Model
    student: Student
    objective: Objective


def build_student(plan: "Plan") -> Built:
    """Open the network, make the heads and the objective.

    The network and its classifier come first after seeding, the extra heads after seeding again: with
    equal ``--seed``, students of all methods start from the same weights.

    Raises:
        NotFoundError: the weights cannot be had.
        IdentityError: the generalist's weights are not those that were cached.
        UsageError: BatchNorm cannot work with one image a step.
    """
    config, seed = plan.config, plan.config.seed
    torch.manual_seed(seed)
    fresh = plan.init in ("pretrained", "random")
    model = open_model(
        config.student if fresh else plan.init,
        weights="random" if plan.init == "random" else "pretrained",
        num_classes=plan.num_classes,
        image_size=config.image_size,
    )
    if not fresh and plan.teachers is not None and plan.teachers.generalist is not None:
        _require_generalist(model, plan.teachers.generalist)
    objective = plan.method.build(plan.setup(model.num_features))
    torch.manual_seed(seed)
    student = Student(model, objective.heads())
    student.set_batchnorm(frozen=plan.settings.bn == "frozen")
    if (
        plan.settings.bn == "train"
        and min(plan.settings.batch_size, len(plan.data)) == 1
        and _has_batchnorm(student)
    ):
        raise UsageError(
            "batch size 1 leaves BatchNorm nothing to average over",
            "Use --batch-size 2 or more, or --bn frozen.",
        )
    return Built(model, student, objective)


def _require_generalist(model: Model, record: TeacherRecord) -> None:
    if model.spec != str(ModelSpec.parse(record.spec)):
        return  # the architectures differ, and --init names another start
    if (now := weights_sha256(model.network)) != record.weights:
        raise IdentityError(
            f"{record.spec} is not the generalist that was cached any more",
            f"Restore its weights, or cache it anew under another name: --teacher OTHER={record.spec}",
            [Difference("weights", record.weights, now)],
        )


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
