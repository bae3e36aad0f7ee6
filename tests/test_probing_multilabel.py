"""Probes of images with several labels: mean average precision."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from kdcli.data.multilabel import split_labels
from kdcli.errors import BadDataError
from kdcli.metrics.average_precision import average_precisions
from kdcli.probing.multilabel import (
    _Exact,
    check_labels,
    multi_label_draws,
    random_draws,
)
from kdcli.probing.protocols import Drawn
from kdcli.probing.solver import Linear


def test_labels_are_read_from_class_names() -> None:
    names, table = split_labels(("cat|dog", "cow", "dog | cow", "|"), "|")
    assert names == ("cat", "cow", "dog")
    assert table.astype(int).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]]
    with pytest.raises(BadDataError, match="label 'ant' of --test has no training image"):
        split_labels(("ant|cat",), "|", names)


def test_average_precision_is_that_of_the_ranking() -> None:
    # Ranked right, wrong, right: (1/1 + 2/3) / 2.
    found = average_precisions(np.array([[1], [0], [1]], bool), np.array([[3.0], [2.0], [1.0]]))
    assert found == pytest.approx([5 / 6])
    assert np.isnan(average_precisions(np.ones((2, 1), bool), np.zeros((2, 1))))[0]


def test_draws_are_random_images_as_many_as_shots_times_labels() -> None:
    labels = np.zeros((40, 3), bool)
    draws = random_draws(labels, 4, 5, 0)
    assert draws.shape == (5, 12)
    assert all(len(set(rows)) == 12 for rows in draws.tolist())
    assert random_draws(labels, 99, 1, 0).shape == (1, 40)
    assert np.array_equal(draws[:2], random_draws(labels, 4, 2, 0))


def problem() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4, 30))
    labels, test_labels = rng.random((60, 4)) < 0.4, rng.random((90, 4)) < 0.4
    train = labels @ directions + rng.normal(size=(60, 30))
    return train, labels, test_labels @ directions + rng.normal(size=(90, 30)), test_labels


def test_a_fixed_c_equals_one_vs_rest_of_scikit_learn() -> None:
    train, labels, test, test_labels = problem()
    (ours,) = multi_label_draws(
        Drawn(train, labels, np.arange(60)[None], test, test_labels), Linear(grid=(0.1,)), 20
    )
    scaler = StandardScaler().fit(train)
    oracle = OneVsRestClassifier(LinearSVC(C=0.1, dual=False, tol=1e-8)).fit(scaler.transform(train), labels)
    scores = oracle.decision_function(scaler.transform(test))
    assert ours.precisions.mean() == pytest.approx(
        average_precision_score(test_labels, scores, average="macro"), abs=1e-3
    )
    assert ours.precisions.mean() > 0.7  # chance is 0.4


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("columns", [30, 200])
def test_the_exact_solver_reaches_liblinears_optimum(c: float, columns: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.random((60, 4)) < 0.4
    train = labels @ rng.normal(size=(4, columns)) + rng.normal(size=(60, columns))
    test_labels = np.eye(4, dtype=bool)
    ((ours, intercepts),) = _Exact("cpu").path(train, labels, (c,))
    oracle = LinearSVC(C=c, dual=True, tol=1e-10, max_iter=10**6, random_state=0)
    for label in range(4):
        oracle.fit(train, labels[:, label])
        np.testing.assert_allclose(ours[label], oracle.coef_[0], atol=1e-6)
        assert intercepts[label] == pytest.approx(oracle.intercept_[0], abs=1e-6)
    draws, test = np.arange(60)[None], rng.normal(size=(4, columns))
    found = [
        next(multi_label_draws(Drawn(train, labels, draws, test, test_labels), how, 20))
        for how in (Linear(grid=(0.01, c, 1.0)), Linear(grid=(0.01, c, 1.0), method="sklearn"))
    ]
    assert found[0].c == found[1].c
    np.testing.assert_array_equal(found[0].precisions, found[1].precisions)
    assert (found[0].fits, found[0].unconverged) == (found[1].fits, 0)


def test_the_path_warm_starts_and_leaves_out_what_cannot_be_learned() -> None:
    train, labels, *_ = problem()
    labels[:, 0], labels[:, 3] = True, False
    path, grid = _Exact("cpu"), (0.01, 0.1, 1.0)
    for (weights, intercepts), c in zip(path.path(train, labels, grid), grid, strict=True):
        ((alone, _),) = _Exact("cpu").path(train, labels, (c,))
        np.testing.assert_allclose(weights, alone, atol=1e-9)
        assert not weights[[0, 3]].any()
        assert not intercepts[[0, 3]].any()
    assert path.fits == 6
    for weights, intercepts in path.path(train, labels[:, [0, 3]], grid):
        assert not weights.any()
        assert not intercepts.any()


@pytest.mark.parametrize("protocol", ["svm", "logistic", "knn"])
def test_all_protocols_are_far_better_than_chance(protocol: Any) -> None:
    train, labels, test, test_labels = problem()
    draws = random_draws(labels, 10, 2, 0)
    how = None if protocol == "knn" else Linear(protocol, (0.01, 1.0))
    for draw in multi_label_draws(Drawn(train, labels, draws, test, test_labels), how, 10):
        assert draw.precisions.mean() > 0.55
        assert draw.c in ((None,) if protocol == "knn" else (0.01, 1.0))


def test_a_label_that_no_training_image_has_ranks_nothing_and_breaks_nothing() -> None:
    train, labels, test, test_labels = problem()
    labels[:, 2] = False
    (ours,) = multi_label_draws(
        Drawn(train, labels, np.arange(60)[None], test, test_labels), Linear(grid=(0.1,)), 20
    )
    assert ours.precisions[2] == pytest.approx(test_labels[:, 2].mean())  # all scores are equal


def test_labels_that_nothing_can_be_learned_from_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    some = np.array([[1, 0], [0, 0]], bool)
    check_labels(some, some, ("a", "b"))
    assert "1 of 2 labels are on all training images, or on none" in capsys.readouterr().err
    with pytest.raises(BadDataError, match="each of the 2 labels is on all test images"):
        check_labels(some, np.ones((3, 2), bool), ("a", "b"))
    with pytest.raises(BadDataError, match="no image has a label"):
        check_labels(np.zeros((3, 0), bool), np.zeros((3, 0), bool), ())
