"""A model's features or logits of images: its forward over view 0."""

from dataclasses import replace
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch.utils.data import DataLoader, Dataset

from kdcli.console import console
from kdcli.data.drawing import show
from kdcli.data.sizes import require_kind, sample_sizes, tell_short
from kdcli.data.sources import ImageData
from kdcli.devices import device_errors
from kdcli.errors import KdError
from kdcli.geometry import OWN, EvalGeometry, Render
from kdcli.handing import Handing
from kdcli.models.arriving import arriving
from kdcli.models.spec import Model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.precision import resolve_amp
from kdcli.probing.config import ProbeConfig
from kdcli.runtime import pick_device, worker_count
from kdcli.types import Preprocess
from kdcli.workers import Watched, worker_setup

ArrayName = Literal["features", "logits"]
Rendered = UInt8[np.ndarray, "*t h w 3"]


def as_shown(model: Model, config: ProbeConfig) -> Model:
    """A model with the geometry asked for."""
    geometry = EvalGeometry.parse(config.eval_geometry or str(OWN))
    return replace(model, preprocess=geometry.applied(model.preprocess))


@final
class EvalImages(Dataset[Rendered]):
    """The evaluation view of images, as pixels of a model's input size.

    Args:
        data: the images.
        preprocess: of the model.
    """

    def __init__(self, data: ImageData, preprocess: Preprocess) -> None:
        self._data, self._render = data, Render.of(preprocess)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Rendered:
        return show(self._data.picture(row, self._data.encoded(row), "exact"), self._render)


def model_outputs(
    model: Model, data: ImageData, config: ProbeConfig, array: ArrayName, title: str
) -> Float32[np.ndarray, "n _"]:
    """Pooled features, or logits, of all images, in their order.

    Args:
        model: that is run.
        data: the images.
        config: device, precision, batch size, workers.
        array: ``features`` or ``logits``.
        title: of the progress bar.

    Raises:
        BadDataError: an image cannot be decoded.
        UsageError: the model has no features, or no classifier; or it takes images, and the data are clips.
        DeviceError: no such device, or out of memory.
    """
    require_kind(f"'{model.spec}'", model.preprocess, data, model.spec)
    if data.clips:
        tell_short(f"'{model.spec}'", Render.of(model.preprocess), sample_sizes(data))
    device = pick_device(config.device)
    runner = TeacherRunner(model, device, resolve_amp(config.amp, device), (Output(array),))
    workers = worker_count(config.workers)
    loader = DataLoader(
        Handing(EvalImages(data, model.preprocess)),
        batch_size=config.batch_size,
        num_workers=workers,
        worker_init_fn=worker_setup(workers),
        collate_fn=_stack,
        pin_memory=device.startswith("cuda"),
    )
    width = model.num_features if array == "features" else model.num_classes
    found = np.empty((len(data), width), np.float32)
    done = 0
    with console.progress(len(data), "images", title) as bar, device_errors(f"running '{model.spec}'"):
        computed = ((len(batch), runner(batch)) for batch in map(_sound, Watched(loader)))
        for count, outputs in arriving(computed, device):
            found[done : done + count] = outputs[array]
            done += count
            bar.advance(count)
    return found


def _sound(batch: torch.Tensor | KdError) -> torch.Tensor:
    if isinstance(batch, KdError):
        raise batch
    return batch


def _stack(samples: list[Rendered | KdError]) -> torch.Tensor | KdError:
    pictures = []
    for sample in samples:
        if isinstance(sample, KdError):
            return sample
        pictures.append(sample)
    return torch.from_numpy(np.stack(pictures))
