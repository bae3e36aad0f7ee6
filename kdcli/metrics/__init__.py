"""Task-similarity metrics: pure functions over arrays; they know no caches and no models."""

from kdcli.metrics.registry import METRICS, Metric
from kdcli.metrics.targets import Targets

__all__ = ["METRICS", "Metric", "Targets"]
