"""The linear classifier of a probe: L2-regularised squared hinge, one-vs-rest, C by cross-validation.

Everything that knows scikit-learn is here, so that another solver is one other function :func:`fit`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64, Int64

MAX_ITERATIONS = 10_000
TOLERANCE = 1e-6
"""liblinear's default of 1e-4 moved single predictions of the reference problem; this costs no time here."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A fitted linear classifier.

    Attributes:
        coefficients: a row per class.
        intercepts: one per class.
        classes: the class index that each row stands for, ascending.
        c: the inverse regularisation strength chosen.
        fits: how many problems were solved on the way.
        unconverged: how many of them stopped at ``MAX_ITERATIONS``.
    """

    coefficients: Float64[np.ndarray, "c d"]
    intercepts: Float64[np.ndarray, " c"]
    classes: Int64[np.ndarray, " c"]
    c: float
    fits: int
    unconverged: int

    def predict(self, features: Float64[np.ndarray, "m d"]) -> Int64[np.ndarray, " m"]:
        """Class index of each row."""
        scores = features @ self.coefficients.T + self.intercepts
        predicted: Int64[np.ndarray, " m"] = self.classes[scores.argmax(axis=1)]
        return predicted


def fit(
    shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], grid: Sequence[float], folds: int
) -> Classifier:
    """Choose C by cross-validation, then fit on all shots: GridSearchCV(LinearSVC), but exact in n columns.

    Where n < d the rows are first written in an orthonormal basis of their span (n columns). Inner
    products stay as they are and an L2-regularised solution lies in that span, so every problem, of the
    folds too, has the same solution; the intercept is a column of its own in both. Measured at n = 50,
    d = 1280: 1.4 ms a fit instead of 26. liblinear solves the dual there: separable shots at large C
    take its primal solver 230 times as long (trap T14); that one is for n >= d.

    Args:
        shots: scaled features.
        labels: class index of each; at least two classes.
        grid: values of C; of equally accurate ones the smallest is taken.
        folds: number of stratified folds, shuffled with seed 0; 1 for no cross-validation, which
            needs a grid of one value.
    """
    wide = shots.shape[0] < shots.shape[1]
    basis, columns = np.linalg.qr(shots.T) if wide else (None, shots.T)
    solver = _Solver(dual=wide)
    c = grid[0] if len(grid) == 1 else _best_c(columns.T, labels, sorted(grid), folds, solver)
    coefficients, intercepts, classes = solver.solve(columns.T, labels, c)
    if basis is not None:
        coefficients = coefficients @ basis.T
    return Classifier(coefficients, intercepts, classes, c, solver.fits, solver.unconverged)


def _best_c(
    rows: Float64[np.ndarray, "n r"],
    labels: Int64[np.ndarray, " n"],
    grid: Sequence[float],
    folds: int,
    solver: "_Solver",
) -> float:
    from sklearn.model_selection import StratifiedKFold

    accuracies = np.zeros((len(grid), folds))
    with warnings.catch_warnings():
        # A class with fewer images than folds is in order: its images are spread over some of them.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(rows, labels))
    for fold, (train, held_out) in enumerate(parts):
        for number, c in enumerate(grid):
            coefficients, intercepts, classes = solver.solve(rows[train], labels[train], c)
            scores = rows[held_out] @ coefficients.T + intercepts
            accuracies[number, fold] = (classes[scores.argmax(axis=1)] == labels[held_out]).mean()
    # Rounded, because equal accuracies summed in another order differ in the last bit.
    return float(grid[int(np.argmax(accuracies.mean(axis=1).round(12)))])


@final
class _Solver:
    """LinearSVC, counting the problems solved and those that did not converge."""

    def __init__(self, dual: bool) -> None:
        self._dual = dual
        self.fits = self.unconverged = 0

    def solve(
        self, rows: Float64[np.ndarray, "n r"], labels: Int64[np.ndarray, " n"], c: float
    ) -> tuple[Float64[np.ndarray, "c r"], Float64[np.ndarray, " c"], Int64[np.ndarray, " c"]]:
        """Coefficients and intercepts, a row per class, and the classes."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        model = LinearSVC(C=c, dual=self._dual, tol=TOLERANCE, max_iter=MAX_ITERATIONS, random_state=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(rows, labels)
        self.fits += 1
        self.unconverged += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn gives one row for the second class: write out both
            coefficients = np.vstack([-coefficients, coefficients])
            intercepts = np.hstack([-intercepts, intercepts])
        return coefficients, intercepts, model.classes_.astype(np.int64)
