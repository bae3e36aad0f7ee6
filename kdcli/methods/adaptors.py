"""Layers that make a representation of the student comparable with one of a teacher, and how far apart they are."""

from collections.abc import Sequence
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Resize = Literal["pool", "bilinear"]


def at_one_grid(
    one: Float[Tensor, "b c ..."], other: Float[Tensor, "b k ..."]
) -> tuple[Float[Tensor, "b c ..."], Float[Tensor, "b k ..."]]:
    """Both maps in fp32, the larger one averaged to the smaller one, axis by axis; vectors as they are.

    Args:
        one: [b, C, H, W], or [b, D].
        other: [b, C', H', W'] of the same images, or [b, D'].
    """
    if one.shape[2:] == other.shape[2:]:
        return one.float(), other.float()
    grid = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return functional.adaptive_avg_pool2d(one.float(), grid), functional.adaptive_avg_pool2d(
        other.float(), grid
    )


def mean_squared_error(
    one: Float[Tensor, "b ..."], other: Float[Tensor, "b ..."], count: float | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference over all elements of all images (P4 Eq. 3), in fp32.

    Args:
        one: the student's.
        other: the teacher's; whether a gradient flows into it is the caller's.
        count: what the sum of the images' means is divided by (see :class:`~kdcli.methods.batch.Counts`);
            default: their number.

    Returns:
        The mean, in squared units of the representation, >= 0.
    """
    rows = (one.float() - other.float()).square().flatten(1).mean(1)
    return rows.mean() if count is None else rows.sum() / (count or 1.0)


@final
class Adaptor(nn.Module):
    """Brings one side's representation to the shape of the other's.

    Args:
        own: shape of what is changed: [D] or [C, H, W].
        wanted: shape of the other side.
        resize: how height and width are changed; None where they are equal.
    """

    def __init__(self, own: Sequence[int], wanted: Sequence[int], resize: Resize | None = None) -> None:
        super().__init__()
        self._size = (wanted[1], wanted[2]) if tuple(own[1:]) != tuple(wanted[1:]) else None
        self._resize = resize
        self.layer: nn.Module = nn.Identity()
        if own[0] != wanted[0]:
            flat = len(own) == 1
            self.layer = nn.Linear(own[0], wanted[0]) if flat else nn.Conv2d(own[0], wanted[0], 1)

    def forward(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Resize, then the layer: both are linear, and the smaller map is cheaper to convolve."""
        if self._size is not None and self._resize == "pool":
            values = functional.adaptive_avg_pool2d(values, self._size)
        elif self._size is not None:
            values = functional.interpolate(values, self._size, mode="bilinear", antialias=True)
        adapted: Tensor = self.layer(values)
        return adapted
