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
        one: [b, C, H, W], of clips [b, C, T, H, W], or [b, D].
        other: [b, C', H', W'] of the same images, or [b, D'], and so on.
    """
    if one.shape[2:] == other.shape[2:]:
        return one.float(), other.float()
    grid = [min(sides) for sides in zip(one.shape[2:], other.shape[2:], strict=True)]
    return averaged(one.float(), grid), averaged(other.float(), grid)


def averaged(values: Float[Tensor, "b c *t h w"], grid: Sequence[int]) -> Float[Tensor, "b c ..."]:
    """A map averaged over the cells of a grid, as torch's adaptive pooling cuts it."""
    *time, height, width = grid
    if not time:
        return functional.adaptive_avg_pool2d(values, (height, width))
    return functional.adaptive_avg_pool3d(values, (time[0], height, width))


def interpolated(values: Float[Tensor, "b c *t h w"], size: Sequence[int]) -> Float[Tensor, "b c ..."]:
    """A map brought to another size: by bilinear interpolation with antialiasing; frames are averaged or repeated."""
    if values.ndim == 4:
        return functional.interpolate(values, list(size), mode="bilinear", antialias=True)
    flat = functional.interpolate(values.flatten(1, 2), list(size[1:]), mode="bilinear", antialias=True)
    return averaged(flat.reshape(*values.shape[:3], *size[1:]), size)


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


def pointwise(shape: Sequence[int]) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """Convolutions of maps of a shape: [C, H, W], or of clips [C, T, H, W]."""
    return nn.Conv2d if len(shape) == 3 else nn.Conv3d


@final
class Adaptor(nn.Module):
    """Brings one side's representation to the shape of the other's.

    Args:
        own: shape of what is changed: [D], [C, H, W], or of clips [C, T, H, W].
        wanted: shape of the other side.
        resize: how height and width are changed; None where they are equal.
    """

    def __init__(self, own: Sequence[int], wanted: Sequence[int], resize: Resize | None = None) -> None:
        super().__init__()
        self._size = tuple(wanted[1:]) if tuple(own[1:]) != tuple(wanted[1:]) else None
        self._resize = resize
        self.layer: nn.Module = nn.Identity()
        if own[0] != wanted[0]:
            self.layer = (
                nn.Linear(own[0], wanted[0]) if len(own) == 1 else pointwise(own)(own[0], wanted[0], 1)
            )

    def forward(self, values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Resize, then the layer: both are linear, and the smaller map is cheaper to convolve."""
        if self._size is not None and self._resize == "pool":
            values = averaged(values, self._size)
        elif self._size is not None:
            values = interpolated(values, self._size)
        adapted: Tensor = self.layer(values)
        return adapted
