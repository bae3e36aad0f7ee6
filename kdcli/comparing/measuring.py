"""From predictions to a result: pairs, transfers and their summaries (P3 sections 3 and 5.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from kdcli.comparing.answers import Answers, Images
from kdcli.comparing.models import Link
from kdcli.comparing.result import (
    Change,
    Given,
    GivenToTeacher,
    Group,
    MethodSummary,
    ModelFacts,
    Pair,
    StudentGroup,
    TopClasses,
)
from kdcli.comparing.similarity import ClassSimilarity
from kdcli.metrics.flips import (
    TOP_SHARES,
    best_of,
    entropy,
    flips,
    flips_per_class,
    floor_of_chance,
    floor_of_independence,
    given_to_teacher,
    share_given,
    similarity_gain,
    top_classes,
    transfer,
    transfer_rates,
)
from kdcli.metrics.transfer_summary import (
    STRENGTHS,
    binned,
    edges,
    grouped,
    mean_of,
    median,
    strength,
    success_rate,
    success_rates,
)


def pair_of(
    teacher: str,
    student: str,
    answers: Mapping[str, Answers],
    images: Images,
    similarity: ClassSimilarity | None,
) -> Pair:
    """Measure one teacher against one student."""
    labels, classes = images.labels, images.present
    ours, theirs = answers[teacher], answers[student]
    found = flips(ours.predicted, theirs.predicted, labels)
    counts = flips_per_class(ours.predicted, theirs.predicted, labels, classes)
    sizes = np.bincount(labels, minlength=classes)
    given = _given(ours, theirs, ours.label_logp, theirs.label_logp, labels)
    certain = _given(ours, theirs, ours.top_logp, theirs.top_logp, labels)
    assert certain is not None  # the largest log-probability is always kept
    return Pair(
        teacher=teacher,
        student=student,
        delta_acc=found.delta_acc,
        rho_pos=found.rho_pos,
        rho_neg=found.rho_neg,
        positive=found.positive,
        negative=found.negative,
        chance_rho_pos=floor_of_chance(found.student_accuracy, len(images.names)),
        independent_rho_pos=floor_of_independence(found.teacher_accuracy, found.student_accuracy),
        entropy=entropy(counts),
        per_class=tuple(counts.tolist()),
        top=tuple(_top(percent, counts, sizes, images, similarity) for percent in TOP_SHARES),
        given_to_teacher=GivenToTeacher(given, certain),
    )


def _top(
    percent: int,
    counts: Int64[np.ndarray, " c"],
    sizes: Int64[np.ndarray, " c"],
    images: Images,
    similarity: ClassSimilarity | None,
) -> TopClasses:
    top = top_classes(counts, sizes, percent)
    closer = None if similarity is None else similarity_gain(similarity.matrix, top, np.flatnonzero(sizes))
    return TopClasses(percent, tuple(images.names[number] for number in top), closer)


def _given(
    ours: Answers,
    theirs: Answers,
    teacher: np.ndarray | None,
    student: np.ndarray | None,
    labels: Int64[np.ndarray, " n"],
) -> Given | None:
    if teacher is None or student is None:
        return None
    mask = given_to_teacher(teacher, student)
    return Given(*share_given(mask, ours.predicted, theirs.predicted, labels))


# --- transfers --------------------------------------------------------------------------------


def changes_of(
    links: Sequence[Link], answers: Mapping[str, Answers], images: Images, equal_within: float
) -> tuple[Change, ...]:
    """Measure every transfer; stages of a sequence against the student before the first one (trap T10).

    Args:
        links: the transfers; a stage comes after the one that it goes on from.
        answers: of all models.
        images: of the comparison.
        equal_within: see :func:`kdcli.metrics.transfer_summary.strength`.
    """
    first: dict[str, tuple[str, tuple[str, ...], int]] = {}  # after -> student, teachers so far, stage
    found = []
    for link in links:
        student, teachers, stage = first.get(link.student, (link.student, (), 0))
        teachers = tuple(dict.fromkeys((*teachers, *link.teachers)))
        first[link.after] = student, teachers, stage + 1
        stages = replace(link, student=student, teachers=teachers)  # all up to this one, as one transfer
        found.append(
            replace(_change(stages, answers, images, equal_within), origin=link.student, stage=stage + 1)
        )
    return tuple(found)


def _change(link: Link, answers: Mapping[str, Answers], images: Images, equal_within: float) -> Change:
    labels, before, after = images.labels, answers[link.student].predicted, answers[link.after].predicted
    taught = [answers[name].predicted for name in link.teachers]
    # Without a teacher there is no complementary knowledge: the student itself has none for itself.
    teacher = best_of(taught, labels) if len(taught) > 1 else taught[0] if taught else before
    delta_acc = None
    if taught:
        best = max(int((each == labels).sum()) for each in taught)
        delta_acc = (best - int((before == labels).sum())) / len(labels)
    counts = transfer(before, after, teacher, labels)
    return Change(
        method=link.method,
        teachers=link.teachers,
        student=link.student,
        origin=link.student,
        after=link.after,
        stage=1,
        delta_acc=delta_acc,
        strength=None if delta_acc is None else strength(delta_acc, equal_within),
        delta_transf=counts.delta_transf,
        delta_rho_pos=counts.delta_rho_pos,
        delta_rho_neg=counts.delta_rho_neg,
        gain=counts.gain,
        gain_per_image=counts.gained / counts.images,
        loss=counts.loss,
        loss_per_image=counts.lost / counts.images,
        both_wrong_now_right=counts.found_share,
        both_wrong_now_right_per_image=counts.found / counts.images,
        counts=counts,
        transfer_rate=transfer_rates(before, after, teacher, labels, images.present),
    )


# --- summaries --------------------------------------------------------------------------------


def summaries(
    changes: Sequence[Change], models: Mapping[str, ModelFacts], bins: int
) -> tuple[MethodSummary, ...]:
    """One summary a method, over the transfers into students as they were before any other.

    Bins of Delta_acc have the same edges for all methods.
    """
    alone = [change for change in changes if change.stage == 1]
    differences = [change.delta_acc for change in alone if change.delta_acc is not None]
    at = edges(differences, bins) if differences else None
    return tuple(
        _summary(method, own, models, at) for method, own in grouped(alone, lambda each: each.method).items()
    )


def _summary(
    method: str, own: Sequence[Change], models: Mapping[str, ModelFacts], at: np.ndarray | None
) -> MethodSummary:
    taught = [(each.delta_acc, each.delta_transf) for each in own if each.delta_acc is not None]
    by_student = grouped(own, lambda each: each.student)
    by_strength = grouped((each for each in own if each.strength), lambda each: str(each.strength))
    by_family = grouped(own, lambda each: models[each.student].family)
    rates = success_rates([each.student for each in own], [each.delta_transf for each in own])
    return MethodSummary(
        method=method,
        success_rate_median=median(rates.values()),
        whole=_group(own),
        by_strength={name: _group(by_strength[name]) for name in STRENGTHS if name in by_strength},
        bins=binned([a for a, _ in taught], [t for _, t in taught], at) if taught and at is not None else (),
        by_family={models[each[0].student].family: _group(each) for each in by_family.values()},
        by_student=tuple(
            StudentGroup(name, model.family, model.parameters, model.accuracy, _group(by_student[name]))
            for name, model in sorted(models.items(), key=lambda item: (item[1].parameters or 0, item[0]))
            if name in by_student
        ),
    )


def _group(changes: Sequence[Change]) -> Group:
    taught = [each for each in changes if each.teachers]
    return Group(
        success_rate=success_rate([each.delta_transf for each in changes]),
        delta_transf=mean_of(each.delta_transf for each in changes),
        delta_rho_pos=mean_of(each.delta_rho_pos for each in taught),
        delta_rho_neg=mean_of(each.delta_rho_neg for each in taught),
        gain=mean_of(each.gain for each in changes),
        loss=mean_of(each.loss for each in changes),
        rates={percent: mean_of(each.transfer_rate[percent] for each in changes) for percent in TOP_SHARES},
    )
