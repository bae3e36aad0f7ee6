"""Configuration of every step: pydantic models hold the defaults, the types and the ranges.

Precedence: flag > ``--set`` > ``--config`` file > default. All errors are reported in one go.
"""

from kdcli.config.fusing import FuseConfig
from kdcli.config.grids import c_values
from kdcli.config.probing import ProbeConfig
from kdcli.config.resolving import command_line, created_by, resolve, to_yaml
from kdcli.config.steps import CacheConfig, MetricName, RankConfig, StepConfig
from kdcli.config.sweeping import resolve_sweep
from kdcli.config.training import MethodName, TrainConfig, learning_rates, old_new_weight

__all__ = [
    "CacheConfig",
    "FuseConfig",
    "MethodName",
    "MetricName",
    "ProbeConfig",
    "RankConfig",
    "StepConfig",
    "TrainConfig",
    "c_values",
    "command_line",
    "created_by",
    "learning_rates",
    "old_new_weight",
    "resolve",
    "resolve_sweep",
    "to_yaml",
]
