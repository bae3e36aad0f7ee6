"""A teacher at work: pixels in, what the cache keeps of its outputs out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from kdcli.errors import BadDataError, DeviceError, UsageError
from kdcli.models.spec import Model
from kdcli.types import AmpName, OutputKind, Preprocess

_AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def normalise(pixels: UInt8[Tensor, "b h w 3"], preprocess: Preprocess) -> Float[Tensor, "b 3 h w"]:
    """Pixels of 0..255 as a network's input: ``(x / 255 - mean) / std``.

    The result has the operations, and so the bits, of torchvision's ToTensor + Normalize, and is laid
    out as channels_last in memory (the pixels are not copied into another order).

    Args:
        pixels: images on the device of the network.
        preprocess: whose mean and std to use.
    """
    mean = torch.tensor(preprocess.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std, device=pixels.device).view(1, 3, 1, 1)
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


def autocast(device: str, amp: AmpName) -> "torch.autocast | nullcontext[None]":
    """The mixed-precision context of a forward; ``off`` leaves everything as it is."""
    return nullcontext() if amp == "off" else torch.autocast(torch.device(device).type, dtype=_AMP_DTYPE[amp])


@final
class TeacherRunner:
    """Callable ``pixels -> {kind: array}``; picklable, so it also serves as a worker elsewhere.

    The same batch gives the same bits on the same machine; another batch composition may not.

    Args:
        model: the teacher; it is moved to the device and into the channels_last format.
        device: cpu, cuda or cuda:N.
        amp: mixed precision of the forward; outputs are float32 all the same.
        keep: the outputs wanted.

    Raises:
        UsageError: logits are wanted of a model without classes.
    """

    def __init__(self, model: Model, device: str, amp: AmpName, keep: Sequence[OutputKind]) -> None:
        if "logits" in keep and not model.num_classes:
            raise UsageError(
                f"'{model.spec}' has no classifier, so it gives no logits", "Use --keep features."
            )
        self.model = model
        self.keep: tuple[OutputKind, ...] = tuple(dict.fromkeys(keep))
        self._device = device
        self._amp = amp
        with _memory_errors(model.spec):
            model.network.eval().to(device).to(memory_format=torch.channels_last)

    def __call__(
        self, pixels: UInt8[np.ndarray | Tensor, "b h w 3"]
    ) -> dict[OutputKind, Float32[Tensor, "b k"]]:
        """Outputs for a batch of images that were rendered at this model's size.

        Args:
            pixels: uint8 images at ``model.preprocess.size``.

        Returns:
            Per wanted kind a float32 tensor on the CPU: raw logits before softmax, pooled features.

        Raises:
            BadDataError: the images are of another size.
            DeviceError: out of memory.
        """
        if tuple(pixels.shape[1:]) != (*self.model.preprocess.size, 3):
            wanted = " x ".join(map(str, self.model.preprocess.size))
            raise BadDataError(
                f"'{self.model.spec}' wants images of {wanted} pixels, got shape {tuple(pixels.shape)}",
                "Render them at model.preprocess.size.",
            )
        network = self.model.network
        outputs: dict[OutputKind, Tensor] = {}
        with _memory_errors(self.model.spec), torch.inference_mode(), autocast(self._device, self._amp):
            batch = torch.as_tensor(pixels).to(self._device, non_blocking=True)
            features = network.features(normalise(batch, self.model.preprocess))
            for kind in self.keep:
                wanted_output = features if kind == "features" else network.classify(features)
                outputs[kind] = wanted_output.float().cpu()
        return outputs


@contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"out of memory on the device while running '{name}': {str(error).splitlines()[0]}",
            "Use a smaller --batch-size, or --amp bf16.",
        ) from error
