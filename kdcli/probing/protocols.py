"""Protocols of P1: which images a probe trains on, and how it is trained and tested."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from kdcli.console import console
from kdcli.metrics.checks import check_classes
from kdcli.probing.marks import Decide, Marks, mark
from kdcli.probing.neighbours import Neighbours, one_hot
from kdcli.probing.solver import Classifier, Linear, Method, fit

DEFAULT_C: Final = 1.0
MAX_FOLDS: Final = 5
EXACT_ROWS: Final = 2000
"""Training images from which ``exact``, whose time grows with their cube, leaves the problem to liblinear."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a probe learns from and is tested on.

    Attributes:
        train: features that ``draws`` index.
        labels: class index of each, or which labels each has.
        draws: rows of the training images, of each draw.
        test: features of the test images.
        test_labels: class index of each, or which labels each has.
    """

    train: Float[np.ndarray, "n d"]
    labels: Shaped[np.ndarray, "n ..."]
    draws: Int64[np.ndarray, "draws k"]
    test: Float[np.ndarray, "m d"]
    test_labels: Shaped[np.ndarray, "m ..."]

    def shots(self) -> Iterator[tuple[Float64[np.ndarray, "k d"], Shaped[np.ndarray, "k ..."]]]:
        """Features, in float64, and labels of each draw."""
        for rows in self.draws:
            yield self.train[rows].astype(np.float64), self.labels[rows]


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


def few_shot_accuracies(data: Drawn, how: Linear = Linear()) -> Iterator[Draw]:  # noqa: B008 - immutable
    """P1's linear probe, one draw after the other; the draw of all images is the full-data probe.

    Standardise by the shots alone; linear SVM (squared hinge, one-vs-rest) with C from ``grid`` by
    stratified cross-validation on the shots; test on all test images. P1 §4.1 names the SVM, 5-fold
    cross-validation and 50 draws; grid, scaling and loss are our choice.

    Folds: the smaller of 5 and the images of the largest class. A class with fewer is spread over some
    folds; every class has two shots or more, so each is in every training part. With one shot per
    class there is nothing to hold out: C = 1, with a warning.

    Args:
        data: labels are class indices; draws of :func:`shot_draws`.
        how: folds at most as many as the images of the largest class; default: as above.

    Yields:
        One result per draw; nothing of a draw is kept.
    """
    folds = how.folds or default_folds(data.labels[data.draws[0]])
    grid = how.grid
    if folds < 2 and len(grid) > 1:
        console.warn(f"one shot per class leaves nothing to hold out: C = {DEFAULT_C:g}, no cross-validation")
        grid = (DEFAULT_C,)
    method: Method = "sklearn" if data.draws.shape[1] > EXACT_ROWS else how.method
    how = replace(how, grid=grid, folds=folds, method=method)
    for shots, labels in data.shots():
        classifier = standardised_fit(shots, labels, how)
        marks = mark(classifier_scores(classifier), classifier.classes, data.test, data.test_labels)
        accuracy = float(marks.top1.mean())
        yield Draw(accuracy, classifier.c, classifier.fits, classifier.unconverged, marks)


def default_folds(labels: Int64[np.ndarray, " k"]) -> int:
    """Folds for the images of one draw: 5, or the images of the largest class where they are fewer."""
    return min(MAX_FOLDS, int(np.max(np.bincount(labels))))


def neighbour_accuracies(data: Drawn, neighbours: int) -> Iterator[Draw]:
    """The weighted k-nearest-neighbour probe, one draw after the other."""
    for shots, labels in data.shots():
        classes, targets = one_hot(labels)
        probe = Neighbours(shots, targets, neighbours)
        marks = mark(probe.scores, classes, data.test, data.test_labels)
        yield Draw(float(marks.top1.mean()), None, 0, 0, marks)


def standardised_fit(
    shots: Float64[np.ndarray, "k d"], labels: Int64[np.ndarray, " k"], how: Linear
) -> Classifier:
    """Fit on standardised shots and fold the scaling into the coefficients: test images need none.

    Args:
        shots: features of the training images; the scaler sees nothing else, and stays the same in all folds.
        labels: class index of each.
        how: of the cross-validation and the fit.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(shots)
    scaled = fit(scaler.transform(shots), labels, how)
    coefficients = scaled.coefficients / scaler.scale_
    return replace(
        scaled, coefficients=coefficients, intercepts=scaled.intercepts - coefficients @ scaler.mean_
    )


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
                f"{name}: {count} of {len(chosen)} draws chose the {word} C, {edge:g}; a longer grid may do better: "
                f"--c-grid {','.join(f'{c:g}' for c in _longer(grid, edge))}"
            )


def _longer(grid: Sequence[float], edge: float) -> list[float]:
    """The grid with two more steps beyond an end, each as large as the last one there."""
    values = sorted(set(grid))
    ratio = values[0] / values[1] if edge == values[0] else values[-1] / values[-2]
    return sorted([*values, edge * ratio, edge * ratio**2])
