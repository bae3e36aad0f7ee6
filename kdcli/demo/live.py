"""What live teachers would cost: their forward inside the training loop, measured by a callback."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch.nn.functional import interpolate

from kdcli.methods.batch import Batch
from kdcli.models.spec import open_model
from kdcli.models.teacher import TeacherRunner
from kdcli.outputs import Output
from kdcli.precision import resolve_amp
from kdcli.runtime import pick_device
from kdcli.training.result import TrainResult


@final
@dataclass(frozen=True, slots=True)
class Live:
    """What one epoch cost with the teachers' forward inside the loop, and from the cache.

    Attributes:
        epoch_seconds: with all teachers live.
        cached_epoch_seconds: median of the same student's epochs from the cache.
        forward: seconds of each teacher's forward per image, measured in the live epoch.
    """

    epoch_seconds: float
    cached_epoch_seconds: float
    forward: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times longer the live epoch took."""
        return self.epoch_seconds / self.cached_epoch_seconds

    def seconds_for(self, trained: TrainResult) -> float:
        """What a student would have taken with its own teachers live."""
        images = sum(epoch["images_per_second"] * epoch["seconds"] for epoch in trained.history)
        used = [name for name, weight in trained.details["weights"].items() if weight > 0]
        return float(trained.seconds + images * sum(self.forward[name] for name in used))


@final
class LiveTeachers:
    """A callback of training that runs teachers on the images of each batch.

    Args:
        specs: model specs by name.
    """

    def __init__(self, specs: Mapping[str, str]) -> None:
        device = pick_device("auto")
        amp = resolve_amp("auto", device)  # as kd cache-teachers ran them
        self._runners = {
            name: TeacherRunner(open_model(spec), device, amp, (Output("logits"),))
            for name, spec in specs.items()
        }
        self._spent = dict.fromkeys(specs, 0.0)
        self._images = 0

    def __call__(self, batch: Batch) -> None:
        """Run all of them once."""
        self._images += len(batch.pixels)
        pixels = batch.pixels.permute(0, 3, 1, 2)
        for name, runner in self._runners.items():
            start = time.perf_counter()
            resized = interpolate(pixels, runner.model.preprocess.size)
            runner(resized.permute(0, 2, 3, 1))["logits"].cpu()  # waits for the device
            self._spent[name] += time.perf_counter() - start

    def seconds_per_image(self) -> dict[str, float]:
        """What each teacher took so far."""
        return {name: seconds / self._images for name, seconds in self._spent.items()}
