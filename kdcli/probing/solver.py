"""The linear classifier of a probe: L2-regularised squared hinge, one-vs-rest, C by cross-validation.

Two solvers of the same problems: ``exact`` is kdcli.probing.squared_hinge, in sample space and for all
classes at once; ``sklearn`` is LinearSVC, the reference. Their optima are the same, so predictions and
the C chosen are too, but for ties within liblinear's tolerance.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Float64, Int64

from kdcli.metrics.threads import Map, parallel_map

MAX_ITERATIONS = 10_000
TOLERANCE = 1e-6
"""liblinear's default of 1e-4 moved single predictions of the reference problem; this costs no time here."""
_SMALL = 1000

Method = Literal["exact", "sklearn"]
Folds = Sequence[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]]
"""Training and held-out rows of each fold."""


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
        unconverged: how many of them stopped before they converged.
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
    shots: Float64[np.ndarray, "n d"],
    labels: Int64[np.ndarray, " n"],
    grid: Sequence[float],
    folds: int,
    method: Method = "exact",
    device: str = "cpu",
) -> Classifier:
    """Choose C by cross-validation, then fit on all shots, as GridSearchCV(LinearSVC) does.

    Args:
        shots: scaled features.
        labels: class index of each; at least two classes.
        grid: values of C; of equally accurate ones the smallest is taken.
        folds: number of stratified folds, shuffled with seed 0; 1 for no cross-validation, which
            needs a grid of one value.
        method: the solver.
        device: torch device of the exact solver; results are float64 everywhere.
    """
    grid = sorted(grid)
    parts = stratified_folds(labels, folds) if len(grid) > 1 else []
    if method == "exact":
        with one_thread_if_small(len(shots), len(parts)) as each:
            return _fit_exact(shots, labels, grid, parts, device, each if device == "cpu" else map)
    return _fit_sklearn(shots, labels, grid, parts)


def stratified_folds(labels: Int64[np.ndarray, " n"], folds: int) -> Folds:
    """Shuffled with seed 0. A class with fewer images than folds is spread over some of them."""
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        split = StratifiedKFold(folds, shuffle=True, random_state=0).split(np.zeros((len(labels), 1)), labels)
        return list(split)


def best_c(grid: Sequence[float], accuracies: Float64[np.ndarray, "c folds"]) -> float:
    """The smallest C of the highest mean accuracy.

    Rounded, because equal accuracies summed in another order differ in the last bit.
    """
    return float(grid[int(np.argmax(accuracies.mean(axis=1).round(12)))])


# --- in sample space --------------------------------------------------------------------------


@contextmanager
def one_thread_if_small(samples: int, tasks: int = 1) -> Iterator[Map]:
    """Threads that share out systems of a few hundred rows wait for each other: two took 2.3 times as long.

    Args:
        samples: rows of the largest system.
        tasks: how many problems there are.

    Yields:
        A ``map`` over them: of small ones as many at a time as there are threads.
    """
    import torch

    if samples > _SMALL:
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with parallel_map(tasks) as (side_by_side, _):
            yield side_by_side
    finally:
        torch.set_num_threads(threads)


def _fit_exact(
    shots: Float64[np.ndarray, "n d"],
    labels: Int64[np.ndarray, " n"],
    grid: Sequence[float],
    parts: Folds,
    device: str,
    each: Map,
) -> Classifier:
    """All folds and values of C read one Gram matrix; active sets are handed from each C to the next."""
    import torch  # takes seconds to load; sklearn needs none of it

    from kdcli.probing import squared_hinge

    rows = torch.from_numpy(np.ascontiguousarray(shots)).to(device)
    gram = squared_hinge.gram_matrix(rows)

    def accuracies_of(
        fold: tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]],
    ) -> tuple[list[float], int]:
        """By C, and how many problems stopped early."""
        train, held_out = fold
        own, other = torch.from_numpy(train).to(device), torch.from_numpy(held_out).to(device)
        within, across = gram[own[:, None], own], gram[other[:, None], own]
        classes, signs = _signs(labels[train])
        signs_there, active = torch.from_numpy(signs).to(device), None
        found, stopped = [], 0
        for c in grid:
            solution = squared_hinge.solve(within, signs_there, c, active)
            active = solution.active
            scores = (across @ solution.beta).cpu().numpy()
            found.append(float((_decide(scores, classes) == labels[held_out]).mean()))
            stopped += int(not solution.converged.all())
        return found, stopped

    folds = list(each(accuracies_of, parts))
    c = best_c(grid, np.array([found for found, _ in folds]).T) if parts else float(grid[0])
    classes, signs = _signs(labels)
    solution = squared_hinge.solve(gram, torch.from_numpy(signs).to(device), c)
    coefficients = (solution.beta.T @ rows).cpu().numpy()
    intercepts = solution.beta.sum(dim=0).cpu().numpy()
    unconverged = sum(stopped for _, stopped in folds) + int(not solution.converged.all())
    fits = len(parts) * len(grid) + 1
    return Classifier(*_both(coefficients, intercepts), classes, c, fits, unconverged)


def _signs(labels: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " c"], Float64[np.ndarray, "n k"]]:
    """Classes and a column of signs for each; of two classes only the second's, as in LinearSVC."""
    classes = np.unique(labels)
    columns = classes[1:] if len(classes) == 2 else classes
    return classes, np.where(labels[:, None] == columns, 1.0, -1.0)


def _decide(scores: Float64[np.ndarray, "m k"], classes: Int64[np.ndarray, " c"]) -> Int64[np.ndarray, " m"]:
    chosen = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(axis=1)
    decided: Int64[np.ndarray, " m"] = classes[chosen.astype(np.int64)]
    return decided


def _both(
    coefficients: Float64[np.ndarray, "k d"], intercepts: Float64[np.ndarray, " k"]
) -> tuple[Float64[np.ndarray, "c d"], Float64[np.ndarray, " c"]]:
    """The one row of two classes, which is the second's, written out for both."""
    if len(coefficients) > 1:
        return coefficients, intercepts
    return np.vstack([-coefficients, coefficients]), np.hstack([-intercepts, intercepts])


# --- by scikit-learn --------------------------------------------------------------------------


def _fit_sklearn(
    shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], grid: Sequence[float], parts: Folds
) -> Classifier:
    """LinearSVC, in n columns where n < d.

    Such rows are first written in an orthonormal basis of their span. Inner products stay as they are
    and an L2-regularised solution lies in that span, so every problem, of the folds too, has the same
    solution; the intercept is a column of its own in both. liblinear solves the dual there: separable
    shots at large C take its primal solver 230 times as long (trap T14); that one is for n >= d.
    """
    wide = shots.shape[0] < shots.shape[1]
    basis, columns = np.linalg.qr(shots.T) if wide else (None, shots.T)
    rows, solver = columns.T, _Solver(dual=wide)
    accuracies = np.zeros((len(grid), len(parts)))
    for fold, (train, held_out) in enumerate(parts):
        for number, c in enumerate(grid):
            coefficients, intercepts, classes = solver.solve(rows[train], labels[train], c)
            scores = rows[held_out] @ coefficients.T + intercepts
            accuracies[number, fold] = (classes[scores.argmax(axis=1)] == labels[held_out]).mean()
    c = best_c(grid, accuracies) if parts else float(grid[0])
    coefficients, intercepts, classes = solver.solve(rows, labels, c)
    if basis is not None:
        coefficients = coefficients @ basis.T
    return Classifier(coefficients, intercepts, classes, c, solver.fits, solver.unconverged)


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
        return *_both(model.coef_, model.intercept_), model.classes_.astype(np.int64)
