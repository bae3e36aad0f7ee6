"""Flips, transfers and their summaries: closed forms, the paper's tables, and loops written here."""

import math
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from kdcli.errors import BadDataError
from kdcli.metrics import flips as f
from kdcli.metrics.transfer_summary import (
    binned,
    edges,
    mean_of,
    median,
    strength,
    success_rate,
    success_rates,
)


def digits(text: str) -> np.ndarray:
    return np.array([int(character) for character in text])


LABELS, TEACHER, STUDENT, AFTER = map(digits, ("0120120120", "0121100221", "0020121121", "0120120221"))


def test_v7() -> None:
    found = f.flips(TEACHER, STUDENT, LABELS)
    assert (found.teacher_accuracy, found.student_accuracy) == (0.6, 0.7)
    assert ((AFTER == LABELS).mean(), found.rho_pos, found.rho_neg) == (0.8, 0.2, 0.3)
    assert found.delta_acc == pytest.approx(-0.1)
    assert f.knowledge_gain(STUDENT, AFTER, TEACHER, LABELS) == (1.0, 0.2)
    assert f.knowledge_loss(STUDENT, AFTER, LABELS) == (1 / 7, 0.1)


def test_v13() -> None:
    """P3 Table 8's row of XCiT from Table 7, and the success rates of both tables."""
    found = mean_of([0.93, 0.90, 0.36, 0.42, None])
    assert (found.count, found.mean, found.std) == (4, pytest.approx(0.6525), pytest.approx(0.264, abs=5e-4))
    assert success_rate([1.0] * 31 + [0.0]) == 31 / 32


predictions = st.integers(2, 5).flatmap(
    lambda classes: st.integers(1, 40).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)] * 4)
    )
)


@hypothesis.given(predictions)
def test_the_transfer_is_what_a_loop_counts_and_its_delta_that_of_the_flips(rows: Any) -> None:
    before, after, teacher, labels = map(np.array, rows)
    count = dict.fromkeys(("available", "gained", "known", "lost", "both_wrong", "found"), 0)
    for b, a, t, y in zip(*rows, strict=True):
        if b == y:
            count["known"] += 1
            count["lost"] += a != y
        elif t == y:
            count["available"] += 1
            count["gained"] += a == y
        else:
            count["both_wrong"] += 1
            count["found"] += a == y
    found = f.transfer(before, after, teacher, labels)
    assert {name: getattr(found, name) for name in count} == count
    # Delta_transf = -Delta rho_pos + Delta rho_neg, exactly: in counts, with the flips counted anew.
    old, new = f.flips(teacher, before, labels), f.flips(teacher, after, labels)
    assert found.delta_positive == new.positive - old.positive
    assert found.delta_negative == new.negative - old.negative
    change = int((after == labels).sum()) - int((before == labels).sum())
    assert change == -found.delta_positive + found.delta_negative
    assert found.delta_transf * len(labels) == pytest.approx(change)


@hypothesis.given(predictions)
def test_flips_per_class_entropy_and_rates_are_those_of_a_loop(rows: Any) -> None:
    before, after, teacher, labels = map(np.array, rows)
    classes = 5
    wanted = [sum(t == y == c != b for b, _, t, y in zip(*rows, strict=True)) for c in range(classes)]
    counts = f.flips_per_class(teacher, before, labels, classes)
    assert counts.tolist() == wanted
    total = sum(wanted)
    if total:
        parts = torch.tensor(wanted, dtype=torch.float64) / total
        assert f.entropy(counts) == pytest.approx(
            torch.distributions.Categorical(parts).entropy().item(), abs=1e-6
        )
    else:
        assert f.entropy(counts) is None
    rates = f.transfer_rates(before, after, teacher, labels, classes)
    assert list(rates) == [2, 5, 10, 20, 50, 100]
    for percent, rate in rates.items():
        top = _top_by_loop(wanted, [int((labels == c).sum()) for c in range(classes)], percent)
        assert f.top_classes(counts, np.bincount(labels, minlength=classes), percent).tolist() == top
        flipped = [(a == y) for b, a, t, y in zip(*rows, strict=True) if t == y != b and y in top]
        assert rate == (sum(flipped) / len(flipped) if flipped else None)
    assert rates[100] == f.knowledge_gain(before, after, teacher, labels)[0]


def _top_by_loop(flips: list[int], sizes: list[int], percent: int) -> list[int]:
    with_images = [c for c in range(len(flips)) if sizes[c]]
    order = sorted(with_images, key=lambda c: (-Fraction(flips[c], sizes[c]), -flips[c], c))
    top: list[int] = []
    for number in order:
        if not flips[number] or (top and 100 * sum(flips[c] for c in top) >= percent * sum(flips)):
            break
        top.append(number)
    return top


def test_ties_among_classes_are_broken_the_same_way_on_any_machine() -> None:
    counts, sizes = np.array([1, 2, 3, 1, 0, 0]), np.array([3, 6, 9, 10, 4, 0])
    assert f.order_by_flips(counts, sizes).tolist() == [
        2,
        1,
        0,
        3,
        4,
        5,
    ]  # 3/9 = 2/6 = 1/3: the most flips first
    assert f.order_by_flips(np.array([2, 2, 2]), np.array([5, 5, 5])).tolist() == [0, 1, 2]
    assert f.top_classes(np.array([5, 3, 2]), np.array([10, 10, 10]), 50).tolist() == [0]
    assert f.top_classes(np.array([5, 3, 2]), np.array([10, 10, 10]), 51).tolist() == [0, 1]


def test_several_teachers_are_right_where_any_is() -> None:
    found = f.best_of([np.array([0, 1, 2, 2]), np.array([1, 1, 0, 1])], np.array([0, 0, 0, 1]))
    assert found.tolist() == [0, 1, 0, 1]


def test_entropy_of_one_class_and_of_all() -> None:
    assert f.entropy(np.array([0, 7, 0])) == 0.0
    assert f.entropy(np.array([4, 4, 4])) == pytest.approx(math.log(3))


def test_a_random_teacher_of_the_same_accuracy_comes_out_at_the_floor() -> None:
    """By simulation: its errors fall on images at random, wherever the student errs."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 200_000)
    student = np.where(random.random(len(labels)) < 0.7, labels, (labels + 1) % 10)
    teacher = np.where(random.random(len(labels)) < 0.4, labels, (labels + 3) % 10)
    found = f.flips(teacher, student, labels)
    floor = f.floor_of_independence(found.teacher_accuracy, found.student_accuracy)
    assert found.rho_pos == pytest.approx(floor, abs=0.003)
    guess = f.flips(random.integers(0, 10, len(labels)), student, labels)
    assert guess.rho_pos == pytest.approx(f.floor_of_chance(0.7, 10), abs=0.002)


def test_the_mask_is_that_of_data_partitioning() -> None:
    """V6: ties go to the student; then the share of the flips that it gives to the teacher."""
    t = torch.tensor([[2.0, 1, 0], [0, 4, 0], [1, 1, 1], [3, 0, 0]]).double().log_softmax(1)
    s = torch.tensor([[1.0, 2, 0], [0, 3, 0], [1, 1, 1], [0, 0, 5]]).double().log_softmax(1)
    y = torch.tensor([1, 1, 0, 2])
    of_label = [z.gather(1, y[:, None])[:, 0].numpy() for z in (t, s)]
    assert f.given_to_teacher(*of_label).tolist() == [False, True, False, False]
    assert f.given_to_teacher(t.amax(1).numpy(), s.amax(1).numpy()).tolist() == [False, True, False, False]
    mask = np.array([True, False, True, True])
    teacher, student, labels = map(np.array, ([1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]))
    assert f.share_given(mask, teacher, student, labels) == (0.5, 1.0)
    assert f.share_given(mask, labels, labels, labels) == (None, None)


def test_similarity_of_the_top_classes_relative_to_all() -> None:
    matrix = np.array([[9.0, 0.8, 0.2], [0.8, 9, 0.2], [0.2, 0.2, 9]])
    everyone = np.arange(3)
    assert f.similarity_gain(matrix, np.array([0, 1]), everyone) == pytest.approx(0.8 / 0.4 - 1)
    assert f.similarity_gain(matrix, np.array([0]), everyone) is None
    assert f.similarity_gain(-matrix, np.array([0, 1]), everyone) is None


@pytest.mark.parametrize(
    ("teacher", "student", "labels", "words"),
    [
        ([], [], [], "no image to compare on"),
        ([0, 1, 1], [0, 1], [0, 1], "3 predictions for 2 labelled images"),
        ([0, 1], [0, 1], [0, -1], "1 of 2 images have no label"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    teacher: list[int], student: list[int], labels: list[int], words: str
) -> None:
    with pytest.raises(BadDataError, match=words):
        f.flips(*(np.array(each, np.int64) for each in (teacher, student, labels)))


def test_a_log_probability_that_is_nan_is_refused() -> None:
    with pytest.raises(BadDataError, match="1 of 2 log-probabilities of the student are NaN"):
        f.given_to_teacher(np.array([-1.0, -2]), np.array([-1.0, np.nan]))


# --- many transfers ---------------------------------------------------------------------------


def test_success_is_strictly_above_zero_and_the_median_over_students() -> None:
    assert success_rate([0.0, 1e-9, -1, 2]) == 0.5
    rates = success_rates(list("aabbbc"), [1, -1, 1, 1, -1, -1])
    assert rates == {"a": 0.5, "b": 2 / 3, "c": 0.0}
    assert median(rates.values()) == 0.5
    assert median([0.0, 1.0]) == 0.5


def test_bins_are_of_equal_width_and_report_the_mean_of_their_best_quarter() -> None:
    differences = [-1.0, -0.9, -0.8, -0.7, -0.6, 0.0, 0.5, 1.0]
    deltas = [1.0, 5, 3, 2, 4, -7, 6, 8]
    at = edges(differences, 4)
    assert at.tolist() == [-1, -0.5, 0, 0.5, 1]
    found = binned(differences, deltas, at)
    assert [each.count for each in found] == [5, 0, 1, 2]
    assert [each.top_mean for each in found] == [4.5, None, -7, 8]  # ceil(5 / 4) = 2 of the first five
    assert sum(each.count for each in binned([0.2, 0.2], [1, 2], edges([0.2, 0.2], 5))) == 2


def test_strength_counts_the_threshold_as_equal() -> None:
    assert [strength(delta) for delta in (-0.011, -0.01, 0.62 - 0.61, 0.011)] == [
        "weaker", "equal", "equal", "stronger",
    ]  # fmt: skip


def test_a_mean_of_nothing_is_none() -> None:
    assert mean_of([None]).mean is None
