"""The student: its network, its heads, and what it learns from."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn

from kdcli.data.sizes import require_kind
from kdcli.errors import UsageError
from kdcli.methods.base import Average, Objective, Setup
from kdcli.models.cut import cut_at
from kdcli.models.spec import Model, open_model
from kdcli.models.student import Student, require_features
from kdcli.training.classes import require_own_classes
from kdcli.training.lower import Lower
from kdcli.training.plan import Plan
from kdcli.training.samplers import EpochOrder, enough, order_of, smallest_step, some_step
from kdcli.training.start import UNTRAINED, require_as_cached


@final
@dataclass(frozen=True, slots=True)
class Built:
    """A student ready to train.

    Attributes:
        model: the open network and how it wants its pixels.
        student: the same network with the objective's heads.
        objective: what it learns from.
        lower: what the cache holds of its lower part, with ``--train-from``.
        average: of its weights, where that is what is kept of it.
    """

    model: Model
    student: Student
    objective: Objective
    lower: Lower | None = None
    average: Average | None = None


def build_student(plan: Plan) -> Built:
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
    origin = plan.setup.origin
    for record in (plan.start.record, plan.lower.teacher if plan.lower is not None else None):
        if record is not None:
            require_as_cached(record)
    torch.manual_seed(seed)
    needs = plan.needs
    own = needs.classes and not needs.same and plan.init not in UNTRAINED  # its classifier learns on
    model = open_model(
        origin.start,
        weights="random" if plan.init in UNTRAINED else "pretrained",
        num_classes=None if own else plan.classes.count,
        image_size=origin.image_size,
        arguments=origin.arguments,
    )
    model = replace(model, preprocess=plan.geometry.declared(model.preprocess))
    if own:
        require_own_classes(config.method, model, plan.classes)
    for data in (plan.data, plan.test, *(each for own in plan.sets for each in (own.data, own.test))):
        if data is not None:
            require_kind(f"the student {config.student}", model.preprocess, data, config.student)
    if plan.init == "xavier":
        draw_xavier(model.network.plain)
    objective = plan.method.build(_setup(plan, model))
    if any("features" in arrays for arrays in objective.reads().values()):
        require_features(model, f"--method {config.method}")
    torch.manual_seed(seed)
    student = Student(model, objective.heads())
    student.set_batchnorm(frozen=plan.settings.bn != "train", affine=plan.settings.bn != "frozen-affine")
    if config.freeze == "backbone":
        student.freeze_backbone()
    if config.train_from is not None:
        student.freeze_up_to(cut_at(model, config.train_from, objective.taps()))
    _require_pieces(plan, student, objective)
    return Built(model, student, objective, plan.lower, plan.average)


def _setup(plan: Plan, model: Model) -> Setup:
    # By name: the order of a ranking must not decide which head draws which weights.
    return replace(plan.setup, model=model, weights=dict(sorted(plan.setup.weights.items())))


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


def _require_pieces(plan: Plan, student: Student, objective: Objective) -> None:
    """Refuse steps of which some process, or some piece of --accumulate, has too few images."""
    sizes, numbers, order = [len(each.data) for each in plan.sets], plan.settings, order_of(plan)
    images = sum(sizes) if plan.joint else max(sizes, default=len(plan.data))
    if isinstance(order, EpochOrder):
        images = order.images
    step = smallest_step(images, numbers.batch_size)
    pieces = numbers.accumulate * plan.processes
    # --bn is of the student; what an objective trains beside it averages in any case.
    least = 2 if (numbers.bn == "train" and _has_batchnorm(student)) or _trains_batchnorm(objective) else 1
    if step // pieces >= least:
        return
    hint = f"Use {enough(images, least * pieces)}"
    if pieces == 1:
        raise UsageError(
            f"BatchNorm averages over the images of a step, and {some_step(images, numbers.batch_size)} has {step}",
            f"{hint}, or --bn frozen.",
        )
    raise UsageError(
        f"{some_step(images, numbers.batch_size)} has {step} images, too few for {pieces} pieces (processes times "
        "--accumulate)" + (": BatchNorm needs two in each" if least == 2 else ""),
        hint + (", or fewer pieces (--accumulate)." if numbers.accumulate > 1 else ", or fewer processes."),
    )


def _trains_batchnorm(objective: Objective) -> bool:
    return any(
        isinstance(each, nn.modules.batchnorm._BatchNorm) and each.weight.requires_grad
        for each in objective.modules()
    )


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
