"""Logistic regression and neighbours as probes, against scikit-learn's own search and classifier."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from kdcli.probing.neighbours import Neighbours, one_hot
from kdcli.probing.protocols import Drawn, few_shot_accuracies, neighbour_accuracies, shot_draws
from kdcli.probing.solver import C_GRID, Linear


def problem(classes: int, columns: int) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(columns)
    centres = rng.normal(size=(classes, columns))
    labels, test_labels = np.arange(48) % classes, np.arange(80) % classes
    train = centres[labels] + 1.5 * rng.normal(size=(48, columns))
    test = centres[test_labels] + 1.5 * rng.normal(size=(80, columns))
    return train.astype(np.float32), labels, test.astype(np.float32), test_labels


@pytest.mark.parametrize(("classes", "columns"), [(4, 60), (2, 60), (4, 6)])
def test_logistic_equals_grid_search_on_standardised_images(classes: int, columns: int) -> None:
    train, labels, test, test_labels = problem(classes, columns)
    everything = np.arange(len(labels))[None]
    (ours,) = few_shot_accuracies(Drawn(train, labels, everything, test, test_labels), Linear("logistic"))
    scaler = StandardScaler().fit(train.astype(np.float64))
    search = GridSearchCV(
        LogisticRegression(max_iter=5000, tol=1e-8),
        {"C": list(C_GRID)},
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
    ).fit(scaler.transform(train.astype(np.float64)), labels)
    predicted = search.predict(scaler.transform(test.astype(np.float64)))
    assert ours.c == search.best_params_["C"]
    # lbfgs stops at its own tolerance: at most an image may change sides.
    assert ours.accuracy == pytest.approx((predicted == test_labels).mean(), abs=1.01 / len(test))
    assert ours.unconverged == 0


def test_neighbours_equal_scikit_learns_on_the_unit_sphere() -> None:
    train, labels, test, test_labels = problem(4, 20)

    def weights(distances: Any) -> Any:
        return np.exp((1 - distances**2 / 2) / 0.07)  # |a - b|^2 = 2 - 2 cos

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)

    oracle = KNeighborsClassifier(7, weights=weights).fit(unit(train), labels)
    (ours,) = neighbour_accuracies(Drawn(train, labels, np.arange(48)[None], test, test_labels), 7)
    assert ours.accuracy == (oracle.predict(unit(test)) == test_labels).mean()
    _, targets = one_hot(labels)
    votes = Neighbours(train.astype(np.float64), targets, 7).votes(test.astype(np.float64))
    assert votes == pytest.approx(oracle.predict_proba(unit(test)))


def test_neighbours_ignore_the_scale_of_an_image_and_take_all_where_there_are_fewer() -> None:
    train, labels, test, test_labels = problem(4, 20)
    draws = shot_draws(labels, 2, 3, 0)
    expected = [
        draw.accuracy for draw in neighbour_accuracies(Drawn(train, labels, draws, test, test_labels), 20)
    ]
    scaled = [
        draw.accuracy for draw in neighbour_accuracies(Drawn(train, labels, draws, test * 9, test_labels), 8)
    ]
    assert scaled == expected


def test_an_image_of_zeros_has_votes_and_no_nan() -> None:
    _, targets = one_hot(np.array([0, 0, 1]))
    votes = Neighbours(np.array([[0.0, 0], [1, 0], [0, 1]]), targets, 3).votes(np.zeros((1, 2)))
    assert votes == pytest.approx(np.array([[2 / 3, 1 / 3]]))


def test_constant_columns_change_nothing() -> None:
    train, labels, test, test_labels = problem(4, 20)
    draws = shot_draws(labels, 5, 2, 0)
    wider = [np.hstack([rows, np.full((len(rows), 3), 7, np.float32)]) for rows in (train, test)]
    for kind in ("svm", "logistic"):
        how = Linear(kind)  # type: ignore[arg-type]
        data = Drawn(train, labels, draws, test, test_labels)
        expected = [d.accuracy for d in few_shot_accuracies(data, how)]
        found = few_shot_accuracies(replace(data, train=wider[0], test=wider[1]), how)
        assert [draw.accuracy for draw in found] == expected
