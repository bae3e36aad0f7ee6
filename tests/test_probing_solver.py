"""The solver against scikit-learn: the fact sheet's vector V9, and exactness of working in n columns."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import LinearSVC

from kdcli.probing import solver
from kdcli.probing.solver import C_GRID, Linear, Method, fit


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    features, labels = load_digits(return_X_y=True)
    return features / 16, labels


def v9_shots(labels: Any, seed: int) -> Any:
    random = np.random.RandomState(seed)  # the vector is defined by it
    return np.concatenate([random.permutation(np.flatnonzero(labels[:1000] == c))[:5] for c in range(10)])


def wide_problem(seed: int, classes: int = 4, d: int = 120) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 5)
    return rng.normal(size=(classes, d))[labels] * 0.4 + rng.normal(size=(5 * classes, d)), labels


both_solvers = pytest.mark.parametrize("method", ["exact", "sklearn"])


@both_solvers
def test_vector_v9_at_each_c(digits: tuple[Any, Any], method: Method) -> None:
    features, labels = digits
    rows = v9_shots(labels, 0)
    accuracies = [
        (
            fit(features[rows], labels[rows], Linear(grid=(c,), folds=1, method=method)).predict(
                features[1000:]
            )
            == labels[1000:]
        ).mean()
        for c in C_GRID
    ]
    assert accuracies == pytest.approx([0.810540, 0.853199, 0.858218, 0.848181], abs=1e-6)


@both_solvers
def test_vector_v9_with_cross_validation(digits: tuple[Any, Any], method: Method) -> None:
    features, labels = digits
    accuracies = []
    for seed in range(10):
        rows = v9_shots(labels, seed)
        classifier = fit(features[rows], labels[rows], Linear(grid=C_GRID, folds=5, method=method))
        accuracies.append((classifier.predict(features[1000:]) == labels[1000:]).mean())
    assert np.mean(accuracies) == pytest.approx(0.838394, abs=1e-6)
    assert np.std(accuracies) == pytest.approx(0.019750, abs=1e-6)


@both_solvers
@pytest.mark.parametrize("c", C_GRID)
@pytest.mark.parametrize("classes", [2, 4])
def test_gives_the_solution_in_d_columns(c: float, classes: int, method: Method) -> None:
    shots, labels = wide_problem(classes, classes)
    ours = fit(shots, labels, Linear(grid=(c,), folds=1, method=method))
    theirs = LinearSVC(C=c, dual=True, tol=1e-10, max_iter=10**6, random_state=0).fit(shots, labels)
    expected, intercepts = theirs.coef_, theirs.intercept_
    if classes == 2:
        expected, intercepts = np.vstack([-expected, expected]), np.hstack([-intercepts, intercepts])
    assert ours.coefficients == pytest.approx(expected, abs=1e-6)
    assert ours.intercepts == pytest.approx(intercepts, abs=1e-6)
    test = np.random.default_rng(9).normal(size=(200, shots.shape[1]))
    assert np.array_equal(ours.predict(test), theirs.predict(test))


@both_solvers
@pytest.mark.parametrize("seed", range(3))
def test_chooses_the_c_of_grid_search(seed: int, method: Method) -> None:
    shots, labels = wide_problem(seed, classes=5)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = LinearSVC(dual=True, tol=1e-6, max_iter=10_000, random_state=0)
    search = GridSearchCV(model, {"C": list(C_GRID)}, cv=folds).fit(shots, labels)
    assert fit(shots, labels, Linear(grid=C_GRID, folds=5, method=method)).c == search.best_params_["C"]


@both_solvers
def test_more_shots_than_columns(method: Method) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    shots = rng.normal(size=(3, 6))[labels] + rng.normal(size=(90, 6))
    theirs = LinearSVC(C=1, dual=False, tol=1e-10, max_iter=10**6).fit(shots, labels)
    assert fit(shots, labels, Linear(grid=(1.0,), folds=1, method=method)).coefficients == pytest.approx(
        theirs.coef_, abs=1e-4
    )


@both_solvers
def test_equally_accurate_c_gives_the_smallest_in_any_order_of_the_grid(method: Method) -> None:
    labels = np.repeat([0, 1], 5)
    shots = np.eye(2)[labels] * 100
    assert fit(shots, labels, Linear(grid=(10.0, 0.1, 1.0), folds=5, method=method)).c == 0.1


@both_solvers
def test_class_indices_need_not_be_consecutive(method: Method) -> None:
    shots, labels = wide_problem(1)
    assert set(fit(shots, labels * 7 + 3, Linear(grid=(1.0,), folds=1, method=method)).predict(shots)) == {
        3,
        10,
        17,
        24,
    }


@both_solvers
def test_classes_smaller_than_the_folds_are_in_order(method: Method) -> None:
    shots, labels = wide_problem(2)
    kept = np.r_[0, 1, 5:20]
    assert fit(shots[kept], labels[kept], Linear(grid=C_GRID, folds=5, method=method)).fits == 4 * 5 + 1


def test_fits_that_stop_early_are_counted_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(solver, "MAX_ITERATIONS", 1)
    shots, labels = wide_problem(0)
    classifier = fit(shots, labels, Linear(grid=C_GRID, folds=5, method="sklearn"))
    assert (classifier.fits, classifier.unconverged) == (21, 21)
    assert not [w for w in recwarn if issubclass(w.category, ConvergenceWarning)]
