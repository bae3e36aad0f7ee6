"""Protocols of P1: which images a probe trains on, and how it is trained and tested."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from jaxtyping import Float, Float64, Int64

from kdcli.console import console
from kdcli.metrics.checks import check_classes
from kdcli.probing.logistic import fit_logistic
from kdcli.probing.marks import Decide, Marks, mark
from kdcli.probing.neighbours import Neighbours, one_hot
from kdcli.probing.solver import Classifier, Method, fit

C_GRID: Final[Sequence[float]] = (0.01, 0.1, 1.0, 10.0)
DEFAULT_C: Final = 1.0
MAX_FOLDS: Final = 5
EXACT_ROWS: Final = 2000
"""Training images from which ``exact``, whose time grows with their cube, leaves the problem to liblinear."""

LinearName = Literal["svm", "logistic"]


@final
@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of a probe.

    Attributes:
        accuracy: fraction of the test images.
        c: regularisation chosen by cross-validation; None of a probe that has none.
        fits: problems solved.
        unconverged: of these, how many stopped early.
        marks: which test images were right.
        choice: what else was chosen, such as a learning rate.
    """

    accuracy: float
    c: float | None
    fits: int
    unconverged: int
    marks: Marks | None = None
    choice: dict[str, float] | None = None


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
    folds: int | None = None,
    kind: LinearName = "svm",
) -> Iterator[Draw]:
    """P1's linear probe, one draw after the other; the draw of all images is the full-data probe.

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
        method: the SVM's solver.
        device: torch device of the exact solver.
        folds: of the cross-validation, at most the images of the largest class; default: as above.
        kind: the classifier.

    Yields:
        One result per row of ``draws``; nothing of a draw is kept.
    """
    folds = folds or default_folds(train_labels[draws[0]])
    if folds < 2 and len(grid) > 1:
        console.warn(f"one shot per class leaves nothing to hold out: C = {DEFAULT_C:g}, no cross-validation")
        grid = (DEFAULT_C,)
    if draws.shape[1] > EXACT_ROWS:
        method = "sklearn"
    for rows in draws:
        shots = train[rows].astype(np.float64)
        classifier = standardised_fit(shots, train_labels[rows], grid, folds, method, device, kind)
        marks = mark(classifier_scores(classifier), classifier.classes, test, test_labels)
        accuracy = float(marks.top1.mean())
        yield Draw(accuracy, classifier.c, classifier.fits, classifier.unconverged, marks)


def default_folds(labels: Int64[np.ndarray, " k"]) -> int:
    """Folds for the images of one draw: 5, or the images of the largest class where they are fewer."""
    return min(MAX_FOLDS, int(np.max(np.bincount(labels))))


def neighbour_accuracies(
    train: Float[np.ndarray, "n d"],
    train_labels: Int64[np.ndarray, " n"],
    draws: Int64[np.ndarray, "draws k"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int64[np.ndarray, " m"],
    neighbours: int,
) -> Iterator[Draw]:
    """The weighted k-nearest-neighbour probe, one draw after the other; arguments as above."""
    for rows in draws:
        classes, targets = one_hot(train_labels[rows])
        probe = Neighbours(train[rows].astype(np.float64), targets, neighbours)
        marks = mark(probe.scores, classes, test, test_labels)
        yield Draw(float(marks.top1.mean()), None, 0, 0, marks)


def standardised_fit(
    shots: Float64[np.ndarray, "k d"],
    labels: Int64[np.ndarray, " k"],
    grid: Sequence[float],
    folds: int,
    method: Method = "exact",
    device: str = "cpu",
    kind: LinearName = "svm",
) -> Classifier:
    """Fit on standardised shots and fold the scaling into the coefficients: test images need none.

    Args:
        shots: features of the training images; the scaler sees nothing else.
        labels: class index of each.
        grid: values of C.
        folds: of the cross-validation; the scaling stays that of all shots.
        method: the solver.
        device: torch device of the exact solver.
        kind: the classifier.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(shots)
    rows = scaler.transform(shots)
    if kind == "logistic":
        scaled = fit_logistic(rows, labels, grid, folds)
    else:
        scaled = fit(rows, labels, grid, folds, method, device)
    coefficients = scaled.coefficients / scaler.scale_
    intercepts = scaled.intercepts - coefficients @ scaler.mean_
    return Classifier(coefficients, intercepts, scaled.classes, scaled.c, scaled.fits, scaled.unconverged)


def classifier_scores(classifier: Classifier) -> Decide:
    """The decision values of a classifier, as :func:`~kdcli.probing.marks.mark` wants them."""
    return lambda features: features @ classifier.coefficients.T + classifier.intercepts


def report_convergence(fits: int, unconverged: int) -> None:
    """Say once, for all draws, how many fits stopped early."""
    if unconverged:
        console.warn(
            f"{unconverged} of {fits} fits stopped before they converged; accuracies may be slightly off"
        )


def report_edge(name: str, chosen: Sequence[float], grid: Sequence[float]) -> None:
    """Say where most draws of a probe chose the first or the last value of the grid of C: the best may lie beyond.

    The smallest of equally accurate values is chosen, so the first one may be as good as any: then nothing is lost
    by a longer grid but time.

    Args:
        name: of representation and target.
        chosen: C of every draw.
        grid: all values that could be chosen; of a lone one nothing is said.
    """
    if len(set(grid)) < 2:
        return
    for edge, word in ((min(grid), "smallest"), (max(grid), "largest")):
        count = sum(c == edge for c in chosen)
        if 2 * count > len(chosen):
            console.note(
                f"{name}: {count} of {len(chosen)} draws chose the {word} C, {edge:g}; a longer --c-grid may do better"
            )
