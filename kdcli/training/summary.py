"""What a run says of itself before its first step."""

from typing import Final

from kdcli.console import console, counted
from kdcli.data.sizes import Sizes, far_apart, sample_sizes, tell_geometry
from kdcli.methods.cells import source_sizes
from kdcli.precision import told
from kdcli.training.plan import Plan
from kdcli.training.samplers import stream_sizes
from kdcli.training.student import Built
from kdcli.training.validation import ON_TEST

_SIZE_HINT: Final = "--image-size sets the student's"
_SAMPLE: Final = 64


def tell(plan: Plan, prefix: str = "") -> None:
    """Say what is trained how, on standard error, each line after ``prefix``."""
    for line in _lines(plan):
        console.note(prefix + line)


def tell_built(plan: Plan, built: Built, prefix: str = "") -> None:
    """Say what was made to fit the student, on standard error, each line after ``prefix``."""
    student, teachers = built.model.preprocess, {} if plan.teachers is None else plan.teachers.records
    tell_geometry("student", {prefix + plan.config.student: student}, _sizes(plan), _SIZE_HINT)
    if apart := far_apart(student, (record.preprocess for record in teachers.values())):
        console.warn(
            f"{prefix}the student's input is {apart[0]} pixels, that of its nearest teacher {apart[1]}; {_SIZE_HINT}"
        )
    for line in built.objective.notes():
        console.note(prefix + line)


def _sizes(plan: Plan) -> Sizes:
    """Of some images; recorded ones where there is a cache, whose images need not be read."""
    if plan.recording is None:
        return sample_sizes(plan.data)
    rows = plan.recording.rows
    cache, some = plan.recording.cache, rows[:: max(1, len(rows) // _SAMPLE)]
    found = source_sizes(cache, some, frames=plan.rule.views.clips).tolist()
    return Sizes([(each[0], each[1]) for each in found], [count for each in found for count in each[2:]])


def _lines(plan: Plan) -> list[str]:
    config, numbers = plan.config, plan.settings
    backbone_lr = numbers.lr * numbers.backbone_lr_scale
    each = (" mixed of all" if plan.joint else " of every data set") if plan.sets else ""
    lines = [
        f"student {config.student}, started from {plan.init}; {len(plan.data)} images of {config.first_data}",
        *_streams(plan),
        f"by {plan.method.name}: {numbers.optimizer}, lr {numbers.lr:g} (backbone {backbone_lr:g}), "
        f"weight decay {numbers.weight_decay:g}, {numbers.schedule}, {counted(numbers.epochs, 'epochs')} "
        f"of batches of {numbers.batch_size}{each}, BatchNorm {numbers.bn}{_extras(plan)}; "
        + told(plan.device, plan.precision.amp),
    ]
    if plan.labels.separator is not None:
        lines.append(
            f"{plan.labels.count} labels, of which an image may have several: binary cross-entropy; judged by mAP"
        )
    if config.freeze is not None:
        lines.append("the backbone is frozen; the heads train on its features of eval mode")
    if plan.lower is not None:
        lines.append(
            f"the layers up to {plan.lower.tap} stay as they are; their maps are read as teacher "
            f"'{plan.lower.teacher.name}' stored them ({plan.lower.teacher.dtype})"
        )
    elif config.train_from is not None:
        lines.append(f"the layers up to {config.train_from} stay as they are; they run on every image")
    if plan.validation is not None:
        chosen = {ON_TEST: "epoch that is best on the test data"}.get(config.select, f"{config.select} epoch")
        labelled = "" if plan.predicts else "labelled "
        lines.append(f"{len(plan.validation)} {labelled}images are set aside; the {chosen} is exported")
    if plan.processes > 1 and numbers.bn == "train":
        lines.append(
            f"BatchNorm averages over each process's {numbers.batch_size // plan.processes} images; "
            "its running statistics are the first process's"
        )
    return [*lines, *plan.method.describe(plan.setup)]


def _extras(plan: Plan) -> str:
    """What the user asked of the engine besides, to be told at the start."""
    numbers = plan.settings
    told = {
        f"warm-up over {numbers.warmup:.0%}": numbers.warmup > 0,
        f"ending at {numbers.final_lr_share or 0:g} of the peak rate": numbers.schedule == "one-cycle",
        f"falling at {', '.join(f'{share:.0%}' for share in numbers.milestones)}": numbers.schedule == "step",
        f"{numbers.accumulate} pieces a step": numbers.accumulate > 1,
        f"gradient norm at most {numbers.clip_norm}": numbers.clip_norm is not None,
        f"labels smoothed by {numbers.label_smoothing:g}": numbers.label_smoothing > 0,
        f"weights averaged with decay {numbers.ema}": numbers.ema is not None,
        f"{plan.processes} processes": plan.processes > 1,
        "deterministic": plan.precision.deterministic,
    }
    return "".join(f", {text}" for text, applies in told.items() if applies)


def _streams(plan: Plan) -> list[str]:
    """Of what batches a step is made, where they are several."""
    lines = []
    for other in plan.sets[1:]:
        head = "the same head" if plan.joint else f"the head '{other.name}'"
        lines.append(f"and {len(other.data)} images of {other.data.location}, with {head}")
    if plan.split:
        labelled, unlabelled = stream_sizes(plan)
        share = ", labelled ones among them" if plan.repeats_labelled else ""
        lines.append(
            f"batches of their own: {labelled} labelled images, {unlabelled} unlabelled{share}; "
            f"{plan.unlabelled_ratio:g} unlabelled per labelled one in a step"
        )
    return lines
