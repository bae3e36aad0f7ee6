"""kd: expensive teachers run once, their outputs are cached, students are served from the cache.

The four steps and their configurations can be imported from here:

    from kdcli import CacheConfig, cache_teachers
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcli._version import __version__ as __version__

if TYPE_CHECKING:
    from kdcli.cache.cacheset import CacheSet as CacheSet
    from kdcli.caching import CacheResult as CacheResult
    from kdcli.caching import cache_teachers as cache_teachers
    from kdcli.config import CacheConfig as CacheConfig
    from kdcli.config import ProbeConfig as ProbeConfig
    from kdcli.config import RankConfig as RankConfig
    from kdcli.config import TrainConfig as TrainConfig
    from kdcli.data.sources import open_data as open_data
    from kdcli.models.spec import open_model as open_model
    from kdcli.probing.result import ProbeResult as ProbeResult
    from kdcli.probing.step import eval_probe as eval_probe
    from kdcli.probing.step import eval_probes as eval_probes
    from kdcli.ranking import rank_sources as rank_sources
    from kdcli.training.result import TrainResult as TrainResult
    from kdcli.training.run import train_student as train_student
    from kdcli.types import Ranking as Ranking


_HOMES = {
    "CacheSet": "kdcli.cache.cacheset",
    "CacheResult": "kdcli.caching",
    "cache_teachers": "kdcli.caching",
    "CacheConfig": "kdcli.config",
    "ProbeConfig": "kdcli.config",
    "RankConfig": "kdcli.config",
    "TrainConfig": "kdcli.config",
    "open_data": "kdcli.data.sources",
    "open_model": "kdcli.models.spec",
    "ProbeResult": "kdcli.probing.result",
    "eval_probe": "kdcli.probing.step",
    "eval_probes": "kdcli.probing.step",
    "rank_sources": "kdcli.ranking",
    "TrainResult": "kdcli.training.run",
    "train_student": "kdcli.training.run",
    "Ranking": "kdcli.types",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``kd --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcli' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
