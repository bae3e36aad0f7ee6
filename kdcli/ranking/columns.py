"""The columns of the table of scores: a metric on a representation."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import UsageError
from kdcli.metrics import METRICS, Targets
from kdcli.metrics.checks import RowName, check_finite
from kdcli.metrics.registry import On
from kdcli.ranking.config import RankConfig
from kdcli.types import OutputKind


@final
@dataclass(frozen=True, slots=True)
class Column:
    """A metric on a representation."""

    metric: str
    on: On

    @property
    def label(self) -> str:
        """``parc/features``."""
        return f"{self.metric}/{self.on}"

    @property
    def array(self) -> OutputKind:
        """What has to be read of a source."""
        return "logits" if self.on == "pseudo" else "features"


def chosen_column(config: RankConfig) -> Column:
    """The column that the ranking follows: with ``--metric all`` PARC, as in P2.

    Raises:
        UsageError: ``--variant`` of another metric than PARC, or a representation that the metric does not read.
    """
    metric: str = "parc" if config.metric == "all" else config.metric
    if config.variant is not None:
        if metric != "parc":
            raise UsageError(f"--variant is of parc, not of {metric}", "Leave --variant out.")
        metric = metric if config.variant == "plain" else f"{metric}-{config.variant}"
    possible = METRICS[metric].on
    on = config.on or possible[0]
    if on not in possible:
        raise UsageError(f"{metric} cannot be computed on {on}", f"Use --on {possible[0]}.")
    return Column(metric, on)


def columns_of(config: RankConfig, own: Column) -> list[Column]:
    """The columns to compute: the own one first, with ``--metric all`` every other one after it.

    Files (``--features``) hold one representation, so they have the columns of that one.
    """
    if config.metric != "all":
        return [own]
    every = [Column(metric, on) for metric in METRICS for on in METRICS[metric].on]
    if config.features is not None:
        every = [column for column in every if column.on == own.on]
    return [own, *(column for column in every if column != own)]


def score(
    column: Column,
    stored: Float[np.ndarray, "n d"],
    targets: Targets,
    row_name: RowName,
) -> float:
    """Score of stored features or logits against labels, which all sources share.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_finite(stored, row_name)
    values = softmax(stored) if column.on == "pseudo" else stored
    return METRICS[column.metric].score(values, targets, row_name=row_name)


def softmax(logits: Float[np.ndarray, "n c"]) -> Float64[np.ndarray, "n c"]:
    """Pseudo-labels of a source: its class probabilities at temperature 1, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted
