"""Teachers as the command line names them, opened and described for the cache."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from kdcli.cache.layout import SAMPLES
from kdcli.cache.pixels import as_pixels
from kdcli.cache.provenance import NAME_LETTERS, OutputRecord, TeacherRecord
from kdcli.console import console
from kdcli.errors import UsageError, nearest
from kdcli.extract.config import DEFAULT_BATCH, CacheConfig, split_argument, split_size
from kdcli.extract.outputs import OutputPlan, plan_outputs
from kdcli.geometry import Render
from kdcli.models.arguments import parse_arguments
from kdcli.outputs import PIXELS
from kdcli.precision import resolve_amp
from kdcli.runtime import pick_device, versions

if TYPE_CHECKING:
    from kdcli.data.joined import Images
    from kdcli.models.grammar import ModelSpec
    from kdcli.models.spec import Model


def name_teachers(arguments: Sequence[str]) -> dict[str, str]:
    """Split ``[NAME=]SPEC`` arguments; a teacher without a name gets a slug of its spec.

    The slug is the last path component of the spec in lower case, without an ending such as
    ``.safetensors``, other characters than letters, digits, ``.``, ``_`` and ``-`` replaced by ``-``.

    Raises:
        UsageError: a bad or repeated name.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        head, equals, tail = argument.partition("=")
        if equals and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", head):
            name, spec = head, tail
        elif equals and not re.search(r"[:/@\[]", head):
            raise UsageError(
                f"'{head}' cannot name a teacher",
                "Names hold letters, digits, '.', '_' and '-': --teacher NAME=SPEC",
            )
        else:
            name, spec = slug(argument), argument
        if not spec:
            raise UsageError(f"--teacher {argument} has no spec", "Give --teacher NAME=SPEC.")
        if name == SAMPLES or len(name) > NAME_LETTERS:
            raise UsageError(f"no teacher can be called '{name}'", "Name it: --teacher NAME=SPEC")
        if name in named:
            raise UsageError(f"two teachers are called '{name}'", "Name them: --teacher NAME=SPEC")
        named[name] = spec
    return named


def teacher_specs(config: CacheConfig) -> "dict[str, ModelSpec]":
    """The teachers by name, each with the size and the arguments that it was told.

    Raises:
        UsageError: a bad or repeated name, an option of a teacher that is not there, or one that it is told twice.
    """
    from kdcli.models.grammar import ModelSpec, parse_size

    named = name_teachers(config.teacher)
    sizes = _by_teacher("--teacher-size", map(split_size, config.teacher_size), named)
    arguments = _by_teacher("--teacher-arg", map(split_argument, config.teacher_arg), named)
    found = {}
    for name, text in named.items():
        told = sizes[name]
        if len(told) > 1:
            raise UsageError(f"--teacher-size gives '{name}' two sizes: {', '.join(told)}", "Give it one.")
        size = parse_size(told[0]) if told else None
        spec = ModelSpec.parse(text)
        found[name] = spec.telling(size, parse_arguments(arguments[name], "--teacher-arg"))
    return found


def _by_teacher(
    option: str, given: Iterable[tuple[str, str]], named: Collection[str]
) -> dict[str, list[str]]:
    """What each teacher is told: what is given to it by name, or else to all."""
    listed = list(given)
    for name, text in listed:
        if name and name not in named:
            raise UsageError(
                f"{option} {name}={text}: no teacher is called '{name}'.{nearest(name, named)}",
                f"Teachers: {', '.join(named)}.",
            )
    own = {name: [text for each, text in listed if each == name] for name in named}
    return {name: own[name] or [text for each, text in listed if not each] for name in named}


def slug(spec: str) -> str:
    """The name of a teacher that was given none."""
    last = re.split(r"[/:]", re.sub(r"\[[^\[\]]*=[^\[\]]*\]$", "", spec).rstrip("/"))[-1]
    last = re.sub(r"\.(safetensors|onnx)$", "", last.split("@")[-1])
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-.") or "teacher"


@final
@dataclass(frozen=True, slots=True)
class Teacher:
    """An opened teacher with what the cache is to know of it."""

    model: "Model"
    plan: OutputPlan
    record: TeacherRecord


def describe_teacher(
    name: str, model: "Model", config: CacheConfig, data: "Images", recorded: TeacherRecord | None = None
) -> Teacher:
    """What the cache is to know of an open teacher, whose preprocessing is what it will be shown.

    Args:
        name: of the teacher.
        model: opened.
        config: what is to be kept, and how it runs.
        data: the images.
        recorded: what the cache knows of it already: its precision stands unless another is asked for by name.

    Raises:
        DeviceError: the device has not the precision asked for.
        UsageError: it cannot give what is to be kept.
    """
    import torch

    from kdcli.data.drawing import fingerprint
    from kdcli.models.network import weights_sha256

    plan = plan_outputs(name, model, config.outputs, config.dtype, config.temperatures, data.class_names)
    device = pick_device(config.device)
    known = None if model.network.casts else "off"  # what computes by itself has one precision
    if recorded is not None:
        known = recorded.amp
    preprocess = model.preprocess
    record = TeacherRecord(
        name=name,
        spec=model.spec,
        architecture=model.architecture,
        weights=weights_sha256(model.network),
        dtype=config.dtype,
        amp=resolve_amp(config.amp, device, known),
        declared_preprocess=preprocess.document(),
        num_classes=model.num_classes,
        num_features=model.num_features,
        pooling=(model.network.pooling or None) if model.num_features else None,
        class_names=model.class_names,
        temperatures=plan.temperatures,
        pixels=as_pixels(fingerprint(Render.of(preprocess))),
        compute={
            "batch_size": DEFAULT_BATCH if config.batch_size == "auto" else config.batch_size,
            **({"compile": True} if config.compile else {}),
            "device": device.split(":")[0],
            "threads": torch.get_num_threads(),
            "versions": versions(),
        },
        outputs={
            output.name: OutputRecord(
                kind=output.kind,
                top_k=output.top_k,
                tap=output.tap,
                pool=output.pool,
                pool_time=output.pool_time,
                eval_only=output.eval_only,
                arrays=plan.arrays[output.name],
            )
            for output in plan.outputs
        },
    )
    return Teacher(model, plan, record)


def pixels_once(teachers: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """The teachers; of those of one render, that keep more than pixels, only the first keeps these. It is said."""
    keepers: dict[Render, str] = {}
    found = dict(teachers)
    for name, teacher in teachers.items():
        outputs = {kind: output for kind, output in teacher.record.outputs.items() if kind != PIXELS}
        if len(outputs) == len(teacher.record.outputs):
            continue
        first = keepers.setdefault(Render.of(teacher.model.preprocess), name)
        if first != name and outputs:
            console.note(f"teacher '{name}': its pixels are those of '{first}', and are kept once")
            plan = replace(teacher.plan, outputs=tuple(o for o in teacher.plan.outputs if o.kind != PIXELS))
            found[name] = Teacher(teacher.model, plan, teacher.record.keeping(outputs))
    return found
