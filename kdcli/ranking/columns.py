"""The columns of the table of scores: a metric on a representation."""

from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float, Float64

from kdcli.errors import BadDataError, KdError, UsageError, nearest
from kdcli.metrics.base import Metric, On
from kdcli.metrics.checks import check_finite
from kdcli.metrics.targets import Targets
from kdcli.ranking.config import RankConfig
from kdcli.registry import METRICS
from kdcli.types import OutputKind


@final
@dataclass(frozen=True, slots=True)
class Column:
    """A metric on a representation."""

    metric: Metric
    on: On

    @property
    def label(self) -> str:
        """``parc/features``."""
        return f"{self.metric.name}/{self.on}"

    @property
    def array(self) -> OutputKind:
        """What has to be read of a source."""
        return "logits" if self.on == "pseudo" else "features"


def chosen_column(config: RankConfig) -> Column:
    """The column that the ranking follows: with ``--metric all`` the first metric's.

    Raises:
        UsageError: a variant that the metric does not have, or a representation that it does not read.
    """
    metric = _tuned(METRICS.find(_name(config)), config)
    if config.logme_steps is not None and config.metric != "all" and metric.stepped is None:
        raise UsageError(f"{metric.name} is not found by iteration", "Leave --logme-steps out.")
    on = config.on or metric.on[0]
    if on not in metric.on:
        raise UsageError(f"{metric.name} cannot be computed on {on}", f"Use --on {metric.on[0]}.")
    return Column(metric, on)


def _tuned(metric: Metric, config: RankConfig) -> Metric:
    """The metric with the steps that were asked for, where it takes any."""
    return metric.stepped(config.logme_steps) if metric.stepped and config.logme_steps else metric


def _name(config: RankConfig) -> str:
    """``NAME-VARIANT`` for ``--metric NAME --variant VARIANT``; ``plain`` is the metric itself."""
    name = next(iter(METRICS)) if config.metric == "all" else config.metric
    if config.variant is None:
        return name
    known = ["plain", *(other.removeprefix(f"{name}-") for other in METRICS if other.startswith(f"{name}-"))]
    if len(known) == 1:
        raise UsageError(f"{name} has no variants", "Leave --variant out.")
    if config.variant not in known:
        raise UsageError(
            f"--variant {config.variant}: {name} has no such variant.{nearest(config.variant, known)}",
            f"Its variants: {', '.join(known)}.",
        )
    return name if config.variant == "plain" else f"{name}-{config.variant}"


def columns_of(config: RankConfig, own: Column) -> list[Column]:
    """The columns to compute: the own one first, with ``--metric all`` every other one after it.

    Files (``--features``) hold one representation, so they have the columns of that one.
    """
    if config.metric != "all":
        return [own]
    every = [Column(_tuned(metric, config), on) for metric in METRICS.values() for on in metric.on]
    if config.features is not None:
        every = [column for column in every if column.on == own.on]
    return [own, *(column for column in every if column != own)]


def score(column: Column, stored: Float[np.ndarray, "n d"], targets: Targets) -> float:
    """Score of stored features or logits against labels, which all sources share.

    Raises:
        BadDataError: the score would be undefined; the message names the cause.
    """
    check_finite(stored, targets.row_name)
    values = softmax(stored) if column.on == "pseudo" else stored
    if not METRICS.strangers:
        return column.metric(values, targets)
    try:
        return float(column.metric(values, targets))
    except KdError:
        raise
    except Exception as error:  # a stranger's metric may raise, or give, anything
        raise BadDataError(
            f"the metric {column.metric.name} failed: {type(error).__name__}: {error}",
            "Correct it, or choose one that kd brings.",
        ) from error


def softmax(logits: Float[np.ndarray, "n c"]) -> Float64[np.ndarray, "n c"]:
    """Pseudo-labels of a source: its class probabilities at temperature 1, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted
