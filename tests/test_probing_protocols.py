"""Few-shot draws and the protocol around the solver."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from kdcli.errors import BadDataError
from kdcli.probing.protocols import Drawn, few_shot_accuracies, report_convergence, report_edge, shot_draws
from kdcli.probing.solver import C_GRID, Linear


@given(st.lists(st.integers(2, 9), min_size=2, max_size=6), st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_each_draw_has_the_shots_of_each_class_or_all_it_has(sizes: list[int], shots: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = np.concatenate([[-1, -1], labels])
    draws = shot_draws(labels, shots, 4, seed)
    for rows in draws:
        assert len(set(rows.tolist())) == len(rows)
        assert np.bincount(labels[rows]).tolist() == [min(size, shots) for size in sizes]
        assert (np.diff(labels[rows]) >= 0).all()
    assert np.array_equal(draws[:2], shot_draws(labels, shots, 2, seed))


def test_draws_differ_and_depend_on_the_seed() -> None:
    labels = np.arange(100) % 4
    draws = shot_draws(labels, 5, 10, 0)
    assert len({tuple(sorted(rows)) for rows in draws.tolist()}) == 10
    assert not np.array_equal(draws, shot_draws(labels, 5, 10, 1))


def test_draws_are_the_same_on_every_machine() -> None:
    assert shot_draws(np.arange(20) % 2, 2, 2, 0).tolist() == [[16, 0, 9, 3], [6, 10, 11, 9]]


def test_small_classes_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    shot_draws(np.repeat([0, 1, 2], [9, 3, 2]), 5, 50, 0, ("ant", "bee", "cow"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: 2 of 3 classes have fewer than 5 images and use all they have (class 'bee' has 3)"
    ]


def test_a_single_class_or_image_or_no_label_is_refused() -> None:
    with pytest.raises(BadDataError, match="class 'bee' has 1 image"):
        shot_draws(np.array([0, 0, 1]), 1, 1, 0, ("ant", "bee"))
    with pytest.raises(BadDataError, match="of one class"):
        shot_draws(np.zeros(9, np.int64), 5, 1, 0)
    with pytest.raises(BadDataError, match="none of the images has a label"):
        shot_draws(np.full(9, -1), 5, 1, 0)


def problem(dtype: Any) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 80))
    labels, test_labels = np.arange(60) % 4, np.arange(90) % 4
    scale = rng.uniform(0.01, 100, 80)
    train = ((centres[labels] + 2 * rng.normal(size=(60, 80))) * scale + 7).astype(dtype)
    test = ((centres[test_labels] + 2 * rng.normal(size=(90, 80))) * scale + 7).astype(dtype)
    train[:, 5] = 3  # a column that the shots do not vary in
    return train, labels, test, test_labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shots", [2, 5])
def test_equals_grid_search_on_standardised_shots(dtype: Any, shots: int) -> None:
    train, labels, test, test_labels = problem(dtype)
    draws = shot_draws(labels, shots, 4, 0)
    results = list(few_shot_accuracies(Drawn(train, labels, draws, test, test_labels)))
    for rows, result in zip(draws, results, strict=True):
        scaler = StandardScaler().fit(train[rows].astype(np.float64))
        search = GridSearchCV(
            LinearSVC(dual=True, tol=1e-6, max_iter=10_000, random_state=0),
            {"C": list(C_GRID)},
            cv=StratifiedKFold(min(5, shots), shuffle=True, random_state=0),
        ).fit(scaler.transform(train[rows].astype(np.float64)), labels[rows])
        expected = (search.predict(scaler.transform(test.astype(np.float64))) == test_labels).mean()
        assert (result.c, result.accuracy) == (search.best_params_["C"], expected)


def test_one_shot_takes_c_1_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    train, labels, test, test_labels = problem(np.float32)
    results = list(few_shot_accuracies(Drawn(train, labels, shot_draws(labels, 1, 3, 0), test, test_labels)))
    assert [(result.c, result.fits) for result in results] == [(1.0, 1)] * 3
    assert capsys.readouterr().err.count("C = 1, no cross-validation") == 1


def test_one_shot_takes_the_only_c_of_a_grid_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    train, labels, test, test_labels = problem(np.float32)
    draws = shot_draws(labels, 1, 3, 0)
    results = list(few_shot_accuracies(Drawn(train, labels, draws, test, test_labels), Linear(grid=(0.3,))))
    assert [(result.c, result.fits) for result in results] == [(0.3, 1)] * 3
    assert capsys.readouterr().err == ""


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    train, labels, test, test_labels = problem(np.float64)
    draws = shot_draws(labels, 5, 3, 0)
    expected = [r.accuracy for r in few_shot_accuracies(Drawn(train, labels, draws, test, test_labels))]
    found = few_shot_accuracies(Drawn(train * 8 - 1, labels, draws, test * 8 - 1, test_labels))
    assert [result.accuracy for result in found] == expected


def test_fits_that_stopped_early_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    report_convergence(42, 3)
    assert "3 of 42 fits stopped before they converged" in capsys.readouterr().err
    report_convergence(21, 0)
    assert capsys.readouterr().err == ""


def test_a_grid_that_ends_where_the_best_c_lies_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report_edge("a, cars", [0.01, 0.01, 0.1], C_GRID)
    assert capsys.readouterr().err.endswith(
        "a, cars: 2 of 3 draws chose the smallest C, 0.01; a longer grid may do better: "
        "--c-grid 0.0001,0.001,0.01,0.1,1,10\n"
    )
    report_edge("a, cars", [10.0, 10.0, 1.0], C_GRID)
    assert capsys.readouterr().err.endswith(
        "2 of 3 draws chose the largest C, 10; a longer grid may do better: --c-grid 0.01,0.1,1,10,100,1000\n"
    )
    for chosen, grid in (
        ([0.01, 0.1], C_GRID),
        ([10.0, 0.01, 1.0, 1.0], C_GRID),
        ([1.0, 1.0], (1.0,)),
        ([], C_GRID),
    ):
        report_edge("a, cars", chosen, grid)
    assert capsys.readouterr().err == ""
