"""How good a run is, on how many images that was measured, and at what budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kdcli.metrics.intervals import Interval, of_share
from kdcli.reporting.material import Run
from kdcli.training.scores import MAIN, main_score

EQUAL_WITHIN = 0.05
"""Numbers of images seen that differ by at most this share of the larger one are an equal budget."""


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """What training a student took, whatever it ran on.

    Attributes:
        images: shown to the student, repeats counted; None where the history does not say.
        epochs: passes over the data.
        steps: of the optimiser.
    """

    images: int | None
    epochs: int | None
    steps: int | None

    def equals(self, other: "Budget") -> bool:
        """Whether both saw as many images, but for a rest of a batch an epoch; unknown ones equal none."""
        if self.images is None or other.images is None:
            return False
        return abs(self.images - other.images) <= EQUAL_WITHIN * max(self.images, other.images)

    def text(self) -> str:
        """As a person reads it."""
        known = ((self.epochs, "epoch"), (self.steps, "step"), (self.images, "image"))
        return ", ".join(
            f"{value:,} {word}{'' if value == 1 else 's'}{' seen' if word == 'image' else ''}"
            for value, word in known
            if value is not None
        )


def budget_of(run: Run) -> Budget:
    """The budget of a run, by its history: of a sequence that of all its stages."""
    history = run.history
    if not history:
        return Budget(None, None, None)
    last: dict[Any, int] = {epoch.get("stage"): int(epoch.get("steps") or 0) for epoch in history}
    steps = sum(last.values())
    seen = [(epoch.get("images_per_second") or 0.0, epoch.get("seconds") or 0.0) for epoch in history]
    images: int | None = None
    if all(rate and seconds for rate, seconds in seen):
        images = round(sum(rate * seconds for rate, seconds in seen))
    elif steps and run.identity.get("batch_size"):
        images = steps * int(run.identity["batch_size"])
    return Budget(images, len(history), steps or None)


def main_of(run: Run) -> float | None:
    """Accuracy on the (first) test set, or mean average precision where images have several labels."""
    test = run.result.get("test")
    return main_score(test) if isinstance(test, Mapping) and set(MAIN) & set(test) else None


def top1_of(run: Run) -> float | None:
    """Accuracy on the (first) test set."""
    test = run.result.get("test")
    return float(test["top1"]) if isinstance(test, Mapping) and "top1" in test else None


def tested_on(run: Run) -> int:
    """Number of its test images; 0 where it is not recorded."""
    test = run.identity.get("test")
    return int(test.get("images") or 0) if isinstance(test, Mapping) else 0


def interval_of(run: Run) -> Interval | None:
    """Wilson's interval of a run's test accuracy; None without one or without the number of images."""
    images, accuracy = tested_on(run), top1_of(run)
    return of_share(round(accuracy * images), images) if images and accuracy is not None else None
