"""Probes of images with several labels each, judged by mean average precision (our choice; P1 names none)."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from kdcli.console import console
from kdcli.errors import BadDataError
from kdcli.probing.neighbours import Neighbours
from kdcli.probing.protocols import EXACT_ROWS, LinearName
from kdcli.probing.solver import Method, one_thread_if_small

_CHUNK = 4096


@final
@dataclass(frozen=True, slots=True, eq=False)
class LabelDraw:
    """One draw.

    Attributes:
        precisions: average precision of each label; NaN where no test image, or every one, has it.
        c: regularisation chosen by cross-validation; None of neighbours.
        fits: problems solved.
        unconverged: of these, how many stopped early.
    """

    precisions: Float64[np.ndarray, " l"]
    c: float | None
    fits: int
    unconverged: int


def split_labels(
    names: Sequence[str], separator: str, known: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Bool[np.ndarray, "c l"]]:
    """The labels in class names such as ``cat|dog``.

    Args:
        names: of the classes.
        separator: between labels; a name of separators only is an image without any label.
        known: labels to number by; default: those that there are, sorted.

    Returns:
        The labels, and which of them each class has.

    Raises:
        BadDataError: a label that is not known.
    """
    parts = [[part.strip() for part in name.split(separator) if part.strip()] for name in names]
    found = tuple(sorted({part for each in parts for part in each})) if known is None else tuple(known)
    index = {name: number for number, name in enumerate(found)}
    table = np.zeros((len(names), len(found)), bool)
    for row, each in enumerate(parts):
        for part in each:
            if part not in index:
                raise BadDataError(
                    f"label '{part}' of --test has no training image in DATA",
                    "DATA and --test must have the same labels: check --multi-label and both data sets.",
                )
            table[row, index[part]] = True
    return found, table


def random_draws(
    labels: Bool[np.ndarray, "n l"], shots: int, draws: int, seed: int
) -> Int64[np.ndarray, "draws k"]:
    """Draw ``shots`` times the number of labels of all images at random, all where there are fewer.

    P1 (section 4.1) does so for iFashion, with 1000 images: images of several labels cannot be drawn class by
    class without drawing other classes, too.
    """
    count = min(len(labels), shots * labels.shape[1])
    rng = np.random.Generator(np.random.Philox(seed))
    return np.stack([rng.permutation(len(labels))[:count] for _ in range(draws)])


def average_precisions(
    labels: Bool[np.ndarray, "m l"], scores: Float[np.ndarray, "m l"]
) -> Float64[np.ndarray, " l"]:
    """Average precision of each label; NaN where no image, or every one, has it: it ranks nothing."""
    from sklearn.metrics import average_precision_score

    some = np.asarray(labels.any(axis=0) & ~labels.all(axis=0))
    return np.array(
        [
            average_precision_score(labels[:, label], scores[:, label]) if some[label] else np.nan
            for label in range(labels.shape[1])
        ]
    )


def check_labels(train: Bool[np.ndarray, "n l"], test: Bool[np.ndarray, "m l"], names: Sequence[str]) -> None:
    """Refuse labels that nothing can be learned or judged by.

    Raises:
        BadDataError: there is no label that some images have and others have not.
    """
    if train.shape[1] == 0:
        raise BadDataError("no image has a label", "Check --multi-label: it separates labels in class names.")
    for rows, what in ((train, "training"), (test, "test")):
        useless = ~rows.any(axis=0) | rows.all(axis=0)
        if useless.all():
            raise BadDataError(
                f"each of the {len(names)} labels is on all {what} images, or on none",
                "Use data in which some images have a label and others have not.",
            )
        if useless.any():
            first = names[int(useless.argmax())]
            console.warn(
                f"{int(useless.sum())} of {len(names)} labels are on all {what} images, or on none: they are not "
                f"{'learned' if what == 'training' else 'judged'} (first '{first}')"
            )


def multi_label_draws(
    train: Float[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n l"],
    draws: Int64[np.ndarray, "draws k"],
    test: Float[np.ndarray, "m d"],
    test_labels: Bool[np.ndarray, "m l"],
    protocol: Literal["svm", "logistic", "knn"],
    grid: Sequence[float],
    folds: int,
    neighbours: int,
    method: Method = "exact",
    device: str = "cpu",
) -> Iterator[LabelDraw]:
    """Probe draw after draw: a binary problem per label, one C for all labels, chosen by mAP.

    Args:
        train: features that ``draws`` index.
        labels: which labels each has.
        draws: rows of the training images.
        test: features of the test images.
        test_labels: which labels each has.
        protocol: linear classifier, or neighbours' votes.
        grid: values of C.
        folds: of the cross-validation, shuffled with seed 0.
        neighbours: k of knn.
        method: the SVM's solver; many rows are liblinear's in any case.
        device: torch device of the exact solver.

    Yields:
        One result per draw.
    """
    from sklearn.preprocessing import StandardScaler

    exact = protocol == "svm" and method == "exact" and draws.shape[1] <= EXACT_ROWS
    for rows in draws:
        shots, own = train[rows].astype(np.float64), labels[rows]
        if protocol == "knn":
            votes = _chunked(Neighbours(shots, own.astype(np.float64), neighbours).votes, test, own.shape[1])
            yield LabelDraw(average_precisions(test_labels, votes), None, 0, 0)
            continue
        scaler, fitter = StandardScaler().fit(shots), _Exact(device) if exact else _Sklearn(protocol)
        scaled = scaler.transform(shots)
        c = _choose(scaled, own, sorted(grid), folds, fitter)
        ((weights, intercepts),) = fitter.path(scaled, own, (c,))
        weights = weights / scaler.scale_
        linear = _linear(weights, intercepts - weights @ scaler.mean_)
        scores = _chunked(linear, test, own.shape[1])
        yield LabelDraw(average_precisions(test_labels, scores), c, fitter.fits, fitter.unconverged)


Decide = Callable[[Float64[np.ndarray, "m d"]], Float64[np.ndarray, "m l"]]


def _linear(weights: Float64[np.ndarray, "l d"], intercepts: Float64[np.ndarray, " l"]) -> Decide:
    return lambda features: features @ weights.T + intercepts


def _chunked(decide: Decide, test: Float[np.ndarray, "m d"], count: int) -> Float64[np.ndarray, "m l"]:
    scores = np.empty((len(test), count))
    for start in range(0, len(test), _CHUNK):
        part = slice(start, start + _CHUNK)
        scores[part] = decide(test[part].astype(np.float64))
    return scores


def _choose(
    rows: Float64[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n l"],
    grid: Sequence[float],
    folds: int,
    fitter: "_Fitter",
) -> float:
    from sklearn.model_selection import KFold

    if len(grid) == 1 or len(rows) < folds:
        return float(grid[0])
    means = np.zeros(len(grid))
    for train, held_out in KFold(folds, shuffle=True, random_state=0).split(rows):
        for number, fitted in enumerate(fitter.path(rows[train], labels[train], grid)):
            found = average_precisions(labels[held_out], _linear(*fitted)(rows[held_out]))
            if np.isfinite(found).any():
                means[number] += float(np.nanmean(found))
    return float(grid[int(np.argmax(means.round(12)))])


Linear = tuple[Float64[np.ndarray, "l d"], Float64[np.ndarray, " l"]]
"""Weights and intercepts of all labels."""


class _Fitter(ABC):
    """One-vs-rest linear classifiers, counting the problems solved and those that did not converge."""

    def __init__(self) -> None:
        self.fits = self.unconverged = 0

    def path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Linear]:
        """One fit per C, ascending; 0 for a label that all of these images have, or none."""
        some = np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0))
        nothing: Linear = (np.zeros((0, rows.shape[1])), np.zeros(0))
        for found in self._path(rows, labels[:, some], grid) if len(some) else (nothing for _ in grid):
            weights, intercepts = np.zeros((labels.shape[1], rows.shape[1])), np.zeros(labels.shape[1])
            weights[some], intercepts[some] = found
            yield weights, intercepts

    @abstractmethod
    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Linear]: ...


@final
class _Exact(_Fitter):
    """The SVM in sample space: all labels at once, each C from the active sets of the one before."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Linear]:
        import torch  # takes seconds to load; scikit-learn needs none of it

        from kdcli.probing import squared_hinge

        with one_thread_if_small(len(rows)):
            samples = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)
            signs = torch.from_numpy(np.where(labels, 1.0, -1.0)).to(self._device)
            gram, active = squared_hinge.gram_matrix(samples), None
            for c in grid:
                solution = squared_hinge.solve(gram, signs, c, active)
                active = solution.active
                self.fits += labels.shape[1]
                self.unconverged += int((~solution.converged).sum())
                yield (solution.beta.T @ samples).cpu().numpy(), solution.beta.sum(dim=0).cpu().numpy()


@final
class _Sklearn(_Fitter):
    """LinearSVC or LogisticRegression, label by label."""

    def __init__(self, protocol: LinearName) -> None:
        super().__init__()
        self._protocol = protocol

    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Linear]:
        for c in grid:
            found = [self._solve(rows, label, c) for label in labels.T]
            yield np.array([weights for weights, _ in found]), np.array([intercept for _, intercept in found])

    def _solve(
        self, rows: Float64[np.ndarray, "n d"], label: Bool[np.ndarray, " n"], c: float
    ) -> tuple[Float64[np.ndarray, " d"], float]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        wide = rows.shape[0] < rows.shape[1]
        model = (
            LinearSVC(C=c, dual=wide, tol=1e-5, max_iter=10_000, random_state=0)
            if self._protocol == "svm"
            else LogisticRegression(C=c, max_iter=2000)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(rows, label)
        self.fits += 1
        self.unconverged += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        return model.coef_[0], float(model.intercept_[0])
