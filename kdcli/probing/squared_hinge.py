"""The exact squared-hinge SVM of few samples: all classes at once, in sample space, by active sets.

LinearSVC minimises, for each class with signs y, over w that contains the intercept (every sample has a
further feature 1; the intercept is regularised like any other coefficient):

    1/2 |w|^2 + C sum_i max(0, 1 - y_i w.x_i)^2

The solution is w = sum_i beta_i x_i with beta_i = 2C (y_i - w.x_i) for the active samples (y_i w.x_i < 1)
and 0 for the others. With the Gram matrix G and the active set A that is one linear system,
(G_AA + I/2C) beta_A = y_A, and Newton's method repeats it with the new active set until that stays
(Keerthi & DeCoste 2005). Nothing here depends on the number of features.

With K = G + I/2C and H = K^-1, beta = Hy where all samples are active, which is so at small C: one
factorisation serves all classes. A class with a set N of inactive samples corrects this:
beta = Hy - H_:N H_NN^-1 (Hy)_N. So the system that is solved has the smaller of |A| and |N| unknowns.
"""

from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

MAX_STEPS: Final = 60
SLACK: Final = 1e-10
"""A sample this close to its margin is both active and not: its loss is the square of this."""
_ELEMENTS = 1 << 22
"""Numbers in the systems solved together: 32 MiB of them."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Of one problem per class.

    Attributes:
        beta: the samples' weights; column k gives w_k = sum_i beta_ik x_i and its intercept is the sum.
        active: the samples inside the margin or on the wrong side; the next C may start from them.
        converged: by class; False where the active set still changed after ``MAX_STEPS``.
    """

    beta: Float64[Tensor, "n k"]
    active: Bool[Tensor, "n k"]
    converged: Bool[Tensor, " k"]


def gram_matrix(samples: Float64[Tensor, "n d"]) -> Float64[Tensor, "n n"]:
    """Inner products of the samples with their feature 1 for the intercept."""
    return samples @ samples.T + 1.0


def solve(
    gram: Float64[Tensor, "n n"],
    signs: Float64[Tensor, "n k"],
    c: float,
    active: Bool[Tensor, "n k"] | None = None,
) -> Solution:
    """Minimise the squared-hinge objective of every class.

    Args:
        gram: of :func:`gram_matrix`, of the training samples.
        signs: +1 for the samples of the class, -1 for the others.
        c: weight of the losses, positive.
        active: where to start, of another C; default: all samples.

    Returns:
        The minimiser, exact but for rounding where ``converged``.
    """
    system = _System(gram, signs, c)
    active = torch.ones_like(signs, dtype=torch.bool) if active is None else active.clone()
    beta, scores = torch.zeros_like(signs), torch.zeros_like(signs)
    converged = torch.zeros(signs.shape[1], dtype=torch.bool, device=signs.device)
    pending = torch.arange(signs.shape[1], device=signs.device)
    value = torch.full((signs.shape[1],), torch.inf, dtype=signs.dtype, device=signs.device)
    for _ in range(MAX_STEPS):
        y, before = signs[:, pending], active[:, pending]
        step = system.stationary(pending, before)
        step_scores = gram @ step
        # Of active samples this is what y - scores is, without its rounding.
        slack = torch.where(before, y * step / (2 * c), 1 - y * step_scores)
        done = (((slack > 0) == before) | (slack.abs() <= SLACK)).all(dim=0)
        found = objective(step, step_scores, y, c)
        worse = ~done & (found >= value[pending])
        if worse.any():
            step, step_scores, found = _shortened(
                (beta[:, pending], scores[:, pending], value[pending]),
                (step, step_scores, found), y, c, worse,
            )  # fmt: skip
            slack = torch.where(worse, 1 - y * step_scores, slack)
        beta[:, pending], scores[:, pending], value[pending] = step, step_scores, found
        active[:, pending] = torch.where(done, before, slack > 0)
        converged[pending] = done
        pending = pending[~done]
        if not len(pending):
            break
    return Solution(beta, active, converged)


def objective(
    beta: Float64[Tensor, "n k"], scores: Float64[Tensor, "n k"], signs: Float64[Tensor, "n k"], c: float
) -> Float64[Tensor, " k"]:
    """LinearSVC's primal objective of each class; ``scores`` = Gram matrix times ``beta``."""
    losses = (1 - signs * scores).clamp_min(0).square().sum(dim=0)
    return 0.5 * (beta * scores).sum(dim=0) + c * losses


def dual_objective(
    gram: Float64[Tensor, "n n"], beta: Float64[Tensor, "n k"], signs: Float64[Tensor, "n k"], c: float
) -> Float64[Tensor, " k"]:
    """The dual objective at the feasible point nearest ``beta``: a lower bound of the optimum."""
    alpha = (signs * beta).clamp_min(0)
    weights = signs * alpha
    return alpha.sum(0) - 0.5 * (weights * (gram @ weights)).sum(0) - alpha.square().sum(0) / (4 * c)


Iterate = tuple[Tensor, Tensor, Tensor]
"""Weights, scores and objective of some classes."""


def _shortened(start: Iterate, end: Iterate, signs: Tensor, c: float, worse: Tensor) -> Iterate:
    """Go from ``start`` towards ``end`` by halves in the columns ``worse``, until the objective falls.

    The direction is one of descent (the system is the Newton step's), so it does, but for rounding.
    """
    length = torch.where(worse, 0.5, 1.0).to(signs.dtype)
    for _ in range(40):
        beta, scores = (
            torch.where(worse, a + length * (b - a), b) for a, b in zip(start[:2], end[:2], strict=True)
        )
        value = objective(beta, scores, signs, c)
        still = worse & (value >= start[2])
        if not still.any():
            break
        length = torch.where(still, length / 2, length)
    return beta, scores, value


@final
class _System:
    """The linear systems of one Gram matrix and one C; what classes share is computed once.

    Args:
        gram: of the training samples.
        signs: of all classes.
        c: weight of the losses.
    """

    def __init__(self, gram: Tensor, signs: Tensor, c: float) -> None:
        self._signs = signs
        self._matrix = gram.clone()
        self._matrix.diagonal().add_(1 / (2 * c))
        self._factor = torch.linalg.cholesky(self._matrix)
        self._everything = torch.cholesky_solve(signs, self._factor)
        self._inverse: Tensor | None = None

    def stationary(self, classes: Int64[Tensor, " p"], active: Bool[Tensor, "n p"]) -> Float64[Tensor, "n p"]:
        """The weights that ``active`` sets imply, a column for each of ``classes``; 0 where not active."""
        n = active.shape[0]
        sizes = active.sum(dim=0)
        few, many = (sizes * 2 <= n).nonzero()[:, 0], ((sizes * 2 > n) & (sizes < n)).nonzero()[:, 0]
        beta = self._everything[:, classes]
        if len(few):
            beta[:, few] = self._solved(self._matrix, active[:, few], self._signs[:, classes[few]])
        if len(many):
            if self._inverse is None:
                self._inverse = torch.cholesky_inverse(self._factor)
            correction = self._solved(self._inverse, ~active[:, many], beta[:, many])
            beta[:, many] -= self._inverse @ correction
        return beta.masked_fill_(~active, 0)

    @staticmethod
    def _solved(matrix: Tensor, chosen: Tensor, right: Tensor) -> Tensor:
        """Solve ``matrix[s, s] z = right[s]`` for the rows s ``chosen`` in each column; 0 elsewhere."""
        sizes = chosen.sum(dim=0)
        order = sizes.argsort(descending=True)
        ordered = sizes[order].tolist()
        found = torch.zeros_like(right)
        start = 0
        while start < len(ordered) and ordered[start]:
            size = ordered[start]
            stop = min(len(ordered), start + max(1, _ELEMENTS // size**2))
            # Padding to the largest of a group costs its cube: a group ends where sizes fall by a tenth.
            stop = next((i for i in range(start, stop) if ordered[i] < 0.9 * size), stop)
            columns = order[start:stop]
            mask, rows = chosen[:, columns].T.to(torch.int8).sort(dim=1, descending=True, stable=True)
            rows, valid = rows[:, :size], mask[:, :size].bool()
            systems = matrix[rows[:, :, None], rows[:, None, :]]
            if ordered[stop - 1] < size:
                systems = torch.where(
                    valid[:, :, None] & valid[:, None, :],
                    systems,
                    torch.eye(size, dtype=matrix.dtype, device=matrix.device),
                )
            known = right.T[columns].gather(1, rows).masked_fill_(~valid, 0)
            factors = torch.linalg.cholesky(systems)
            solved = torch.cholesky_solve(known[:, :, None], factors)[:, :, 0]
            found[:, columns] = torch.zeros_like(right[:, columns]).T.scatter_(1, rows, solved).T
            start = stop
        return found
