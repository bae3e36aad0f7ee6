"""Task-similarity metrics: pure functions over arrays; they know no caches and no models."""

from kdcli.metrics.base import Metric
from kdcli.metrics.targets import Targets
from kdcli.registry import METRICS

__all__ = ["METRICS", "Metric", "Targets"]
