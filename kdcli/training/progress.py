"""How far a training is, and what bounds it: the wait for batches, or the steps themselves."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from kdcli.console import per_second

WINDOW = 50
"""Steps that are looked back on: the first wait, for workers to start, is soon forgotten."""


@final
@dataclass(slots=True)
class Progress:
    """Where a run is. The one mutable value of the engine.

    Attributes:
        epoch: epochs finished.
        step: steps finished within the running epoch.
        steps: steps finished in all.
        sums: loss and its parts, summed over the steps of the running epoch.
        images: images seen in the running epoch.
        seconds: time spent in the running epoch.
        history: one document per finished epoch; what metrics.jsonl holds.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, parts: Mapping[str, float], images: int, seconds: float) -> None:
        """Count one step."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.step += 1
        self.steps += 1
        self.images += images
        self.seconds += seconds

    def close_epoch(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Move the running epoch to the history, with ``facts``; returns its document."""
        document = {
            "epoch": self.epoch + 1,
            **{name: total / self.step for name, total in self.sums.items()},
            **facts,
            "steps": self.steps,
            "images_per_second": self.images / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }
        self.history.append(document)
        self.epoch += 1
        self.step, self.images, self.seconds, self.sums = 0, 0, 0.0, {}
        return document


@final
class Meter:
    """Times of the last steps of a run."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)

    def add(self, images: int, waited: float, computed: float) -> None:
        """Count one step.

        Args:
            images: it had, over all processes.
            waited: seconds until its batch was there.
            computed: seconds from then to its end.
        """
        self._steps.append((images, waited, computed))

    @property
    def waiting(self) -> float:
        """Share of the time, from 0 to 1, that was spent waiting for batches."""
        waited, computed = (sum(step[index] for step in self._steps) for index in (1, 2))
        return waited / (waited + computed) if waited + computed else 0.0

    @property
    def images_per_second(self) -> float:
        """Images per second, waiting included."""
        seconds = sum(waited + computed for _, waited, computed in self._steps)
        return sum(images for images, _, _ in self._steps) / seconds if seconds else 0.0

    @property
    def said(self) -> str:
        """What the steps wait for, in words; nothing while they do not wait."""
        share = self.waiting
        return f"waiting for images {share:.0%} of the time: add --workers" if share > 0.5 else ""

    def facts(self, values: Mapping[str, float], scores: Mapping[str, float], epoch: str) -> dict[str, str]:
        """What a progress display shows besides how far the run is, the most important first.

        Args:
            values: the loss and its parts in the last step.
            scores: what the last finished epoch was judged with, as fractions.
            epoch: which one, of how many.
        """
        (first, loss), *parts = values.items() or [("loss", float("nan"))]
        return {
            first: f"{loss:.4f}",
            **{
                name: f"{value:.4f}"
                if name.endswith("R2")
                else f"{100 * value:.1f} %"  # as the tables have both
                for name, value in scores.items()
            },
            "epoch": epoch,
            "images/s": per_second(self.images_per_second),
            **{name: f"{value:.4f}" for name, value in parts},
        }
