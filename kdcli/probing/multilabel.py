"""Probes of images with several labels each, judged by mean average precision (our choice; P1 names none)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from kdcli.console import console
from kdcli.errors import BadDataError
from kdcli.metrics.average_precision import average_precisions
from kdcli.probing.neighbours import Neighbours
from kdcli.probing.protocols import EXACT_ROWS, MAX_FOLDS, Drawn
from kdcli.probing.solver import Fold, Linear, LinearName, Sklearn, choose_c, one_thread_if_small

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


def multi_label_draws(data: Drawn, how: Linear | None, neighbours: int) -> Iterator[LabelDraw]:
    """Probe draw after draw: a binary problem per label, one C for all labels, chosen by mAP.

    Args:
        data: labels are 0/1 rows.
        how: the linear classifiers; many rows are liblinear's in any case. None: neighbours' votes.
        neighbours: k of these.

    Yields:
        One result per draw.
    """
    from sklearn.preprocessing import StandardScaler

    for shots, own in data.shots():
        if how is None:
            votes = Neighbours(shots, own.astype(np.float64), neighbours).votes
            scores = _chunked(votes, data.test, own.shape[1])
            yield LabelDraw(average_precisions(data.test_labels, scores), None, 0, 0)
            continue
        exact = how.kind == "svm" and how.method == "exact" and len(shots) <= EXACT_ROWS
        scaler, fitter = StandardScaler().fit(shots), _Exact(how.device) if exact else _OneByOne(how.kind)
        scaled = scaler.transform(shots)
        c = _choose(scaled, own, how, fitter)
        ((weights, intercepts),) = fitter.path(scaled, own, (c,))
        weights = weights / scaler.scale_
        linear = _linear(weights, intercepts - weights @ scaler.mean_)
        scores = _chunked(linear, data.test, own.shape[1])
        yield LabelDraw(average_precisions(data.test_labels, scores), c, fitter.fits, fitter.unconverged)


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
    rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], how: Linear, fitter: "_Fitter"
) -> float:
    from sklearn.model_selection import KFold

    grid, folds = sorted(how.grid), how.folds or MAX_FOLDS
    alone = len(grid) == 1 or len(rows) < folds
    parts = [] if alone else list(KFold(folds, shuffle=True, random_state=0).split(rows))

    def precisions_of(fold: Fold) -> list[float]:
        train, held_out = fold
        found = [
            average_precisions(labels[held_out], _linear(*fitted)(rows[held_out]))
            for fitted in fitter.path(rows[train], labels[train], grid)
        ]
        # A fold whose held-out rows all agree ranks nothing, whatever C is.
        return [float(np.nanmean(each)) if np.isfinite(each).any() else 0.0 for each in found]

    return choose_c(grid, parts, precisions_of)


Fitted = tuple[Float64[np.ndarray, "l d"], Float64[np.ndarray, " l"]]
"""Weights and intercepts of all labels."""


class _Fitter(ABC):
    """One-vs-rest linear classifiers, counting the problems solved and those that did not converge."""

    def __init__(self) -> None:
        self.fits = self.unconverged = 0

    def path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Fitted]:
        """One fit per C, ascending; 0 for a label that all of these images have, or none."""
        some = np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0))
        nothing: Fitted = (np.zeros((0, rows.shape[1])), np.zeros(0))
        for found in self._path(rows, labels[:, some], grid) if len(some) else (nothing for _ in grid):
            weights, intercepts = np.zeros((labels.shape[1], rows.shape[1])), np.zeros(labels.shape[1])
            weights[some], intercepts[some] = found
            yield weights, intercepts

    @abstractmethod
    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Fitted]: ...


@final
class _Exact(_Fitter):
    """The SVM in sample space: all labels at once, each C from the active sets of the one before."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Fitted]:
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
class _OneByOne(_Fitter):
    """LinearSVC or LogisticRegression, label by label."""

    def __init__(self, kind: LinearName) -> None:
        super().__init__()
        self._kind = kind

    def _path(
        self, rows: Float64[np.ndarray, "n d"], labels: Bool[np.ndarray, "n l"], grid: Sequence[float]
    ) -> Iterator[Fitted]:
        solver = Sklearn(self._kind, dual=rows.shape[0] < rows.shape[1], tolerance=1e-5)
        for c in grid:
            found = [solver.solve(rows, label, c) for label in labels.T]
            yield (
                np.array([each.coefficients[1] for each in found]),
                np.array([each.intercepts[1] for each in found]),
            )
        self.fits, self.unconverged = self.fits + solver.fits, self.unconverged + solver.unconverged
