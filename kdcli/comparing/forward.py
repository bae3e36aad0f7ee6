"""Models that no cache holds, run over the images once: decoded once for as many of them as fit together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdcli.cache.provenance import canonical_sha256
from kdcli.comparing.answers import Answers, ClassMeans, Images, judged
from kdcli.comparing.config import CompareConfig
from kdcli.comparing.models import Candidate
from kdcli.comparing.space import Classes
from kdcli.console import console
from kdcli.data.sizes import require_kind
from kdcli.data.sources import ImageData
from kdcli.devices import device_errors
from kdcli.errors import KdError, StoppedEarly
from kdcli.geometry import Render
from kdcli.models.arriving import arriving
from kdcli.models.network import weights_sha256
from kdcli.models.properties import count_parameters
from kdcli.models.spec import Model, open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.precision import resolve_amp
from kdcli.runtime import StopFlag, pick_device, worker_count
from kdcli.training.batches import make_loader
from kdcli.training.evaluate import Exam
from kdcli.training.samplers import plain_order
from kdcli.types import AmpName, Preprocess

TOGETHER = 16
"""Models that are open at the same time."""


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """What is known of a model once it was open.

    Attributes:
        id: digest of its weights, its preprocessing and the precision: equal ids give equal answers.
        architecture: of its library.
        parameters: how many.
        classes: of its logits.
        preprocess: how it wants its pixels, its eval view included.
        amp: precision that it is to run at.
    """

    id: str
    architecture: str
    parameters: int
    classes: Classes
    preprocess: Preprocess
    amp: AmpName


def look_at(candidates: Sequence[Candidate], config: CompareConfig) -> dict[str, Opened]:
    """Open every model once, to know its classes before anything is run.

    Args:
        candidates: models to be run.
        config: device and precision.

    Raises:
        NotFoundError: one cannot be had.
    """
    found: dict[str, Opened] = {}
    if not candidates:
        return found
    amp = resolve_amp(config.amp, pick_device(config.device))
    with console.progress(len(candidates), "models", "opened") as bar:
        for each in candidates:
            found[each.name] = _opened(open_model(each.spec), amp)
            bar.advance(1, model=each.name)
    return found


def _opened(model: Model, amp: AmpName) -> Opened:
    preprocess = model.preprocess
    document: dict[str, Any] = {
        **preprocess.document(),
        "weights": weights_sha256(model.network),
        **({} if amp == "off" else {"amp": amp}),
    }
    return Opened(
        canonical_sha256(document),
        model.architecture,
        count_parameters(model.network),
        Classes(model.class_names, model.num_classes),
        preprocess,
        amp,
    )


def forward_answers(
    candidates: Sequence[Candidate],
    amps: Mapping[str, AmpName],
    images: Images,
    config: CompareConfig,
    stop: StopFlag,
) -> dict[str, Answers]:
    """Run models over the images, each on its own eval view, as ``kd train-student --test`` does.

    Args:
        candidates: models to run.
        amps: at which precision, by name.
        images: with their data.
        config: device, batch size, workers.
        stop: raised by a signal.

    Raises:
        StoppedEarly: a signal arrived.
        BadDataError: an image cannot be decoded, or logits are not finite.
        DeviceError: no such device, or out of memory.
    """
    found: dict[str, Answers] = {}
    for start in range(0, len(candidates), TOGETHER):
        found |= _run_group(candidates[start : start + TOGETHER], amps, images, config, stop)
    return found


def _run_group(
    group: Sequence[Candidate],
    amps: Mapping[str, AmpName],
    images: Images,
    config: CompareConfig,
    stop: StopFlag,
) -> dict[str, Answers]:
    assert images.data is not None
    device, kept = pick_device(config.device), (Output("logits"), Output("features"))
    models = {each.name: open_model(each.spec) for each in group}
    runners = {
        name: TeacherRunner(model, device, amps[name], kept[: 2 if model.num_features else 1])
        for name, model in models.items()
    }
    sheets = {name: _Sheet(name, models[name], images) for name in models}
    for first, outputs in outputs_of(runners, images.data, device, config.batch_size, config.workers):
        if stop:
            raise StoppedEarly("stopped by a signal while models were run", "Run the same command again.")
        for name, values in outputs.items():
            sheets[name].fill(first, values)
    return {name: sheet.result() for name, sheet in sheets.items()}


def outputs_of(
    runners: Mapping[str, TeacherRunner], data: ImageData, device: str, batch_size: int, workers: int | None
) -> Iterator[tuple[int, dict[str, dict[str, np.ndarray]]]]:
    """Run models over images, each on its own eval view; every image is decoded once.

    Yields:
        Number of a batch's first image, and the outputs of the batch by model and kind.

    Raises:
        UsageError: a model takes images, and the data are clips, or the reverse.
        BadDataError: an image cannot be decoded.
        DeviceError: out of memory.
    """
    for name, each in runners.items():
        require_kind(f"'{name}'", each.model.preprocess, data)
    renders = {name: Render.of(runner.model.preprocess) for name, runner in runners.items()}
    order = plain_order(len(data), batch_size)
    exam = Exam(data, list(renders.values()))
    loader = make_loader(exam, order, worker_count(workers), torch.device(device))
    title = f"{len(runners)} models" if len(runners) > 1 else next(iter(runners))
    with console.progress(len(data), "images", title) as bar, device_errors("running models"):
        computed = _computed(loader, runners, renders)
        for (first, count), values in arriving(computed, device):
            outputs: dict[str, dict[str, np.ndarray]] = {name: {} for name in runners}
            for name, value in values.items():
                kind, _, runner = name.partition(" ")
                outputs[runner][kind] = value
            yield first, outputs
            bar.advance(count)


def _computed(
    loader: Iterable[Any], runners: Mapping[str, TeacherRunner], renders: Mapping[str, Render]
) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
    """Of each batch: its first image, how many there are, and ``KIND MODEL`` -> values on the device."""
    for batch in loader:
        if isinstance(batch, KdError):
            raise batch
        pixels, index = batch
        yield (
            (int(index[0]), len(index)),
            {
                f"{kind} {name}": values
                for name, runner in runners.items()
                for kind, values in runner(pixels[renders[name]]).items()
            },
        )


@final
class _Sheet:
    """The answers of one model, filled in batch by batch."""

    def __init__(self, name: str, model: Model, images: Images) -> None:
        self._name, self._images = name, images
        self._predicted = np.empty(len(images), np.int32)
        self._label_logp, self._top_logp = np.empty((2, len(images)), np.float32)
        self._means = ClassMeans(len(images.names), model.num_features) if model.num_features else None

    def fill(self, first: int, outputs: Mapping[str, np.ndarray]) -> None:
        """Add the outputs of images from ``first`` on."""
        logits = outputs["logits"].astype(np.float64)
        part = slice(first, first + len(logits))
        found = judged(logits, first, self._name, self._images)
        self._predicted[part], self._label_logp[part], self._top_logp[part] = found
        if self._means is not None:
            self._means.add(outputs["features"], self._images.labels[part])

    def result(self) -> Answers:
        """All of them."""
        means = None if self._means is None else self._means.result()
        return Answers(self._predicted, self._label_logp, self._top_logp, means)
