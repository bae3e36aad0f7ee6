"""kd: expensive teachers run once, their outputs are cached, students are served from the cache.

The four steps and their configurations can be imported from here:

    from kdcli import CacheConfig, cache_teachers
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcli._version import __version__ as __version__
from kdcli.errors import Advice

if TYPE_CHECKING:
    from kdcli.cache.cacheset import CacheSet as CacheSet
    from kdcli.data.sources import open_data as open_data
    from kdcli.extract import CacheResult as CacheResult
    from kdcli.extract import cache_teachers as cache_teachers
    from kdcli.extract.config import CacheConfig as CacheConfig
    from kdcli.models.spec import open_model as open_model
    from kdcli.probing.config import ProbeConfig as ProbeConfig
    from kdcli.probing.probe import eval_probe as eval_probe
    from kdcli.probing.probe import eval_probes as eval_probes
    from kdcli.probing.result import ProbeResult as ProbeResult
    from kdcli.ranking import rank_sources as rank_sources
    from kdcli.ranking.config import RankConfig as RankConfig
    from kdcli.training.config import StudentConfig as StudentConfig
    from kdcli.training.result import TrainResult as TrainResult
    from kdcli.training.train import train_student as train_student
    from kdcli.types import Ranking as Ranking


def _words(advice: Advice) -> str:
    """The hints of the storage layer are made by a layer that knows the command line."""
    return str(import_module("kdcli.extract.hints").words(advice))


Advice.words = _words

_HOMES = {
    "CacheSet": "kdcli.cache.cacheset",
    "CacheResult": "kdcli.extract",
    "cache_teachers": "kdcli.extract",
    "CacheConfig": "kdcli.extract.config",
    "ProbeConfig": "kdcli.probing.config",
    "RankConfig": "kdcli.ranking.config",
    "StudentConfig": "kdcli.training.config",
    "open_data": "kdcli.data.sources",
    "open_model": "kdcli.models.spec",
    "ProbeResult": "kdcli.probing.result",
    "eval_probe": "kdcli.probing.probe",
    "eval_probes": "kdcli.probing.probe",
    "rank_sources": "kdcli.ranking",
    "TrainResult": "kdcli.training.train",
    "train_student": "kdcli.training.train",
    "Ranking": "kdcli.types",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``kd --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcli' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
