"""The exact solver: its optimum against liblinear's, duality, and the stationarity of the solution."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from kdcli.probing import squared_hinge
from kdcli.probing.solver import Linear, fit
from kdcli.probing.squared_hinge import (
    Solution,
    dual_objective,
    gram_matrix,
    in_batches,
    largest_c,
    one_by_one,
    solve,
)

GRID = 10.0 ** np.arange(-3, 4)


def clusters(seed: int, classes: int, shots: int, d: int, apart: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), shots)
    return apart * rng.normal(size=(classes, d))[labels] + rng.normal(size=(len(labels), d)), labels


def signs_of(labels: Any) -> Any:
    return np.where(labels[:, None] == np.unique(labels), 1.0, -1.0)


def primal(samples: Any, signs: Any, weights: Any, intercepts: Any, c: float) -> Any:
    """LinearSVC's objective as its documentation has it, with the intercept regularised."""
    losses = np.maximum(0, 1 - signs * (samples @ weights.T + intercepts)) ** 2
    return 0.5 * ((weights**2).sum(1) + intercepts**2) + c * losses.sum(0)


def solved(samples: Any, signs: Any, c: float, active: Any = None) -> tuple[Solution, Any, Any]:
    """The solution, its weights and its intercepts."""
    rows = torch.from_numpy(samples)
    solution = solve(gram_matrix(rows), torch.from_numpy(signs), c, active)
    return solution, (solution.beta.T @ rows).numpy(), solution.beta.sum(0).numpy()


@pytest.mark.parametrize("c", GRID)
@pytest.mark.parametrize(("d", "apart"), [(200, 0.3), (12, 0.7)])
def test_objective_is_liblinears_optimum(c: float, d: int, apart: float) -> None:
    samples, labels = clusters(0, 6, 5, d, apart)
    signs = signs_of(labels)
    _, weights, intercepts = solved(samples, signs, c)
    ours = primal(samples, signs, weights, intercepts, c)
    reference = LinearSVC(C=c, dual=True, tol=1e-8, max_iter=10**6, random_state=0).fit(samples, labels)
    theirs = primal(samples, signs, reference.coef_, reference.intercept_, c)
    assert (ours <= theirs * (1 + 1e-12)).all()
    assert ours == pytest.approx(theirs, rel=1e-6)


@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 5),
    shots=st.integers(1, 6),
    d=st.integers(1, 30),
    apart=st.sampled_from([0.0, 0.5, 20.0]),
    exponent=st.integers(-4, 3),
    twins=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_duality_gap_vanishes_and_the_gradient_too(
    seed: int, classes: int, shots: int, d: int, apart: float, exponent: int, twins: bool
) -> None:
    samples, labels = clusters(seed, classes, shots, d, apart)
    if twins:  # the same sample twice, and once under another label: a singular Gram matrix
        samples = np.concatenate([samples, samples[:1], samples[:1]])
        labels = np.concatenate([labels, labels[:1], labels[-1:]])
    signs, c = signs_of(labels), 10.0**exponent
    solution, weights, intercepts = solved(samples, signs, c)
    assert solution.converged.all()
    value = primal(samples, signs, weights, intercepts, c)
    bound = dual_objective(gram_matrix(torch.from_numpy(samples)), solution.beta, torch.from_numpy(signs), c)
    assert value == pytest.approx(bound.numpy(), rel=1e-8)
    margins = np.maximum(0, 1 - signs * (samples @ weights.T + intercepts))
    gradient = weights - 2 * c * (signs * margins).T @ samples
    scale = 1 + 2 * c * np.abs(samples).max() * len(samples)
    assert np.abs(gradient).max() <= 1e-8 * scale


def test_the_start_does_not_matter() -> None:
    samples, labels = clusters(1, 8, 5, 40, 0.5)
    signs = signs_of(labels)
    _, expected, intercepts = solved(samples, signs, 3.0)
    rng = np.random.default_rng(0)
    for start in (np.zeros(signs.shape, bool), rng.random(signs.shape) < 0.5):
        solution, weights, others = solved(samples, signs, 3.0, torch.from_numpy(start))
        assert solution.converged.all()
        assert weights == pytest.approx(expected, abs=1e-9)
        assert others == pytest.approx(intercepts, abs=1e-9)


def test_groups_of_systems_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, labels = clusters(2, 9, 5, 30, 0.4)
    signs = signs_of(labels)
    _, expected, _ = solved(samples, signs, 1.0)
    for elements, padding in ((1, 0), (1 << 22, 0), (1 << 22, 1000)):
        monkeypatch.setattr(squared_hinge, "_ELEMENTS", elements)
        monkeypatch.setattr(squared_hinge, "_PADDING", padding)
        assert solved(samples, signs, 1.0)[1] == pytest.approx(expected, abs=1e-12)


def test_at_small_c_all_samples_are_active_and_it_is_ridge_regression() -> None:
    samples, labels = clusters(3, 4, 5, 60, 0.5)
    signs, c = signs_of(labels), 1e-5
    solution, weights, intercepts = solved(samples, signs, c)
    wide = np.c_[samples, np.ones(len(samples))]
    ridge = np.linalg.solve(wide.T @ wide + np.eye(61) / (2 * c), wide.T @ signs).T
    assert solution.active.all()
    assert np.c_[weights, intercepts] == pytest.approx(ridge, abs=1e-12)


def test_steps_that_run_out_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, labels = clusters(4, 6, 5, 8, 0.3)
    monkeypatch.setattr(squared_hinge, "MAX_STEPS", 1)
    assert not solved(samples, signs_of(labels), 100.0)[0].converged.all()


def test_a_class_that_a_fold_leaves_out_is_never_predicted_there() -> None:
    samples, labels = clusters(5, 3, 4, 10, 5.0)
    both = (
        fit(samples, labels, Linear(grid=(0.1, 1.0), folds=2)),
        fit(samples, labels, Linear(grid=(0.1, 1.0), folds=2, method="sklearn")),
    )
    assert both[0].c == both[1].c
    lone = np.r_[0, 4:12]  # the only sample of class 0 is held out once: the training part has two classes
    ours = fit(samples[lone], labels[lone], Linear(grid=(0.01, 1.0), folds=3))
    theirs = fit(samples[lone], labels[lone], Linear(grid=(0.01, 1.0), folds=3, method="sklearn"))
    assert (ours.c, ours.fits) == (theirs.c, theirs.fits)
    assert np.array_equal(ours.predict(samples), theirs.predict(samples))


def test_constant_features_get_no_weight() -> None:
    samples, labels = clusters(6, 4, 5, 9, 1.0)
    samples[:, 3] = 0  # what StandardScaler makes of a constant
    classifier = fit(samples, labels, Linear(grid=(1.0,), folds=1))
    assert (classifier.coefficients[:, 3] == 0).all()


# --- hard cases ---------------------------------------------------------------------------------


def degenerate(case: str) -> tuple[Any, Any]:
    """Samples that make the Gram matrix singular, nearly so, or badly scaled."""
    samples, labels = clusters(7, 4, 3, 30, 0.6)
    if case == "duplicates":
        return np.r_[samples, samples[:5]], np.r_[labels, labels[:5]]
    if case == "duplicates of two classes":
        return np.r_[samples, samples[:2]], np.r_[labels, labels[-2:]]
    if case == "all samples equal":
        return np.tile(samples[:1], (len(samples), 1)), labels
    if case == "constant features":
        samples[:, 3:] = 0
    if case == "all features constant":
        samples[:] = 0
    if case == "two images a class":
        return clusters(8, 9, 2, 40, 0.4)
    if case == "one feature":
        return samples[:, :1], labels
    if case == "one huge feature":
        samples[:, 0] *= 1e4
    if case == "tiny features":
        samples *= 1e-6
    return samples, labels


CASES = [
    "duplicates",
    "duplicates of two classes",
    "all samples equal",
    "constant features",
    "all features constant",
    "two images a class",
    "one feature",
    "one huge feature",
    "tiny features",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("c", [1e-8, 1e-2, 1e3])
def test_hard_cases_reach_liblinears_objective(case: str, c: float) -> None:
    samples, labels = degenerate(case)
    signs = signs_of(labels)
    solution, weights, intercepts = solved(samples, signs, c)
    assert solution.converged.all()
    ours = primal(samples, signs, weights, intercepts, c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference = LinearSVC(C=c, dual=True, tol=1e-9, max_iter=20_000, random_state=0).fit(samples, labels)
    theirs = primal(samples, signs, reference.coef_, reference.intercept_, c)
    assert (ours <= theirs * (1 + 1e-6)).all()
    if reference.n_iter_ < 20_000:  # else liblinear has not arrived
        assert ours == pytest.approx(theirs, rel=1e-6)


@given(
    seed=st.integers(0, 10**6),
    case=st.sampled_from(CASES),
    classes=st.integers(2, 6),
    exponent=st.integers(-12, 5),  # beyond, contradictory duplicates leave up to 1e-5 of the objective
    start=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_the_optimum_is_certified_by_duality_wherever_it_starts(
    seed: int, case: str, classes: int, exponent: int, start: float
) -> None:
    samples, _ = degenerate(case)
    rng = np.random.default_rng(seed)
    labels = np.r_[:classes, rng.integers(0, classes, len(samples) - classes)]  # some classes have one image
    signs, c = signs_of(labels), 10.0**exponent
    active = torch.from_numpy(rng.random(signs.shape) < start)
    solution, weights, intercepts = solved(samples, signs, c, active)
    value = primal(samples, signs, weights, intercepts, c)
    gram = gram_matrix(torch.from_numpy(samples))
    bound = dual_objective(gram, solution.beta, torch.from_numpy(signs), c).numpy()
    assert solution.converged.all()
    assert (value - bound <= 1e-6 * value).all()


def test_a_c_that_rounding_swallows_is_solved_as_the_largest_that_it_does_not() -> None:
    samples, labels = degenerate("duplicates")
    signs = signs_of(labels)
    limit = largest_c(gram_matrix(torch.from_numpy(samples)))
    _, expected, intercepts = solved(samples, signs, limit)
    for c in (1e15, 1e300):
        solution, weights, others = solved(samples, signs, c)
        assert solution.converged.all()
        assert np.array_equal(weights, expected)
        assert np.array_equal(others, intercepts)
    # Separable shots: that is the hard-margin classifier, every margin at least 1 but for rounding.
    assert (signs * (samples @ expected.T + intercepts)).min() > 1 - 1e-5


def test_an_order_of_the_samples_and_a_rotation_of_the_features_do_not_matter() -> None:
    samples, labels = clusters(9, 5, 4, 25, 0.5)
    signs = signs_of(labels)
    _, weights, intercepts = solved(samples, signs, 0.7)
    order = np.random.default_rng(0).permutation(len(samples))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(25, 25)))[0]
    _, others, their_intercepts = solved(samples[order] @ rotation, signs[order], 0.7)
    assert others @ rotation.T == pytest.approx(weights, abs=1e-9)
    assert their_intercepts == pytest.approx(intercepts, abs=1e-9)


def test_the_rows_of_systems_are_listed_in_order_and_filled_up() -> None:
    chosen = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    listed, real = squared_hinge._listed(chosen, torch.tensor([2, 1, 0]), 2)
    assert listed.tolist() == [[0, 2], [1, 0], [0, 0]]
    assert real.tolist() == [[True, True], [True, False], [False, False]]


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10**6))
def test_systems_alone_and_in_batches_are_those_of_numpy(n: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(n, 4))
    matrix = samples @ samples.T + 0.1 * np.eye(n)
    chosen = rng.random((n, columns)) < rng.random(columns)
    right = rng.normal(size=(n, columns))
    expected = np.zeros((n, columns))
    for column, rows in enumerate(chosen.T):
        if rows.any():
            expected[rows, column] = np.linalg.solve(matrix[np.ix_(rows, rows)], right[rows, column])
    by_columns = torch.from_numpy(np.asfortranarray(matrix))  # as cholesky_inverse returns it
    for solve_systems in (one_by_one, in_batches):
        for given_matrix in (torch.from_numpy(matrix), by_columns):
            found = solve_systems(given_matrix, torch.from_numpy(chosen), torch.from_numpy(right))
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_array_equal(by_columns.numpy(), matrix)  # nothing is solved in place


@pytest.mark.parametrize("c", [100.0, 1e4])
def test_a_large_c_is_solved_without_a_start_nearby(c: float) -> None:
    # Correlated columns, barely more of them than samples: from all samples active, shortened steps did not reach the
    # optimum of C = 10,000, as they did not that of C = 100 on real features of 100 classes (0.4 % above).
    rng = np.random.default_rng(0)
    labels, d = np.repeat(np.arange(40), 5), 205
    samples = rng.normal(size=(200, d)) @ (rng.normal(size=(d, d)) * np.exp(-np.arange(d) / 40)[:, None])
    samples = (samples - samples.mean(0)) / samples.std(0)
    signs = signs_of(labels)
    gram, y = gram_matrix(torch.from_numpy(samples)), torch.from_numpy(signs)
    solution, weights, intercepts = solved(samples, signs, c)
    assert solution.converged.all()
    value = primal(samples, signs, weights, intercepts, c)
    bound = dual_objective(gram, solution.beta, y, c).numpy()
    assert ((value - bound) <= 1e-9 * value).all()
    none = torch.zeros_like(solution.active)  # a misleading start, as of a C far away
    none[0] = True
    again = solve(gram, y, c, none)
    assert again.converged.all()
    np.testing.assert_allclose(again.beta.numpy(), solution.beta.numpy(), rtol=1e-6, atol=1e-9)
