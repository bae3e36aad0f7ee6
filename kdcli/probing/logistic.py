"""Multinomial logistic regression as a probe: scikit-learn's, C by the cross-validation of the SVM probe."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from kdcli.probing.solver import Classifier, best_c, stratified_folds

MAX_ITERATIONS = 2000


def fit_logistic(
    shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], grid: Sequence[float], folds: int
) -> Classifier:
    """Choose C by cross-validation, then fit on all shots: L2-regularised softmax, free intercepts.

    Where n < d the rows are first written in an orthonormal basis of their span: an L2-regularised solution
    lies in it, so the problems stay the same and have n columns.

    Args:
        shots: scaled features.
        labels: class index of each; at least two classes.
        grid: values of C, scikit-learn's inverse regularisation; of equally accurate ones the smallest is taken.
        folds: stratified folds, shuffled with seed 0.
    """
    grid = sorted(grid)
    wide = shots.shape[0] < shots.shape[1]
    basis, columns = np.linalg.qr(shots.T) if wide else (None, shots.T)
    rows, unconverged, fits = columns.T, 0, 0
    parts = stratified_folds(labels, folds) if len(grid) > 1 else []
    accuracies = np.zeros((len(grid), len(parts)))
    for fold, (train, held_out) in enumerate(parts):
        for number, c in enumerate(grid):
            found, failed = _solve(rows[train], labels[train], c)
            scores = rows[held_out] @ found[0].T + found[1]
            accuracies[number, fold] = (found[2][scores.argmax(axis=1)] == labels[held_out]).mean()
            fits, unconverged = fits + 1, unconverged + failed
    c = best_c(grid, accuracies) if parts else float(grid[0])
    (coefficients, intercepts, classes), failed = _solve(rows, labels, c)
    if basis is not None:
        coefficients = coefficients @ basis.T
    return Classifier(coefficients, intercepts, classes, c, fits + 1, unconverged + failed)


Solution = tuple[Float64[np.ndarray, "c r"], Float64[np.ndarray, " c"], Int64[np.ndarray, " c"]]


def _solve(
    rows: Float64[np.ndarray, "n r"], labels: Int64[np.ndarray, " n"], c: float
) -> tuple[Solution, int]:
    """Coefficients and intercepts, a row per class; the classes; and 1 where it stopped early."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(rows, labels)
    failed = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:  # of two classes only the second's
        coefficients, intercepts = (
            np.vstack([-coefficients, coefficients]),
            np.hstack([-intercepts, intercepts]),
        )
    return (coefficients, intercepts, model.classes_.astype(np.int64)), int(failed)
