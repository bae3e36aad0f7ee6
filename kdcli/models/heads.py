"""A network's classifier where it is a linear function of the features that are cached."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.models.network import synthetic_image
from kdcli.models.spec import Model

_CONTRASTS = (1.0, -1.0, 0.3)
"""Of the images that a classifier is tried on: what is cut off on one of them shows on another."""
_TOLERANCE = 1e-4
"""Of a logit's size, for sums in another order."""


def linear_head(model: Model) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None:
    """Weight and bias of what makes a model's logits of its features, if that is linear.

    The kind of its last layer only proposes them; what decides is that the logits of three synthetic images come of
    their features so. A ReLU behind it, a scale, or the mean of two classifiers' logits is found out there.

    Args:
        model: open, in eval mode, wherever it lies.

    Returns:
        fp32, on the CPU; None where the logits are no such function, or the model lacks logits or features.
    """
    if not (model.num_classes and model.num_features):
        return None
    found = _proposed(model.network.last_layer)
    if found is None or found[0].shape != (model.num_classes, model.num_features):
        return None
    weight, bias = found
    image = synthetic_image(model.preprocess.size).to(weight.device)
    images = torch.cat([contrast * image for contrast in _CONTRASTS])
    with torch.inference_mode():
        given = model.network.outputs(images, ("features", "logits"))
        logits = given["logits"].double()
        made = given["features"].double() @ weight.double().T + bias.double()
        close = (made - logits).abs().max() <= _TOLERANCE * logits.abs().max()
    return (weight.float().cpu(), bias.float().cpu()) if bool(close) else None


def _proposed(layer: nn.Module) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None:
    """The numbers of a linear layer, or of a convolution that is one, perhaps behind others; None for all else."""
    if isinstance(layer, nn.Sequential) and len(layer):
        return _proposed(layer[-1])
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach()
    elif isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.groups == 1:
        weight = layer.weight.detach().flatten(1)
    else:
        return None
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    return weight, bias
