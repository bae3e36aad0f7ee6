"""The linear classifier of a probe: L2-regularised squared hinge, one-vs-rest, or softmax; C by cross-validation.

Two solvers of the SVM: ``exact`` is kdcli.probing.squared_hinge, in sample space and for all
classes at once; ``sklearn`` is LinearSVC, the reference. Their optima are the same, so predictions and
the C chosen are too, but for ties within liblinear's tolerance.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from kdcli.metrics.threads import Map, parallel_map

MAX_ITERATIONS = 10_000
TOLERANCE = 1e-6
"""liblinear's default of 1e-4 moved single predictions of the reference problem; this costs no time here."""
_SMALL = 1000

MAX_LOGISTIC_ITERATIONS = 2000
C_GRID: Final[Sequence[float]] = (0.01, 0.1, 1.0, 10.0)

LinearName = Literal["svm", "logistic"]
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

    def accuracy(self, features: Float64[np.ndarray, "m d"], labels: Int64[np.ndarray, " m"]) -> float:
        """Share of rows whose class is predicted."""
        return float((self.predict(features) == labels).mean())


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """How a linear classifier is fitted.

    Attributes:
        kind: squared-hinge SVM one-vs-rest, or softmax regression.
        grid: values of C; of equally accurate ones the smallest is taken.
        folds: of the cross-validation, shuffled with seed 0; 1 for none, which needs a grid of one value; None: the
            protocol's own.
        method: the SVM's solver.
        device: torch device of the exact solver; results are float64 everywhere.
    """

    kind: LinearName = "svm"
    grid: Sequence[float] = C_GRID
    folds: int | None = None
    method: Method = "exact"
    device: str = "cpu"


def fit(shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], how: Linear) -> Classifier:
    """Choose C by cross-validation, then fit on all shots, as GridSearchCV does with LinearSVC or LogisticRegression.

    Args:
        shots: scaled features.
        labels: class index of each; at least two classes.
        how: stratified folds are needed where there is more than one C.
    """
    how = replace(how, grid=sorted(how.grid))
    parts = stratified_folds(labels, how.folds or 1) if len(how.grid) > 1 else []
    if how.kind == "svm" and how.method == "exact":
        with one_thread_if_small(len(shots), len(parts)) as each:
            return _fit_exact(shots, labels, how, parts, each if how.device == "cpu" else map)
    return _fit_sklearn(shots, labels, how, parts)


def stratified_folds(labels: Int64[np.ndarray, " n"], folds: int) -> Folds:
    """Shuffled with seed 0. A class with fewer images than folds is spread over some of them."""
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        split = StratifiedKFold(folds, shuffle=True, random_state=0).split(np.zeros((len(labels), 1)), labels)
        return list(split)


Fold = tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]


def choose_c(
    grid: Sequence[float],
    parts: Folds,
    scores_of: Callable[[Fold], Sequence[float]],
    each: Callable[..., Iterable[Any]] = map,
) -> float:
    """The smallest C of the highest mean score over the folds; the first one without any.

    Rounded, because equal scores summed in another order differ in the last bit.

    Args:
        grid: ascending.
        parts: the folds.
        scores_of: from a fold to the score of each C on its held-out rows.
        each: maps it over the folds.
    """
    if not parts:
        return float(grid[0])
    return float(grid[int(np.argmax(np.array(list(each(scores_of, parts))).mean(axis=0).round(12)))])


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
    shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], how: Linear, parts: Folds, each: Map
) -> Classifier:
    """All folds and values of C read one Gram matrix; active sets are handed from each C to the next."""
    import torch  # takes seconds to load; sklearn needs none of it

    from kdcli.probing import squared_hinge

    rows = torch.from_numpy(np.ascontiguousarray(shots)).to(how.device)
    gram = squared_hinge.gram_matrix(rows)
    stopped: list[bool] = []  # appended to by several threads: their order does not matter

    def accuracies_of(fold: Fold) -> list[float]:
        train, held_out = fold
        own, other = (torch.from_numpy(part).to(how.device) for part in fold)
        within, across = gram[own[:, None], own], gram[other[:, None], own]
        classes, signs = _signs(labels[train])
        signs_there, active = torch.from_numpy(signs).to(how.device), None
        found = []
        for c in how.grid:
            solution = squared_hinge.solve(within, signs_there, c, active)
            active = solution.active
            scores = (across @ solution.beta).cpu().numpy()
            found.append(float((_decide(scores, classes) == labels[held_out]).mean()))
            stopped.append(not solution.converged.all())
        return found

    c = choose_c(how.grid, parts, accuracies_of, each)
    classes, signs = _signs(labels)
    solution = squared_hinge.solve(gram, torch.from_numpy(signs).to(how.device), c)
    stopped.append(not solution.converged.all())
    coefficients = (solution.beta.T @ rows).cpu().numpy()
    intercepts = solution.beta.sum(dim=0).cpu().numpy()
    return Classifier(*_both(coefficients, intercepts), classes, c, len(stopped), sum(stopped))


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
    shots: Float64[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], how: Linear, parts: Folds
) -> Classifier:
    """LinearSVC or LogisticRegression, in n columns where n < d.

    Such rows are first written in an orthonormal basis of their span. Inner products stay as they are
    and an L2-regularised solution lies in that span, so every problem, of the folds too, has the same
    solution; the intercept is a column of its own in both. liblinear solves the dual there: separable
    shots at large C take its primal solver 230 times as long (trap T14); that one is for n >= d.
    """
    wide = shots.shape[0] < shots.shape[1]
    basis, columns = np.linalg.qr(shots.T) if wide else (None, shots.T)
    rows, solver = columns.T, Sklearn(how.kind, wide, TOLERANCE)

    def accuracies_of(fold: Fold) -> list[float]:
        train, held_out = fold
        return [
            solver.solve(rows[train], labels[train], c).accuracy(rows[held_out], labels[held_out])
            for c in how.grid
        ]

    c = choose_c(how.grid, parts, accuracies_of)
    found = solver.solve(rows, labels, c)
    coefficients = found.coefficients if basis is None else found.coefficients @ basis.T
    return replace(found, coefficients=coefficients, fits=solver.fits, unconverged=solver.unconverged)


@final
class Sklearn:
    """LinearSVC or LogisticRegression, counting the problems solved and those that did not converge.

    Args:
        kind: which.
        dual: which problem liblinear solves.
        tolerance: of liblinear.
    """

    def __init__(self, kind: LinearName, dual: bool, tolerance: float) -> None:
        self._kind, self._dual, self._tolerance = kind, dual, tolerance
        self.fits = self.unconverged = 0

    def solve(
        self, rows: Float64[np.ndarray, "n r"], labels: Shaped[np.ndarray, " n"], c: float
    ) -> Classifier:
        """Fit; the counts of the classifier are those of this one problem."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        model = (
            LinearSVC(C=c, dual=self._dual, tol=self._tolerance, max_iter=MAX_ITERATIONS, random_state=0)
            if self._kind == "svm"
            else LogisticRegression(C=c, max_iter=MAX_LOGISTIC_ITERATIONS)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(rows, labels)
        failed = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        self.fits += 1
        self.unconverged += failed
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        classes = model.classes_.astype(np.int64)
        return Classifier(*_both(model.coef_, model.intercept_), classes, c, 1, int(failed))
