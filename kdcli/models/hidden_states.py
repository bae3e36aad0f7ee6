"""The last hidden state of a network of transformers: where it is made, and its places as a map."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.layers import tokens_as_map
from kdcli.models.network import nearly_equal

LAST_HIDDEN: Final = "last_hidden_state"
"""The tap, as transformers calls it."""
_TOKENS: Final = ("cls_token", "class_embedding", "distillation_token")
_REGISTERS: Final = "register_tokens"


@contextmanager
def catching(plain: nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden state of each forward of the image tower while the context lasts, where it gives one."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = getattr(output, LAST_HIDDEN, None)
        if isinstance(found, Tensor):
            caught.append(found)

    handle = _tower(plain).register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def as_map(
    plain: nn.Module, caught: list[Tensor], images: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b C _ _"]:
    """A last hidden state as [b, C, H, W]: tokens of no place (class, distillation, registers) come first, and go.

    Args:
        plain: the network.
        caught: of one forward, see :func:`catching`.
        images: that went in.

    Raises:
        UsageError: it has none, or its tokens are no grid of the images' proportion.
    """
    state = caught[0] if len(caught) == 1 else None
    if state is not None and state.ndim == 4:
        return state
    if state is not None and state.ndim == 3:
        others = sum(
            parameter.shape[-2] if name.endswith(_REGISTERS) else 1
            for name, parameter in _tower(plain).named_parameters()
            if name.endswith((*_TOKENS, _REGISTERS))
        )
        places = tokens_as_map(state, others, images)
        if places is not None:
            return places
    raise UsageError(
        f"a {type(plain).__name__} gives no last hidden state with places", "Use --keep features."
    )


def pooled_how(
    features: Float[Tensor, "b d"], state: Float[Tensor, "b ..."], places: Float[Tensor, "b C h w"]
) -> str:
    """How features come of a last hidden state, where they are a part of it or its mean; else empty."""
    if nearly_equal(features, places.mean(dim=(2, 3))):
        return "average"
    tokens = state.ndim == 3 and state.shape[1] > places.shape[2] * places.shape[3]
    return "class token" if tokens and nearly_equal(features, state[:, 0]) else ""


def _tower(plain: Any) -> nn.Module:
    """What turns images into hidden states."""
    if hasattr(plain, "get_image_features"):
        return plain.vision_model  # type: ignore[no-any-return]
    base: nn.Module = plain.base_model
    return base
