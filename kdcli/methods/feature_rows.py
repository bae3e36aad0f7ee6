"""How far predictions are from targets, row by row: losses of features and of cells of maps, in fp32."""

from collections.abc import Callable
from typing import Final, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

FeatureLoss = Literal["unic", "radio", "mse"]
Rows = Callable[[Tensor, Tensor, bool], Tensor]


def cosine_rows(predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """Cosine of each row, in [-1, 1]; 0 where one is all 0."""
    return functional.cosine_similarity(predicted.float(), target.float(), dim=-1)


def squared_rows(predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """Squared difference of each row, the mean over its channels, >= 0."""
    return (predicted.float() - target.float()).square().mean(dim=-1)


def smooth_rows(predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """Smooth L1 of each row (beta 1), the mean over its channels, >= 0."""
    return functional.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1)


def unic_rows(
    predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"], cells: bool
) -> Float[Tensor, "b n"]:
    """(1 - cos) / 2 + smooth L1 / 2 of features and of cells (UNIC, section 3)."""
    return (1 - cosine_rows(predicted, target)) / 2 + smooth_rows(predicted, target) / 2


def radio_rows(
    predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"], cells: bool
) -> Float[Tensor, "b n"]:
    """1 - cos of features, 0.9 (1 - cos) + 0.1 smooth L1 of cells (AM-RADIO, section 3)."""
    apart = 1 - cosine_rows(predicted, target)
    return 0.9 * apart + 0.1 * smooth_rows(predicted, target) if cells else apart


def mse_rows(
    predicted: Float[Tensor, "b n c"], target: Float[Tensor, "b n c"], cells: bool
) -> Float[Tensor, "b n"]:
    """:func:`squared_rows` of both: after PHI-S the share of the variance that is left unexplained."""
    return squared_rows(predicted, target)


FEATURE_ROWS: Final[dict[FeatureLoss, Rows]] = {"unic": unic_rows, "radio": radio_rows, "mse": mse_rows}
"""By the value of ``--feature-loss``: of predictions, targets, and whether rows are cells of a map."""
