"""How near a student comes to its teachers on images that it has not learnt from, by what a cache holds of them.

Of each array of each teacher, over the rows (images, or cells of their maps) of the held-out images' view 0:

    R^2 = 1 - sum |prediction - output|^2 / sum |output - mean output|^2
    cos = mean of the cosine of both, less the mean of the training outputs

No label is looked at. 1 is the teacher itself; R^2 is 0 for whoever always gives the mean, and may be below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.needs import Needs
from kdcli.cache.staging import stage
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import BadDataError
from kdcli.geometry import Render
from kdcli.methods.base import Objective
from kdcli.methods.batch import TeacherOutputs
from kdcli.methods.feature_rows import cosine_rows
from kdcli.models.student import Student
from kdcli.models.teacher import clips_of, normalise
from kdcli.training.config import StudentConfig
from kdcli.training.evaluate import Conditions, ExamRoom, shown
from kdcli.training.plan import Plan
from kdcli.training.replay import Recording
from kdcli.training.student import Built
from kdcli.training.transfers import Fetched
from kdcli.training.validation import Judge
from kdcli.types import Preprocess

EVAL_VIEW = 0
_SUMS = 4


def judged_images(
    data: ImageData, cache: CacheSet, reads: Mapping[str, Sequence[str]], config: StudentConfig
) -> ImageData:
    """The held-out images that the teachers have outputs for.

    Args:
        data: the images.
        cache: of the teachers.
        reads: arrays that are compared: teacher -> names.
        config: whether some may be missing, and where caches are copied to.

    Raises:
        CacheMissingError: images, or their outputs, that are not cached; the hint fills the cache.
        IdentityError: images that changed since they were cached.
        BadDataError: fewer than two are left.
    """
    rows = cache.rows_of(data, reads=reads)
    if config.stage is not None:
        stage(cache, Needs(reads, rows, (EVAL_VIEW,)), config.stage, config.stage_limit)
    usable = cache.require(reads, rows, [EVAL_VIEW], config.allow_partial)
    if usable.sum() < 2:
        raise BadDataError(
            f"{int(usable.sum())} of the held-out images of {data.location} have cached outputs: nothing to explain",
            "Hold out two or more that are cached.",
        )
    return data if usable.all() else data.select(np.flatnonzero(usable))


@final
@dataclass(frozen=True, slots=True)
class Judged:
    """A student to judge.

    Attributes:
        student: put into eval mode.
        objective: says what of its outputs predicts what.
        preprocess: the student's.
        recording: the held-out images' outputs.
    """

    student: Student
    objective: Objective
    preprocess: Preprocess
    recording: Recording


def judged_of(plan: Plan, built: Built, data: ImageData) -> Judged:
    """The student of a run, and what its cache holds of some images."""
    if plan.recording is None:
        raise ValueError("teachers judge what they have outputs for")
    cache, objective = plan.recording.cache, built.objective
    held = Recording(cache, cache.rows_of(data), objective.reads())
    return Judged(built.student, objective, built.model.preprocess, held)


def fidelity_of(plan: Plan, built: Built, data: ImageData, how: Conditions) -> Judge:
    """Judges a student on the same images again and again."""
    one = judged_of(plan, built, data)
    room = ExamRoom(data, [Render.of(one.preprocess)], how)
    return lambda: fidelities([one], data, how, room)[0]


@torch.inference_mode()
def fidelities(
    judged: Sequence[Judged], data: ImageData, how: Conditions, room: ExamRoom | None = None
) -> list[dict[str, float]]:
    """``r2`` and ``cos`` of each, the means of those of each array, which follow as ``r2/TEACHER/ARRAY``; in one pass.

    Args:
        judged: the students.
        data: the images.
        how: where, and by whom.
        room: the images in batches, where they are judged on again and again.

    Raises:
        StoppedEarly: a signal arrived.
        BadDataError: an image cannot be decoded.
    """
    for each in judged:
        each.student.eval()
    room = room or ExamRoom(data, [Render.of(each.preprocess) for each in judged], how)
    found: list[list[tuple[str, Fetched]]] = [[] for _ in judged]
    with how.ranks.one_fate():
        for seen, index in shown(room, how):
            for each, sums in zip(judged, found, strict=True):
                clips = clips_of(seen[Render.of(each.preprocess)], each.preprocess)
                images = normalise(clips, each.preprocess)
                output = each.student(images, each.objective.active(), taps=each.objective.taps())
                output = output.of_samples(len(index))
                pairs = each.objective.compare(output, _cached(each.recording, index.numpy(), how.device))
                sums += [(name, Fetched(_sums(*pair))) for name, pair in pairs.items()]
    return [_scores(_together(own, how), data) for own in found]


def _cached(recording: Recording, positions: Int64[np.ndarray, " b"], device: torch.device) -> TeacherOutputs:
    return {
        name: {array: values.to(device, non_blocking=True) for array, values in own.items()}
        for name, own in recording.outputs(positions, EVAL_VIEW).items()
    }


def _sums(predicted: Float[Tensor, "b n c"], output: Float[Tensor, "b n c"]) -> Float[Tensor, " _"]:
    """Rows, squared error, squared output, cosine; then the output itself: the sums over all rows."""
    predicted, output = predicted.float().flatten(0, 1), output.float().flatten(0, 1)
    numbers = (
        output.new_full((), len(output)),
        (predicted - output).square().sum(),
        output.square().sum(),
        cosine_rows(predicted, output).sum(),
    )
    return torch.cat([torch.stack(numbers), output.sum(dim=0)])


def _together(sums: Sequence[tuple[str, Fetched]], how: Conditions) -> dict[str, Float64[np.ndarray, " _"]]:
    """Of all batches of all processes, in float64."""
    own: dict[str, Float64[np.ndarray, " _"]] = {}
    for name, fetched in sums:
        own[name] = own.get(name, 0.0) + fetched.read().double().numpy()
    together: dict[str, Float64[np.ndarray, " _"]] = {}
    for process in how.ranks.gather(own):
        for name, values in process.items():
            together[name] = together.get(name, 0.0) + values
    return together


def _scores(sums: Mapping[str, Float64[np.ndarray, " _"]], data: ImageData) -> dict[str, float]:
    found: dict[str, tuple[float, float]] = {}
    for name, values in sums.items():
        (rows, error, squares, cosines), total = values[:_SUMS], values[_SUMS:]
        variation = squares - total @ total / rows
        if not np.isfinite(values).all() or variation <= 0:
            console.warn(
                f"{name} of {data.spec}: predictions are not finite, or outputs are all the same; R2 and cosine are "
                "given as 0 and mean nothing"
            )
            found[name] = 0.0, 0.0
            continue
        found[name] = float(1 - error / variation), float(cosines / rows)
    means = np.mean(list(found.values()), axis=0)
    scores = {"r2": float(means[0]), "cos": float(means[1])}
    scores |= {f"r2/{name}": r2 for name, (r2, _) in found.items()}
    return scores | {f"cos/{name}": cos for name, (_, cos) in found.items()}
