"""Configuration of every step: pydantic models hold the defaults, the types and the ranges.

Precedence: flag > ``--set`` > ``--config`` file > default. All errors are reported in one go.
"""

from kdcli.config.resolving import command_line, resolve, to_yaml
from kdcli.config.steps import (
    CacheConfig,
    MethodName,
    MetricName,
    ProbeConfig,
    RankConfig,
    StepConfig,
    TrainConfig,
    old_new_weight,
)

__all__ = [
    "CacheConfig",
    "MethodName",
    "MetricName",
    "ProbeConfig",
    "RankConfig",
    "StepConfig",
    "TrainConfig",
    "command_line",
    "old_new_weight",
    "resolve",
    "to_yaml",
]
