"""The fine-tune probe (P1 Experiment 3): the whole representation is trained on each draw, by the training engine.

P1 prints SGD with momentum 0.9, weight decay 1e-4, batches of 32, the rate divided by ten at 50 % and 80 %
(appendix A), 50 epochs and a log-scale grid of rates for downstream fine-tuning; which split judges the grid, how
many draws there are and the augmentation it does not. Ours: a share of each draw's images is set aside to choose the
rate, then the model is trained on all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kdcli.data.sources import ImageData
from kdcli.methods.base import method_names
from kdcli.models.export import export_model
from kdcli.models.spec import ModelSpec, open_model
from kdcli.models.student import require_trainable
from kdcli.probing.config import ProbeConfig
from kdcli.probing.features import as_shown, model_outputs
from kdcli.probing.marks import mark
from kdcli.probing.protocols import Draw
from kdcli.probing.representations import EXPORT, Representation
from kdcli.probing.targets import Target
from kdcli.training.config import StudentConfig
from kdcli.training.lr_grid import train_grid
from kdcli.training.sources import Sources
from kdcli.training.train import train_student

BATCH = 32


@final
@dataclass(frozen=True, slots=True)
class _Given:
    """Opens the images of one draw, whatever is asked for."""

    data: ImageData

    def __call__(self, *_: Any, **__: Any) -> ImageData:
        return self.data


def fine_tune_accuracies(
    representation: Representation, target: Target, config: ProbeConfig
) -> Iterator[Draw]:
    """Fine-tune and test, one draw after the other. Runs that are finished are read, others go on.

    Args:
        representation: to start from.
        target: with its draws.
        config: with ``out``.

    Yields:
        One result per draw; ``choice`` holds the learning rate.

    Raises:
        UsageError: a model that cannot be trained.
        IdentityError: a cached teacher whose spec now gives other weights.
        StoppedEarly: a signal arrived; the same call goes on.
        KdError: see :func:`kdcli.training.train.train_student`.
    """
    assert config.out is not None
    assert target.train is not None
    assert target.draws is not None
    place = config.out / _folder(representation.name) / _folder(target.name)
    start = _start(representation, target, place)
    for number, rows in enumerate(target.draws):
        shots = target.train.select(np.sort(rows))
        out = place / f"draw-{number}"
        rate = _train(start, shots, out, config)
        model = as_shown(open_model(f"local-dir:{out / EXPORT}"), config)
        logits = model_outputs(model, target.test, config, "logits", f"draw {number + 1}: test images")
        marks = mark(lambda scores: scores, np.arange(logits.shape[1]), logits, target.test_labels)
        yield Draw(float(marks.top1.mean()), None, 1, 0, marks, {"lr": rate})


def _train(start: str, shots: ImageData, out: Path, config: ProbeConfig) -> float:
    """Train on one draw; the learning rate that was taken."""
    several = len(config.rates) > 1
    training = StudentConfig(
        data=shots.location,
        student=start,
        init="pretrained",
        method=method_names("only_labels")[0],
        out=out,
        epochs=config.epochs,
        batch_size=min(BATCH, len(shots)),
        optimizer="momentum",  # timm's "sgd" is Nesterov's, which P1 does not say
        weight_decay=1e-4,
        schedule="step",
        warmup=0.0,
        milestones=(0.5, 0.8),
        lr=None if several else config.rates[0],
        lr_grid=config.lr_grid if several else None,
        validation=config.validation if several else None,
        recipe=config.recipe,
        eval_geometry=config.eval_geometry,
        seed=config.seed,
        device=config.device,
        amp=config.amp,
        workers=config.workers,
        data_root=config.data_root,
    )
    sources = Sources(_Given(shots))
    if not several:
        train_student(training, sources=sources)
        return config.rates[0]
    grid = train_grid(training, sources=sources).details["grid"]
    best = max(grid, key=lambda each: (each["top1"] if each["top1"] is not None else -1, -each["lr"]))
    return float(best["lr"])


def _start(representation: Representation, target: Target, place: Path) -> str:
    """What to train: the representation without its classifier, if that would be taken for the target's.

    The engine draws a new classifier unless the model has one of the same width: of another task, that would be a
    start of its own.
    """
    spec = representation.start()
    model = open_model(ModelSpec.parse(spec))
    require_trainable(model)
    assert target.train is not None
    names = target.train.class_names
    width = len(names) if names is not None else int(np.max(target.train.labels)) + 1
    if model.num_classes != width:
        return spec
    headless = open_model(ModelSpec.parse(spec), num_classes=0)
    export_model(headless, place / "start", None)
    return f"local-dir:{(place / 'start').absolute()}"


def _folder(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
