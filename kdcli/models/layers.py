"""Feature maps of any layer of a network: what it gives is caught, and laid out as [b, C, H, W], of clips
[b, C, T, H, W]."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError

_HINT = "Choose a stage, or a block."


@contextmanager
def outputs_of(plain: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Catch what submodules give while the context lasts."""
    caught: dict[str, list[Any]] = {name: [] for name in names}

    def catch(into: list[Any], output: Any) -> None:
        # A copy: the next module may write into it (bn1, then an in-place ReLU).
        into.append(output.clone() if isinstance(output, Tensor) else output)

    handles = [
        plain.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, into=into: catch(into, output)
        )
        for name, into in caught.items()
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def as_map(
    tap: str,
    found: Sequence[Any],
    images: Float[Tensor, "b 3 *t h w"],
    others: int | None,
    behind: bool | None = None,
) -> Float[Tensor, "b _ *_ _ _"]:
    """What was caught of a layer, as [b, C, H, W]: the two sides that are in proportion to the image's are H, W.

    Args:
        tap: for messages.
        found: what it gave, each time it ran.
        images: that went in.
        others: how many tokens of no place come before those of the places; None: no tokens have places.
        behind: whether the channels come last where the proportion allows either; None: not known.

    Raises:
        UsageError: it did not give one map.
    """
    output = found[0] if len(found) == 1 else None
    if (told := _in_told_grid(output)) is not None and told.ndim == images.ndim:
        return told
    if isinstance(output, Tensor) and output.ndim == 3 and others is not None and images.ndim == 4:
        places = tokens_as_map(output, others, images)
        if places is not None:
            return places
    if not isinstance(output, Tensor) or output.ndim != images.ndim:
        times = f"runs {len(found)} times" if len(found) != 1 else f"gives no {images.ndim}-D tensor"
        raise UsageError(f"'{tap}' is no feature map: it {times} in a forward", _HINT)
    first, second, third = output.shape[-3:]
    channels_first, channels_last = (
        _in_proportion(second, third, images),
        _in_proportion(first, second, images),
    )
    if images.ndim == 5:  # frames come behind the channels, or before the places: no more than the clip has
        channels_first = channels_first and output.shape[2] <= images.shape[2]
        channels_last = channels_last and output.shape[1] <= images.shape[2]
    if channels_first != channels_last:
        behind = channels_last
    if behind is None or not (channels_first or channels_last):
        raise UsageError(
            f"'{tap}' is no feature map: in its shape {tuple(output.shape)}, height and width cannot be told",
            _HINT,
        )
    return output.movedim(-1, 1) if behind else output


def _in_told_grid(output: Any) -> Float[Tensor, "b C *_"] | None:
    """Tokens beside which their grid comes, as of a block of torchvision's MViT: (tokens, (frames, height, width))."""
    match output:
        case (Tensor(ndim=3) as tokens, (int(), *_) as grid) if (
            others := tokens.shape[1] - math.prod(grid)
        ) >= 0:
            return tokens[:, others:].transpose(1, 2).reshape(len(tokens), -1, *grid)
    return None


def _in_proportion(rows: int, columns: int, images: Float[Tensor, "b 3 *t h w"]) -> bool:
    """Whether these can be the image's sides by one stride, each rounded."""
    height, width = images.shape[-2:]
    return abs(rows * width - columns * height) < max(height, width)


def tokens_as_map(
    tokens: Float[Tensor, "b n C"], others: int, images: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b C _ _"] | None:
    """Tokens of places, behind ``others`` of no place, as a map; None where they are no grid like the image."""
    height, width = images.shape[2:]
    count = tokens.shape[1] - others
    rows = math.isqrt(max(0, count * height // width))
    if not rows or rows * width * rows != count * height:
        return None
    return tokens[:, others:].transpose(1, 2).reshape(len(tokens), -1, rows, count // rows)
