"""RKD: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (CVPR 2019).

    L_D = 1/b^2 sum_ij h(d_s - d_t),   d_ij = |x_i - x_j| / mean over all pairs                           (Eq. 5 to 8)
    L_A = 1/b^3 sum_ijk h(a_s - a_t),  a_ijk: cosine of the angle at x_i between x_j and x_k             (Eq. 9 to 11)
    L   = CE + 25 L_D + 50 L_A                                                                      [RepDistiller]

* h: Huber loss with threshold 1. Zeros, of the diagonals too, count in both means [RepDistiller's code].
* An image that comes twice in a step is in one place: at distance 0, with no direction from itself. The pair counts in
  the mean distance [RepDistiller: at 1e-6]. Where all images are in one place, all distances are 0.
* Both are taken of the products of centred features in float64: |x|^2 + |y|^2 - 2xy loses what it subtracts.
* The b^3 cosines are those of a b x b matrix. They are taken for some images at a time, together with their gradient,
  and never exist at once: b = 1024 needs no 8 GB but :data:`ELEMENTS`.
"""

from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kdcli.methods.relations import (
    NEEDS,
    SPARES,
    RelationalMethod,
    RelationOptions,
    Term,
    relation_weight_option,
)
from kdcli.methods.transfer import PRINTED

ELEMENTS = 2**21
"""Cosines that exist at once, unless those of one image are more."""
_SAME = 1e-6
"""Distance, as a share of both lengths, below which float32 tells no two features apart."""


def distance_loss(student: Float[Tensor, "b ds"], teacher: Float[Tensor, "b dt"]) -> Float[Tensor, ""]:
    """RKD-D: Huber loss of distances in units of their mean, over all b^2 pairs (Park et al. 2019, Eq. 5 to 8).

    Args:
        student: features.
        teacher: likewise, of any width.

    Returns:
        At least 0, in float64; 0 for fewer than three images.
    """
    ours, theirs = (_relative(_distances(_gram(each))) for each in (student, teacher))
    return functional.smooth_l1_loss(ours, theirs)


def angle_loss(student: Float[Tensor, "b ds"], teacher: Float[Tensor, "b dt"]) -> Float[Tensor, ""]:
    """RKD-A: Huber loss of cosines at each image, over all b^3 triplets (Park et al. 2019, Eq. 9 to 11).

    Its memory is O(b^2) and :data:`ELEMENTS`.

    Args:
        student: features.
        teacher: likewise, of any width.

    Returns:
        At least 0, in float64; 0 for fewer than three images.
    """
    loss: Float[Tensor, ""] = _AngleLoss.apply(_gram(student), _gram(teacher))
    return loss


def _gram(features: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Products of centred features in float64."""
    centred = features.double() - features.double().mean(dim=0)
    return centred @ centred.T


def _distances(gram: Float[Tensor, "b b"], rows: slice = slice(None)) -> Float[Tensor, "r b"]:
    """Between some points and all; 0, without a gradient, where two are the same."""
    lengths = gram.diagonal()
    both = lengths[rows, None] + lengths
    squares = both - 2 * gram[rows]
    apart: Bool[Tensor, "r b"] = ~(squares <= _SAME**2 * both)  # what is not a number stays so
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def _relative(distances: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """In units of the mean over all pairs."""
    mean = distances.sum() / max(1, len(distances) * (len(distances) - 1))
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(gram: Float[Tensor, "b b"], rows: slice) -> Float[Tensor, "r b b"]:
    """Of the angles at some points between all pairs of points; 0 where a side has no length."""
    distances = _distances(gram, rows)
    inverse = torch.where(distances > 0, 1 / torch.where(distances > 0, distances, 1.0), 0.0)
    first = gram.diagonal()[rows, None] - gram[rows]
    products = first[:, :, None] - gram[rows][:, None, :] + gram  # (x_i - x_j) . (x_i - x_k)
    return products * inverse[:, :, None] * inverse[:, None, :]


@final
class _AngleLoss(Function):
    """The loss with its gradient, which is taken where the cosines are: they are made once, and never all of them."""

    @staticmethod
    def forward(context: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        count, total, gradient = len(ours), ours.new_zeros(()), torch.zeros_like(ours)
        leaf = ours.detach().requires_grad_(context.needs_input_grad[0])
        for rows in _some_rows(count):
            with torch.set_grad_enabled(leaf.requires_grad):
                part = functional.smooth_l1_loss(
                    _cosines(leaf, rows), _cosines(theirs, rows), reduction="sum"
                )
            if leaf.requires_grad:
                gradient += torch.autograd.grad(part, leaf)[0]
            total += part.detach()
        context.save_for_backward(gradient / count**3)
        return total / count**3

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.saved_tensors[0], None


def _some_rows(count: int) -> Iterator[slice]:
    size = max(1, ELEMENTS // count**2)
    return (slice(start, start + size) for start in range(0, count, size))


class RkdOptions(RelationOptions):
    """What RKD can be told."""

    distance_weight: float = relation_weight_option(25.0, "distances between two images")
    angle_weight: float = relation_weight_option(50.0, "angles between three")


@final
class Rkd(RelationalMethod):
    """RKD."""

    def terms(self, options: RkdOptions) -> tuple[Term, ...]:
        """See :func:`distance_loss` and :func:`angle_loss`."""
        return (
            Term("distance", options.distance_weight, distance_loss),
            Term("angle", options.angle_weight, angle_loss),
        )


RKD = Rkd(
    name="rkd", paper="RKD, Park et al. 2019", equation="Eq. 8, 11",
    summary="Distances and angles between a step's images, and labels.", Options=RkdOptions, needs=NEEDS,
    defaults=PRINTED, spares=SPARES, least=3,
)  # fmt: skip
