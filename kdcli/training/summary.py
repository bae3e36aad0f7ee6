"""What a run says of itself before its first step."""

from kdcli.console import console
from kdcli.methods.levels import Matching
from kdcli.methods.transfer import PAPER as P3
from kdcli.training.loading import order_of, stream_sizes
from kdcli.training.plan import Plan
from kdcli.training.schedule import slow_tau
from kdcli.training.student import Built
from kdcli.training.validation import ON_TEST


def tell(plan: Plan, prefix: str = "") -> None:
    """Say what is trained how, on standard error, each line after ``prefix``."""
    for line in _lines(plan):
        console.note(prefix + line)


def tell_built(built: Built, prefix: str = "") -> None:
    """Say what was made to fit the student, on standard error, each line after ``prefix``."""
    for line in built.objective.notes():
        console.note(prefix + line)


def _lines(plan: Plan) -> list[str]:
    config, numbers = plan.config, plan.settings
    backbone_lr = numbers.lr * numbers.backbone_lr_scale
    each = " of every data set" if plan.sets else ""
    lines = [
        f"student {config.student}, started from {plan.init}; {len(plan.data)} images of {config.first_data}",
        *_streams(plan),
        f"{plan.method.name}: {numbers.optimizer}, lr {numbers.lr:g} (backbone {backbone_lr:g}), "
        f"weight decay {numbers.weight_decay:g}, {numbers.schedule}, {numbers.epochs} epochs "
        f"of batches of {numbers.batch_size}{each}, BatchNorm {numbers.bn}{_extras(plan)}",
    ]
    if config.freeze is not None:
        lines.append("the backbone is frozen; the heads train on its features of eval mode")
    if plan.lower is not None:
        lines.append(
            f"the layers up to {plan.lower.tap} stay as they are; their maps are read as teacher "
            f"'{plan.lower.teacher.name}' stored them ({plan.lower.teacher.dtype})"
        )
    if plan.validation is not None:
        chosen = {ON_TEST: "epoch that is best on the test data"}.get(config.select, f"{config.select} epoch")
        lines.append(f"{len(plan.validation)} labelled images are set aside; the {chosen} is exported")
    if plan.processes > 1 and numbers.bn == "train":
        lines.append(
            f"BatchNorm averages over each process's {numbers.batch_size // plan.processes} images; "
            "its running statistics are the first process's"
        )
    if plan.matching is not None:
        lines.append(_matched(plan, plan.matching))
    elif plan.teachers is not None:
        shares = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.teachers.weights.items())
        if plan.method.paper == P3:
            return [
                *lines,
                *_transfer(plan, shares if plan.frozen is None else ", ".join(plan.teachers.weights)),
            ]
        label = f", label weight {numbers.label_weight:g}" if plan.method.needs.labels else ""
        lines.append(f"soft cross-entropy at T = {numbers.temperature:g}{label}; weights: {shares}")
        if "crd_weight" in plan.method.options:
            lines.append(_contrast(plan))
    return lines


def _transfer(plan: Plan, shares: str) -> list[str]:
    """What a method of P3 learns from."""
    numbers, options = plan.settings, plan.method.options
    direction = "student || teacher" if numbers.kl_direction == "reverse" else "teacher || student"
    term = {
        "cd": "similarities",
        "crd": "CRD",
        "soft-ce": f"soft cross-entropy at T = {numbers.temperature:g}",
    }.get(plan.method.name, f"T^2/n KL({direction}) at T = {numbers.temperature:g}")
    weight = (
        f", weight {numbers.kl_weight:g} beside the labels"
        if "kl_weight" in options and numbers.kl_weight < 1
        else ""
    )
    if "top_classes" in options:
        weight += f", over the teacher's {numbers.top_classes} most probable classes, renormalised"
    lines = [f"{term}{weight}; teachers: {shares}"]
    if plan.method.needs.largest and plan.teachers is not None:
        kept = {name: plan.teachers.largest.get(name) for name in plan.teachers.weights}
        read = (f"{name} {'all' if top is None else f'the {top} largest'}" for name, top in kept.items())
        lines.append(f"logits read from the cache: {', '.join(read)}")
    if plan.frozen is not None:
        teacher = plan.frozen.teacher
        where = (
            "run live on the same images" if teacher is None else f"read from the cache as '{teacher.name}'"
        )
        lines.append(f"frozen student: {where}")
    if numbers.mcl_every is not None:
        steps = order_of(plan).batches * numbers.epochs
        updates, tau = steps // numbers.mcl_every, slow_tau(numbers, steps)
        lines.append(
            f"slow copy: tau {tau:.6g}, every {numbers.mcl_every} steps; {updates} updates go "
            f"{1 - tau**updates:.1%} of the way; it is tested and exported, BatchNorm buffers averaged likewise"
        )
    if plan.method.name == "cd":
        lines.append(f"similarities within {numbers.batch_size // numbers.accumulate} images")
    return [*lines, _contrast(plan)] if plan.method.name == "crd" else lines


def _extras(plan: Plan) -> str:
    """What the user asked of the engine besides, to be told at the start."""
    numbers = plan.settings
    told = {
        f"warm-up over {numbers.warmup:.0%}": numbers.warmup > 0,
        f"falling at {', '.join(f'{share:.0%}' for share in numbers.milestones)}": numbers.schedule == "step",
        f"{numbers.accumulate} pieces a step": numbers.accumulate > 1,
        f"gradient norm at most {numbers.clip_norm}": numbers.clip_norm is not None,
        f"labels smoothed by {numbers.label_smoothing:g}": numbers.label_smoothing > 0,
        f"weights averaged with decay {numbers.ema}": numbers.ema is not None,
        f"{plan.processes} processes": plan.processes > 1,
    }
    return "".join(f", {text}" for text, said in told.items() if said)


def _streams(plan: Plan) -> list[str]:
    """Of what batches a step is made, where they are several."""
    lines = []
    for other in plan.sets[1:]:
        head = "the same head" if plan.joint else f"the head '{other.name}'"
        lines.append(f"and {len(other.data)} images of {other.data.location}, with {head}")
    if plan.split:
        labelled, unlabelled = stream_sizes(plan)
        share = ", labelled ones among them" if plan.settings.unlabelled_includes_labelled else ""
        lines.append(
            f"batches of their own: {labelled} labelled images, {unlabelled} unlabelled{share}; "
            f"{plan.settings.unlabelled_ratio or 1:g} unlabelled per labelled one in a step"
        )
    return lines


def _matched(plan: Plan, matching: Matching) -> str:
    """P4's Eq. 3 with its numbers."""
    numbers = plan.settings
    terms = [
        f"{numbers.label_weight:g} CE",
        f"{matching.distill_weight:g} x {numbers.temperature**2:g} soft cross-entropy at T = {numbers.temperature:g}",
        *(f"{level.weight:g} MSE of {level.array}" for level in matching.levels),
    ]
    teacher = next(iter(plan.teachers.weights)) if plan.teachers is not None else ""
    return f"loss ({matching.convention}): {' + '.join(terms)}; teacher '{teacher}', {plan.config.teacher_view} view"


def _contrast(plan: Plan) -> str:
    numbers, teachers = plan.settings, len(plan.teachers.weights) if plan.teachers else 0
    size = 2 * teachers * len(plan.data) * numbers.crd_dim * 4  # fp32, one bank for each side
    return (
        f"CRD: weight {numbers.crd_weight:g}, {numbers.crd_negatives} negatives, temperature "
        f"{numbers.crd_temperature:g}, {numbers.crd_dim} dimensions; memory of {size / 1e6:.1f} MB"
    )
