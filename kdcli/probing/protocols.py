"""Protocols of P1: which images a probe trains on, and how it is trained and tested."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float, Float64, Int64

from kdcli.console import console
from kdcli.metrics.checks import check_classes
from kdcli.probing.solver import Classifier, Method, fit

C_GRID: Final[Sequence[float]] = (0.01, 0.1, 1.0, 10.0)
DEFAULT_C: Final = 1.0
MAX_FOLDS: Final = 5
_CHUNK = 4096


@final
@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of a probe.

    Attributes:
        accuracy: fraction of the test images.
        c: regularisation chosen by cross-validation.
        fits: problems solved.
        unconverged: of these, how many stopped early.
    """

    accuracy: float
    c: float
    fits: int
    unconverged: int


def shot_draws(
    labels: Int64[np.ndarray, " n"],
    shots: int,
    draws: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> Int64[np.ndarray, "draws k"]:
    """Draw the training images of every draw: ``shots`` per class, all of a class that has fewer.

    They depend on nothing but the arguments, so all representations are probed on the same draws and
    comparisons are paired (trap T14); the first draws are the same however many there are.

    Args:
        labels: class index, -1 for images without a label (never drawn).
        shots: images per class and draw.
        draws: how many draws.
        seed: of a counter-based generator: the same draws on every machine.
        class_names: names of the classes, for errors and warnings.

    Returns:
        Positions in ``labels``, class after class, in random order within a class.

    Raises:
        BadDataError: no labels, one class only, or a class with a single image.
    """
    labelled = np.flatnonzero(labels >= 0)
    check_classes(labels[labelled], class_names)
    order = labelled[np.argsort(labels[labelled], kind="stable")]
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    _warn_small_classes(members, labels, shots, class_names)
    rng = np.random.Generator(np.random.Philox(seed))
    return np.stack(
        [np.concatenate([rng.permutation(rows)[:shots] for rows in members]) for _ in range(draws)]
    )


def _warn_small_classes(
    members: Sequence[Int64[np.ndarray, " _"]],
    labels: Int64[np.ndarray, " n"],
    shots: int,
    class_names: Sequence[str] | None,
) -> None:
    small = [rows for rows in members if len(rows) < shots]
    if small:
        first = int(labels[small[0][0]])
        name = class_names[first] if class_names else first
        console.warn(
            f"{len(small)} of {len(members)} classes have fewer than {shots} images and use all they have "
            f"(class '{name}' has {len(small[0])})"
        )


def few_shot_accuracies(
    train: Float[np.ndarray, "n d"],
    train_labels: Int64[np.ndarray, " n"],
    draws: Int64[np.ndarray, "draws k"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int64[np.ndarray, " m"],
    grid: Sequence[float] = C_GRID,
    method: Method = "exact",
    device: str = "cpu",
) -> Iterator[Draw]:
    """P1's few-shot linear probe, one draw after the other.

    Standardise by the shots alone; linear SVM (squared hinge, one-vs-rest) with C from ``grid`` by
    stratified cross-validation on the shots; test on all test images. P1 §4.1 names the SVM, 5-fold
    cross-validation and 50 draws; grid, scaling and loss are our choice.

    Folds: the smaller of 5 and the images of the largest class. A class with fewer is spread over some
    folds; every class has two shots or more, so each is in every training part. With one shot per
    class there is nothing to hold out: C = 1, with a warning.

    Args:
        train: features that ``draws`` index.
        train_labels: class index of each.
        draws: of :func:`shot_draws`.
        test: features of the test images.
        test_labels: class index of each.
        grid: values of C.
        method: the solver.
        device: torch device of the exact solver.

    Yields:
        One result per row of ``draws``; nothing of a draw is kept.
    """
    folds = min(MAX_FOLDS, int(np.max(np.bincount(train_labels[draws[0]]))))
    if folds < 2 and len(grid) > 1:
        console.warn(f"one shot per class leaves nothing to hold out: C = {DEFAULT_C:g}, no cross-validation")
        grid = (DEFAULT_C,)
    for rows in draws:
        shots = train[rows].astype(np.float64)
        classifier = standardised_fit(shots, train_labels[rows], grid, folds, method, device)
        accuracy = _accuracy(classifier, test, test_labels)
        yield Draw(accuracy, classifier.c, classifier.fits, classifier.unconverged)


def standardised_fit(
    shots: Float64[np.ndarray, "k d"],
    labels: Int64[np.ndarray, " k"],
    grid: Sequence[float],
    folds: int,
    method: Method = "exact",
    device: str = "cpu",
) -> Classifier:
    """Fit on standardised shots and fold the scaling into the coefficients: test images need none.

    Args:
        shots: features of the training images; the scaler sees nothing else.
        labels: class index of each.
        grid: values of C.
        folds: of the cross-validation; the scaling stays that of all shots.
        method: the solver.
        device: torch device of the exact solver.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(shots)
    scaled = fit(scaler.transform(shots), labels, grid, folds, method, device)
    coefficients = scaled.coefficients / scaler.scale_
    intercepts = scaled.intercepts - coefficients @ scaler.mean_
    return Classifier(coefficients, intercepts, scaled.classes, scaled.c, scaled.fits, scaled.unconverged)


def _accuracy(
    classifier: Classifier, test: Float[np.ndarray, "m d"], labels: Int64[np.ndarray, " m"]
) -> float:
    right = 0
    for start in range(0, len(test), _CHUNK):  # a float64 copy of a whole test set may not fit
        part = slice(start, start + _CHUNK)
        right += int((classifier.predict(test[part].astype(np.float64)) == labels[part]).sum())
    return right / len(test)


def report_convergence(draws: Sequence[Draw]) -> None:
    """Say once, for all draws, how many fits stopped early."""
    fits = sum(draw.fits for draw in draws)
    unconverged = sum(draw.unconverged for draw in draws)
    if unconverged:
        console.warn(
            f"{unconverged} of {fits} fits stopped before they converged; accuracies may be slightly off"
        )
