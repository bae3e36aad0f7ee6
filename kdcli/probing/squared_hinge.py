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

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

MAX_STEPS: Final = 60
GAP: Final = 1e-8
"""Duality gap, relative to the objective, at which a problem counts as solved even if active sets still move."""
PATIENCE: Final = 8
"""Steps after which one that would raise the objective shows that the start was too far away: dozens would follow."""
_REFINEMENTS = 3
_HALVINGS = 40
SLACK: Final = 1e-10
"""A sample this close to its margin is both active and not: its loss is the square of this."""
_ELEMENTS = 1 << 22
"""Numbers in the systems solved together: 32 MiB of them."""
_PADDING = 24
"""Rows that a system may be padded with however small it is."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Of one problem per class.

    Attributes:
        beta: the samples' weights; column k gives w_k = sum_i beta_ik x_i and its intercept is the sum.
        active: the samples inside the margin or on the wrong side; the next C may start from them.
        converged: by class; False where the active set did not settle and the duality gap is above ``GAP``.
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
        active: where to start, of another C; default: all samples. A class that is lost there starts once more
            from its solution at C / 10, and that, if need be, from the one at C / 100: where C is so small that
            all samples are active, the first step is the solution.

    Returns:
        The minimiser, exact but for rounding where ``converged``.
    """
    c = min(c, largest_c(gram))
    system = _System(gram, signs, c)
    active = torch.ones_like(signs, dtype=torch.bool) if active is None else active.clone()
    beta, scores = torch.zeros_like(signs), torch.zeros_like(signs)
    converged = torch.zeros(signs.shape[1], dtype=torch.bool, device=signs.device)
    pending = torch.arange(signs.shape[1], device=signs.device)
    value = torch.full((signs.shape[1],), torch.inf, dtype=signs.dtype, device=signs.device)
    may_return = torch.ones_like(converged)
    for taken in range(MAX_STEPS):
        y, before = signs[:, pending], active[:, pending]
        step, step_scores = system.stationary(pending, before)
        # Of active samples this is what y - scores is, without its rounding.
        slack = torch.where(before, y * step / (2 * c), 1 - y * step_scores)
        done = (((slack > 0) == before) | (slack.abs() <= SLACK)).all(dim=0)
        found = objective(step, step_scores, y, c)
        worse = ~done & (found >= value[pending])
        finished = done
        # The one read of a step here: on a graphics card each waits for all that was asked of it.
        some_done, some_worse, some_lost = torch.stack(
            [done.any(), worse.any(), (worse & may_return[pending]).any()]
        ).tolist()
        if taken >= PATIENCE and some_lost:
            lost = pending[worse & may_return[pending]]
            active[:, lost] = solve(gram, signs[:, lost], c / 10).active
            value[lost], may_return[lost] = torch.inf, False
            continue
        if some_worse:
            (step, step_scores, found), stuck = _shortened(
                (beta[:, pending], scores[:, pending], value[pending]),
                (step, step_scores, found), y, c, worse,
            )  # fmt: skip
            slack = torch.where(worse, 1 - y * step_scores, slack)
            finished = done | stuck
        beta[:, pending], scores[:, pending], value[pending] = step, step_scores, found
        active[:, pending] = torch.where(done, before, slack > 0)
        converged[pending] = done
        if some_done or some_worse:
            pending = pending[~finished]
        if not len(pending):
            break
    if not converged.all():  # rounding may keep samples at their margin from settling: the optimum is reached
        gap = value - dual_objective(gram, beta, signs, c)
        converged |= gap <= GAP * value
    return Solution(beta, active, converged)


def largest_c(gram: Float64[Tensor, "n n"]) -> float:
    """The C that larger ones are solved as: their 1/2C would drown in the rounding of a factorisation.

    Duplicate samples make the Gram matrix singular, and then 1/2C is all that keeps its systems solvable.
    It is 2e8 for 500 samples of 2048 standardised features.
    """
    rounding = 10 * len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())
    return 1 / (2 * rounding)


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


def _shortened(
    start: Iterate, end: Iterate, signs: Tensor, c: float, worse: Bool[Tensor, " p"]
) -> tuple[Iterate, Bool[Tensor, " p"]]:
    """Go from ``start`` towards ``end`` by halves in the columns ``worse``, until the objective falls.

    The direction is one of descent (the system is the Newton step's), so it does, but for rounding.

    Returns:
        Where that leads, and the columns in which rounding hides all descent: they stay at ``start``.
    """
    length = torch.where(worse, 0.5, 1.0).to(signs.dtype)
    for _ in range(_HALVINGS):
        beta, scores = (
            torch.where(worse, a + length * (b - a), b) for a, b in zip(start[:2], end[:2], strict=True)
        )
        value = objective(beta, scores, signs, c)
        still = worse & (value >= start[2])
        if not still.any():
            break
        length = torch.where(still, length / 2, length)
    beta, scores, value = (
        torch.where(still, a, b) for a, b in zip(start, (beta, scores, value), strict=True)
    )
    return (beta, scores, value), still


@final
class _System:
    """The linear systems of one Gram matrix and one C; what classes share is computed once.

    Args:
        gram: of the training samples.
        signs: of all classes.
        c: weight of the losses.
    """

    def __init__(self, gram: Tensor, signs: Tensor, c: float) -> None:
        self._gram, self._signs = gram, signs
        self._ridge = 1 / (2 * c)
        self._matrix = gram.clone()
        self._matrix.diagonal().add_(self._ridge)
        self._factor = torch.linalg.cholesky(self._matrix)
        self._everything = torch.cholesky_solve(signs, self._factor)
        self._inverse: Tensor | None = None

    def stationary(
        self, classes: Int64[Tensor, " p"], active: Bool[Tensor, "n p"]
    ) -> tuple[Float64[Tensor, "n p"], Float64[Tensor, "n p"]]:
        """The weights that ``active`` sets imply, a column for each of ``classes``, and their scores.

        Weights are 0 where not active. What the systems leave over, which is much where duplicates meet a
        large C, is solved for again.
        """
        y, parts = self._signs[:, classes], _parts(active)
        beta = self._restricted(self._everything[:, classes], y, active, parts)
        scores = self._gram @ beta
        for _ in range(_REFINEMENTS):
            left = (y - scores - self._ridge * beta).masked_fill_(~active, 0)
            if left.abs().max() <= SLACK:
                break
            beta = beta + self._restricted(torch.cholesky_solve(left, self._factor), left, active, parts)
            scores = self._gram @ beta
        return beta, scores

    def _restricted(
        self,
        everything: Float64[Tensor, "n p"],
        right: Float64[Tensor, "n p"],
        active: Bool[Tensor, "n p"],
        parts: tuple[Int64[Tensor, " f"], Int64[Tensor, " m"]],
    ) -> Float64[Tensor, "n p"]:
        """Solve the systems of the ``active`` rows; ``everything`` is the solution of all rows."""
        beta, (few, many) = everything.clone(), parts
        if len(few):
            beta[:, few] = self._solved(self._matrix, active[:, few], right[:, few])
        if len(many):
            if self._inverse is None:
                self._inverse = torch.cholesky_inverse(self._factor)
            correction = self._solved(self._inverse, ~active[:, many], beta[:, many])
            beta[:, many] -= self._inverse @ correction
        return beta.masked_fill_(~active, 0)

    @staticmethod
    def _solved(matrix: Tensor, chosen: Tensor, right: Tensor) -> Tensor:
        """Solve ``matrix[s, s] z = right[s]`` for the rows s ``chosen`` in each column; 0 elsewhere."""
        solve_systems = one_by_one if matrix.device.type == "cpu" else in_batches
        return solve_systems(matrix, chosen, right)


def _parts(active: Bool[Tensor, "n p"]) -> tuple[Int64[Tensor, " f"], Int64[Tensor, " m"]]:
    """The columns of which at most half of the rows are active, and those of which more, but not all, are."""
    n, sizes = active.shape[0], active.sum(dim=0).tolist()
    few = [column for column, size in enumerate(sizes) if size * 2 <= n]
    many = [column for column, size in enumerate(sizes) if n < size * 2 < 2 * n]
    return torch.tensor(few, device=active.device, dtype=torch.int64), torch.tensor(
        many, device=active.device, dtype=torch.int64
    )


def in_batches(
    matrix: Float64[Tensor, "n n"], chosen: Bool[Tensor, "n p"], right: Float64[Tensor, "n p"]
) -> Float64[Tensor, "n p"]:
    """Solve ``matrix[s, s] z = right[s]`` for the rows s ``chosen`` in each column; 0 elsewhere.

    Systems of nearly equal size together, which is what a GPU needs.
    """
    sizes, order = chosen.sum(dim=0).sort(descending=True)
    ordered = sizes.tolist()
    found = torch.zeros_like(right.T)
    rows, valid = _listed(chosen.T[order], sizes, ordered[0])
    start = 0
    while start < len(ordered) and ordered[start]:
        size = ordered[start]
        # Padding to the largest of a group costs its cube, but of small ones less than another group.
        least = size - max(_PADDING, size // 10)
        limit = min(len(ordered), start + max(1, _ELEMENTS // size**2))
        stop = next((i for i in range(start, limit) if ordered[i] < least), limit)
        columns, own, real = order[start:stop], rows[start:stop, :size], valid[start:stop, :size]
        systems = matrix[own[:, :, None], own[:, None, :]]
        if ordered[stop - 1] < size:
            identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
            systems = torch.where(real[:, :, None] & real[:, None, :], systems, identity)
        known = right.T[columns].gather(1, own).masked_fill_(~real, 0)
        factors = torch.linalg.cholesky(systems)
        solved = torch.cholesky_solve(known[:, :, None], factors)[:, :, 0]
        # The padding's rows are all row 0, and its solutions 0.
        found[columns] = torch.zeros_like(right.T[columns]).scatter_add_(1, own, solved)
        start = stop
    return found.T


def one_by_one(
    matrix: Float64[Tensor, "n n"], chosen: Bool[Tensor, "n p"], right: Float64[Tensor, "n p"]
) -> Float64[Tensor, "n p"]:
    """:func:`in_batches` on the CPU, whose padding, masks and copies took twice as long as all of this."""
    from scipy.linalg import lapack

    dense, known = matrix.contiguous().numpy(), right.numpy()  # take would copy a matrix by columns each time
    found = np.zeros(right.shape)
    for column, mask in enumerate(chosen.T.numpy()):
        rows = np.flatnonzero(mask)
        if len(rows):
            system = dense.take(rows, axis=0).take(rows, axis=1).T  # symmetric; LAPACK wants columns
            _, found[rows, column], failed = lapack.dposv(system, known[rows, column], overwrite_a=1)
            if failed:
                raise np.linalg.LinAlgError(f"a system of {len(rows)} samples is not positive definite")
    return torch.from_numpy(found)


def _listed(
    chosen: Bool[Tensor, "k n"], sizes: Int64[Tensor, " k"], most: int
) -> tuple[Int64[Tensor, "k most"], Bool[Tensor, "k most"]]:
    """The chosen columns of each row in order, filled up with 0, and which of them are not filling."""
    listed = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    valid = torch.arange(most, device=chosen.device) < sizes[:, None]
    return listed.masked_fill(~valid, 0), valid
