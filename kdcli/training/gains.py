"""What each stage of a sequence gave and took (P3 Fig. 11), on test data: teachers from caches, students run once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError
from kdcli.metrics.flips import knowledge_gain, knowledge_loss
from kdcli.models.spec import open_model
from kdcli.models.student import LABEL_HEAD, Student
from kdcli.options.resolving import spelled
from kdcli.runtime import stop_signals, worker_count
from kdcli.training.classes import Classes
from kdcli.training.evaluate import Conditions, Examinee, heads_to_test, predictions
from kdcli.training.plan import Plan
from kdcli.training.student import build_student
from kdcli.training.transfers import forked_random

_ROWS_AT_ONCE = 65_536


def cached_predictions(
    cache: CacheSet, teacher: TeacherRecord, rows: Int64[np.ndarray, " n"], classes: Classes
) -> Int64[np.ndarray, " n"] | None:
    """The class that a teacher's cached logits of view 0 give each row; None where it does not know the classes.

    Args:
        cache: keeps the array of :func:`predicting_array`.
        teacher: in it.
        rows: that are written.
        classes: in whose numbering the predictions are.
    """
    known = classes.of_teacher(teacher)
    if known is None:
        return None
    found, array = np.empty(len(rows), np.int64), predicting_array(teacher)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        theirs = cache.gather(teacher.name, array, rows[start : start + _ROWS_AT_ONCE], 0)
        best = theirs.argmax(axis=1) if array == "logits" else theirs[:, 0].astype(np.int64)
        found[start : start + len(theirs)] = known[best]
    return found


def predicting_array(teacher: TeacherRecord) -> str:
    """The cached array that tells which class a teacher predicts; the logits where nothing does."""
    largest_only = teacher.output_of("logits") is None and teacher.output_of("topk_ids") is not None
    return "topk_ids" if largest_only else "logits"


def teachers_on_test(
    plan: Plan, teachers: Mapping[str, TeacherRecord], caches: Sequence[CacheSet]
) -> dict[str, Int64[np.ndarray, " n"]]:
    """Predictions of the teachers on the test data, from whichever cache holds all of it; the others are warned of.

    Args:
        plan: of a stage.
        teachers: by name, as the training's cache records them.
        caches: each looked into by itself.
    """
    if plan.test is None or not _testable(plan):
        return {}
    found = {}
    for cache in caches:
        try:
            rows = cache.rows_of(
                plan.test
            )  # by content: a folder's training and test images may have equal names
        except (CacheMissingError, IdentityError):  # a cache of other images, such as the training's
            continue
        for name, teacher in teachers.items():
            if name not in found and _holds(cache, teacher, rows):
                predicted = cached_predictions(cache, cache.teacher(name), rows, plan.classes)
                if predicted is not None:
                    found[name] = predicted
    missing = [teacher for name, teacher in teachers.items() if name not in found]
    if missing:
        _say_missing(plan.test, missing)
    return found


def _holds(cache: CacheSet, teacher: TeacherRecord, rows: Int64[np.ndarray, " n"]) -> bool:
    known = cache.teachers.get(teacher.name)
    if known is None or known.weights != teacher.weights:
        return False
    try:
        reads = {teacher.name: (predicting_array(known),)}
        return bool(cache.require(reads, rows, [0], allow_partial=None).all())
    except CacheMissingError:
        return False


def _say_missing(test: ImageData, missing: Sequence[TeacherRecord]) -> None:
    specs = tuple(f"{teacher.name}={teacher.spec}" for teacher in missing)
    command = spelled("cache-teachers", test.location, cache="test.kd", teacher=specs, keep="logits")
    console.warn(
        f"no --cache holds what {', '.join(teacher.name for teacher in missing)} say about the test data, so "
        f"the knowledge gain is not measured; for that: {command}, then add --cache test.kd"
    )


def _testable(plan: Plan) -> bool:
    """Whether the student's own classifier, which is what is handed on, is what the test judges."""
    return any(head == LABEL_HEAD for _, head, _, _ in heads_to_test(plan))


def measure_stages(
    plan: Plan,
    names: Sequence[str],
    exports: Sequence[Path],
    teachers: Mapping[str, Int64[np.ndarray, " n"]],
) -> dict[str, Any]:
    """Run the original student and that of every stage on the test data, and compare.

    Args:
        plan: of the first stage: its start is the original student.
        names: of the teachers, by stage.
        exports: the student of each stage.
        teachers: their predictions, where known.

    Returns:
        ``original``: top-1 of the original student; ``stages``: see :func:`compare_stages`.

    Raises:
        StoppedEarly: a signal arrived.
    """
    tests = [found for found in heads_to_test(plan) if found[1] == LABEL_HEAD]
    if not tests:
        return {
            "original": None,
            "stages": [{"stage": number, "teacher": name} for number, name in enumerate(names, 1)],
        }
    _, _, test, labels = tests[0]
    device = torch.device(plan.device)
    examinees = []
    with forked_random(device), stop_signals() as stop:
        built = build_student(plan)
        opened = [(built.student, built.model.preprocess)]
        for export in exports:
            model = open_model(f"local-dir:{export}")
            opened.append((Student(model, {}), model.preprocess))
        for student, preprocess in opened:
            examinees.append(Examinee(student.to(device), LABEL_HEAD, labels, preprocess))
        how = Conditions(device, plan.settings.batch_size, worker_count(plan.config.workers), stop)
        before, *after = predictions(examinees, test, how)
    return compare_stages(labels, before, dict(zip(names, after, strict=True)), teachers)


def compare_stages(
    labels: Int64[np.ndarray, " n"],
    original: Int64[np.ndarray, " n"],
    students: Mapping[str, Int64[np.ndarray, " n"]],
    teachers: Mapping[str, Int64[np.ndarray, " n"]],
) -> dict[str, Any]:
    """What each stage gave and took, against the student before all stages and against the one before it.

    Args:
        labels: true classes.
        original: predictions of the student before all stages.
        students: of each stage's student, by the name of its teacher, in their order.
        teachers: of the teachers that are known.

    Returns:
        ``original``: its top-1; ``stages``: top-1, its change, gain and loss, each also against the stage before
        (``..._previous``), as fractions. Gain is None without the teacher's predictions, and without flips.
    """
    first = _top1(original, labels)
    before, stages = original, []
    for number, (name, now) in enumerate(students.items(), 1):
        teacher = teachers.get(name)
        stages.append(
            {
                "stage": number,
                "teacher": name,
                "teacher_top1": None if teacher is None else _top1(teacher, labels),
                "top1": _top1(now, labels),
                "delta": _top1(now, labels) - first,
                "delta_previous": _top1(now, labels) - _top1(before, labels),
                "gain": None if teacher is None else knowledge_gain(original, now, teacher, labels)[0],
                "gain_previous": None if teacher is None else knowledge_gain(before, now, teacher, labels)[0],
                "loss": knowledge_loss(original, now, labels)[0],
                "loss_previous": knowledge_loss(before, now, labels)[0],
            }
        )
        before = now
    return {"original": {"top1": first}, "stages": stages}


def _top1(predicted: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"]) -> float:
    return float((predicted == labels).mean())
