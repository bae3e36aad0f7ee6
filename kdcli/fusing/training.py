"""Training of a joint teacher: a loop of its own, as there are no pixels; after a kill it goes on where it was."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not declare it
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from kdcli.console import console
from kdcli.errors import DivergedError, StoppedEarly
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.samples import Piece, Rows, Samples
from kdcli.methods.base import Settings
from kdcli.models.arriving import arriving
from kdcli.models.fused import JointTeacher
from kdcli.precision import resolve_amp
from kdcli.runtime import StopFlag
from kdcli.training.checkpoint import (
    Stateful,
    append_metrics,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_metrics,
)
from kdcli.training.engine import make_accelerator
from kdcli.training.progress import Progress
from kdcli.training.schedule import make_schedule
from kdcli.training.settings import resolve_settings
from kdcli.training.validation import BestEpoch


def settings_of(config: FuseConfig) -> Settings:
    """The engine's numbers of a joint teacher's training; all parameters decay.

    Raises:
        UsageError: an unknown optimiser, or a final rate of a schedule that has none to choose.
    """
    given = Settings(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=config.schedule,
        decay_all=True,
    )
    return resolve_settings(config, given)


@final
class Training:
    """One joint teacher learning from the labels of one or several data sets.

    The loss is the mean cross-entropy of a batch, each image by its own data set's head; a batch mixes the
    data sets in proportion to their sizes, which Algorithm 1 of P4 leaves open.

    Args:
        config: the recipe.
        samples: what is read.
        joint: to train, in place.
        folder: of metrics.jsonl and state/.
        device: where to train.
    """

    def __init__(
        self, config: FuseConfig, samples: Samples, joint: JointTeacher, folder: Path, device: str
    ) -> None:
        self._config, self._samples, self._device = config, samples, device
        self._folder = folder
        self._joint = joint.to(device)
        self._heads = list(joint.spec.heads)
        settings = settings_of(config)
        self._accelerator = make_accelerator(device, resolve_amp(config.amp, device, config.amp))
        optimizer: Optimizer = create_optimizer_v2(
            [{"params": list(joint.parameters()), "weight_decay": config.weight_decay}],  # all of them decay
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=settings.momentum,
        )
        self._schedule = make_schedule(optimizer, settings, samples.steps(config.batch_size) * config.epochs)
        self._optimizer = self._accelerator.prepare(optimizer)
        self._best = None if config.select == "last" else BestEpoch(joint)
        if self._best is not None:
            self._best.to(device)
        modules = {"joint": joint} | ({} if self._best is None else {"best": self._best})
        self._stateful = Stateful(modules, optimizer, self._accelerator.scaler)

    def run(self, stop: StopFlag) -> dict[str, Any]:
        """Train from the last checkpoint to the end; the joint teacher is then the epoch that was selected.

        Returns:
            ``epoch`` that was selected, and its line of metrics.jsonl.

        Raises:
            DivergedError: the loss is not finite.
            StoppedEarly: a signal arrived; everything is saved.
        """
        state, metrics = self._folder / "state", self._folder / "metrics.jsonl"
        place, progress = latest_checkpoint(state), Progress()
        if place is not None:
            progress = load_checkpoint(place, self._stateful)
            console.note(f"going on after epoch {progress.epoch}, step {progress.step}")
        write_metrics(metrics, progress.history)
        while progress.epoch < self._config.epochs:
            self._epoch(progress, stop)
            facts: dict[str, Any] = self._judged()
            number = progress.epoch + 1
            if self._best is not None:
                self._best.offer(self._joint, facts[self._criterion], number)
            document = progress.close_epoch(facts)
            append_metrics(metrics, document)
            save_checkpoint(state, self._stateful, progress)
            shown = ", ".join(
                f"{k} {v:.4f}" for k, v in document.items() if k in ("loss", "val_top1", "test_top1")
            )
            console.note(f"epoch {number}/{self._config.epochs}: {shown}")
        epoch = self._config.epochs
        if self._best is not None:
            self._best.restore(self._joint)
            epoch = int(self._best.epoch)
        return {"epoch": epoch, "metrics": progress.history[epoch - 1]}

    @property
    def _criterion(self) -> str:
        return "test_top1" if self._config.select == "best-on-test" else "val_top1"

    def _epoch(self, progress: Progress, stop: StopFlag) -> None:
        self._joint.train()
        batches = self._samples.batches(self._config.batch_size, self._config.seed, progress.epoch)
        steps = [
            [rows[i :: self._config.accumulate] for i in range(self._config.accumulate)] for rows in batches
        ]
        for pieces in self._samples.ahead(steps[progress.step :], self._device):
            if stop:
                save_checkpoint(self._folder / "state", self._stateful, progress)
                raise StoppedEarly(
                    f"stopped by a signal in epoch {progress.epoch + 1} after step {progress.step}; all is saved",
                    "Run the same command again to go on.",
                )
            begun = time.monotonic()
            loss = self._step(pieces, progress.steps)
            progress.add({"loss": loss}, sum(len(piece.rows) for piece in pieces), time.monotonic() - begun)

    def _step(self, pieces: Sequence[Piece], number: int) -> float:
        self._schedule.step_update(number + 1)
        self._optimizer.zero_grad(set_to_none=True)
        count, losses = sum(len(piece.rows) for piece in pieces), []
        for piece in pieces:
            with self._accelerator.autocast():
                features, _ = self._joint.embed(piece.inputs)
                # Of all, however unequal the pieces.
                loss = self._loss(features, piece) * (len(piece.rows) / count)
            losses.append(loss.detach())
            self._accelerator.backward(loss)
        value = float(sum(torch.stack(losses).tolist()))  # the one wait of a step, before anything is updated
        if not math.isfinite(value):
            lr = self._optimizer.param_groups[0]["lr"]
            raise DivergedError(
                f"the loss is {value} at step {number + 1} (learning rate {lr:g})",
                f"The last checkpoint is kept. Start anew with a smaller rate: --lr {lr / 10:g} --overwrite",
            )
        self._optimizer.step()
        return value

    def _loss(self, features: Tensor, piece: Piece) -> Tensor:
        total = torch.zeros((), device=features.device)
        for number, places, labels in piece.parts:
            logits = self._joint.classify(features[places], self._heads[number])
            total = total + F.cross_entropy(
                logits.float(), labels, reduction="sum", label_smoothing=self._config.label_smoothing
            )
        return total / len(piece.rows)

    def _judged(self) -> dict[str, Any]:
        """top-1 and top-5 on the validation split and on the tests: of each data set, and the mean of these."""
        facts: dict[str, Any] = {}
        for word, rows in (("val", self._samples.validation), ("test", self._samples.test)):
            for measure, found in self._accuracies(rows).items() if len(rows) else ():
                facts[f"{word}_{measure}"] = sum(found.values()) / len(found)
                facts |= {f"{word}_{measure}/{name}": value for name, value in found.items()}
        return facts

    def _accuracies(self, rows: Rows) -> dict[str, dict[str, float]]:
        self._joint.eval()
        right, size = np.zeros((2, len(self._heads)), np.int64), self._config.batch_size
        steps = [(rows[start : start + size],) for start in range(0, len(rows), size)]
        with torch.inference_mode():
            for _, hits in arriving(map(self._hits, self._samples.ahead(steps, self._device)), self._device):
                for number, counts in hits.items():
                    right[:, int(number)] += counts
        totals = np.bincount(self._samples.part[rows], minlength=len(self._heads))
        return {
            measure: {name: float(own[i] / totals[i]) for i, name in enumerate(self._heads) if totals[i]}
            for measure, own in zip(("top1", "top5"), right, strict=True)
        }

    def _hits(self, pieces: Sequence[Piece]) -> tuple[None, dict[str, Tensor]]:
        """How many images of each data set are right at first, and among five, on the device."""
        (piece,) = pieces
        features, _ = self._joint.embed(piece.inputs)
        found = {}
        for number, places, labels in piece.parts:
            logits = self._joint.classify(features[places], self._heads[number])
            five = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = (logits.argmax(dim=1) == labels).sum(), (five == labels[:, None]).sum()
            found[str(number)] = torch.stack(hits)
        return None, found
