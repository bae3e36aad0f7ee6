"""A teacher at work: pixels in, its raw outputs out; what is stored of them is for caching/outputs.py."""

import functools
from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from kdcli.devices import device_errors
from kdcli.errors import BadDataError
from kdcli.models.compiling import compiled_forward
from kdcli.models.network import Classifier, synthetic_image
from kdcli.models.spec import Model
from kdcli.models.taps import require_outputs
from kdcli.outputs import PIXELS, Output, raw_outputs
from kdcli.precision import computing, half_of
from kdcli.types import AmpName, Preprocess

_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose weights autocast casts in each forward: these alone, as a subclass may compute with its weights before."""

_SIMD_FLOATS = 16
"""Floats of the widest vector of a CPU (AVX-512)."""


def trains_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Whether training a network in the channels_last format is safe; it is faster, and inference always safe.

    On a CPU torch's backward of a 1x1 convolution with a stride over fewer channels than a vector holds writes
    past its memory (pytorch#136348; found with torch 2.14: below 8 channels with AVX2, with an input or with
    weights in that format). FastViT, RepVGG and MobileOne begin with one. Networks of clips have no such format.
    """
    if has_volumes(network):
        return False
    return device.type != "cpu" or not any(
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels < _SIMD_FLOATS
        for module in network.modules()
    )


def has_volumes(network: nn.Module) -> bool:
    """Whether a network convolves over frames, too: its weights then have an axis more than channels_last is of."""
    return any(parameter.ndim == 5 for parameter in network.parameters())


def normalise(
    pixels: UInt8[Tensor, "b *t h w 3"], preprocess: Preprocess, channels_last: bool = True
) -> Float[Tensor, "b 3 *t h w"]:
    """Pixels of 0..255 as a network's input: ``(x / 255 - mean) / std``.

    The result has the operations, and so the bits, of torchvision's ToTensor + Normalize.

    Args:
        pixels: images, or clips, on the device of the network.
        preprocess: whose mean and std to use.
        channels_last: laid out so in memory (the pixels are not copied into another order), or contiguous.
    """
    mean, std = _constants(preprocess.mean, preprocess.std, pixels.device)
    images = pixels.movedim(-1, 1)
    if images.ndim > mean.ndim:
        mean, std = mean.unsqueeze(-1), std.unsqueeze(-1)
    if not channels_last:
        images = images.contiguous()
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def normalised_layout(images: Float[Tensor, "b 3 *t h w"]) -> Float[Tensor, "b 3 *t h w"]:
    """Inputs laid out as :func:`normalise` lays them out."""
    return images.movedim(1, -1).contiguous().movedim(-1, 1)


def clips_of(pixels: UInt8[Tensor, "b *n h w 3"], preprocess: Preprocess) -> UInt8[Tensor, "c *t h w 3"]:
    """Samples as the clips that view 0 shows of them, one after the other: c is b times ``preprocess.clips``."""
    return pixels.reshape(-1, *preprocess.size, 3) if preprocess.clips > 1 else pixels


def mean_of_clips(output: Float[Tensor, "c ..."], samples: int) -> Float[Tensor, "b ..."]:
    """What a model gives of each of so many samples: the mean over its clips."""
    if len(output) == samples:
        return output
    return output.reshape(samples, -1, *output.shape[1:]).mean(dim=1)


@functools.lru_cache
@torch.inference_mode(False)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Float[Tensor, "1 3 1 1"], Float[Tensor, "1 3 1 1"]]:
    """What :func:`normalise` computes with, brought to a device once: that waits for it."""
    found = [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std)]
    return found[0], found[1]


@final
class TeacherRunner:
    """Callable ``pixels -> {name: tensor}``; picklable unless compiled, so it also serves as a worker elsewhere.

    The same batch gives the same bits on the same machine; another batch composition may not. Nothing in a call
    waits for the device.

    Args:
        model: the teacher; it is moved to the device and into the channels_last format, one runner at a time.
        device: cpu, cuda or cuda:N.
        amp: precision of the forward (an ONNX file runs as it is); outputs are float32 all the same.
        outputs: what is to be kept; one forward gives all that it is made of.
        compiled: whether the forward goes through torch.compile.

    Raises:
        UsageError: the model does not give it, see :func:`kdcli.models.taps.require_outputs`.
        DeviceError: out of memory, the device fails, or torch.compile does not work on it.
    """

    def __init__(
        self, model: Model, device: str, amp: AmpName, outputs: Sequence[Output], compiled: bool = False
    ) -> None:
        require_outputs(model, outputs)
        self.model = model
        self.outputs = tuple(outputs)
        self._device, self._amp = device, amp
        with device_errors(self._running):
            model.network.eval().to(device)
            if not has_volumes(model.network):
                model.network.to(memory_format=torch.channels_last)
            half = half_of(amp)
            network = model.network if half is None else self._cast_once(half)
            self._forward = compiled_forward(network.outputs, device) if compiled else network.outputs

    @property
    def _running(self) -> str:
        return f"running '{self.model.spec}'"

    def _cast_once(self, dtype: torch.dtype) -> Classifier:
        """The network with the weights in half precision that autocast would cast in every forward.

        A copy, as whoever else has the model wants all digits. Where its outputs are not the same to the bit (a
        network may read its weights elsewhere, too), the network as it is.
        """
        network = self.model.network
        names = [name for name in raw_outputs(self.outputs) if name != PIXELS]
        if not names or not any(type(module) in _CAST for module in network.modules()):
            return network
        copy = deepcopy(network)
        for module in copy.modules():
            if type(module) in _CAST:
                module.to(dtype)
        image = synthetic_image(self.model.preprocess.size).to(self._device)
        with torch.inference_mode(), computing(self._device, self._amp):
            images = normalised_layout(torch.cat([image, image]))
            one, other = (each.outputs(images, names) for each in (network, copy))
            same = all(torch.equal(one[name], other[name]) for name in names)
        if same:
            network.to("cpu")  # its room on the device is better used
        return copy if same else network

    def __call__(
        self, pixels: UInt8[np.ndarray | Tensor, "b *t h w 3"], only: Collection[str] | None = None
    ) -> dict[str, Shaped[Tensor, "b ..."]]:
        """Raw outputs for a batch of images that were rendered at this model's size.

        Args:
            pixels: uint8 images at ``model.preprocess.size``, or of view 0 ``shown``; copied to the device without
                waiting when they are in pinned memory.
            only: names of the outputs (``Output.name``) that are wanted of this batch; default: all.

        Returns:
            float32 tensors on the device: ``logits`` [b, c] before softmax (also when only their top-k or
            statistics are kept), ``features`` [b, d], ``maps.TAP`` [b, C, H, W]; and uint8 ``pixels``, as given.

        Raises:
            BadDataError: the images are of another size.
            DeviceError: out of memory, or the device fails.
        """
        preprocess = self.model.preprocess
        if tuple(pixels.shape[1:]) not in ((*preprocess.size, 3), (*preprocess.shown, 3)):
            wanted = " x ".join(map(str, preprocess.size))
            raise BadDataError(
                f"'{self.model.spec}' wants images of {wanted} pixels, got shape {tuple(pixels.shape)}",
                "Render them at model.preprocess.size.",
            )
        asked = raw_outputs(output for output in self.outputs if only is None or output.name in only)
        names = [name for name in asked if name != PIXELS]
        raw: dict[str, Tensor] = {PIXELS: torch.as_tensor(pixels)} if PIXELS in asked else {}
        if not names:
            return raw
        with device_errors(self._running), torch.inference_mode(), computing(self._device, self._amp):
            batch = clips_of(torch.as_tensor(pixels).to(self._device, non_blocking=True), preprocess)
            found = self._forward(normalise(batch, preprocess), names)
            outputs = {name: output.float() for name, output in found.items()}
            return raw | {name: mean_of_clips(output, len(pixels)) for name, output in outputs.items()}
