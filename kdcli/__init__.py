"""kd: expensive teachers run once, their outputs are cached, students are served from the cache.

Every command is a function here. It takes its options as keywords, or its configuration, and gives a value:

    import kdcli

    kdcli.cache_teachers("photos", cache="photos.kd", teacher="resnet50.a1_in1k")
    ranking = kdcli.rank_sources(cache="photos.kd")
    ranking.to_pandas()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcli._version import __version__ as __version__
from kdcli.errors import Advice
from kdcli.verbs.verb import Verb

if TYPE_CHECKING:
    from kdcli.auditing.result import AuditResult
    from kdcli.cache.admin.diff import CacheDiff
    from kdcli.cache.admin.inventory import CacheInfo
    from kdcli.cache.admin.moving import Moved
    from kdcli.cache.admin.remove import Removal
    from kdcli.cache.stores.push import Pushed
    from kdcli.checking.result import CheckResult
    from kdcli.comparing.result import CompareResult
    from kdcli.data.sources import open_data as open_data
    from kdcli.demo.result import DemoResult
    from kdcli.distilling.result import DistillResult
    from kdcli.exporting.push import Exported
    from kdcli.extract.config import CacheConfig as CacheConfig
    from kdcli.extract.costs import CachePlan
    from kdcli.extract.extend import ExtendResult
    from kdcli.extract.repair import RepairResult
    from kdcli.extract.result import CacheResult
    from kdcli.models.spec import open_model as open_model
    from kdcli.probing.config import ProbeConfig as ProbeConfig
    from kdcli.probing.result import ProbeTable
    from kdcli.ranking.answer import RankAnswer
    from kdcli.ranking.config import RankConfig as RankConfig
    from kdcli.reporting.result import ReportResult
    from kdcli.serving.opened import open_cache as open_cache
    from kdcli.training.config import StudentConfig as StudentConfig
    from kdcli.training.result import TrainResult
    from kdcli.verbs.results import FuseResult, Listed, SoupResult
    from kdcli.verbs.training import train_sweep as train_sweep

# --- the commands: a line each ------------------------------------------------------------------
# fmt: off
distill: "Verb[DistillResult]" = Verb("distill", "distilling.config:DistillConfig", "distilling.distill:distill")
cache_teachers: "Verb[CacheResult]" = Verb("cache_teachers", "extract.config:CacheConfig", "extract.extract:cache_teachers")
rank_sources: "Verb[RankAnswer]" = Verb("rank_sources", "ranking.config:RankConfig", "ranking.answer:rank_sources")
fuse_teachers: "Verb[FuseResult]" = Verb("fuse_teachers", "fusing.config:FuseConfig", "verbs.steps:fuse_teachers")
train_student: "Verb[TrainResult]" = Verb("train_student", "training.config:StudentConfig", "verbs.training:train_student")
soup: "Verb[SoupResult]" = Verb("soup", "training.soup_config:SoupConfig", "verbs.steps:soup")
eval_probe: "Verb[ProbeTable]" = Verb("eval_probe", "probing.config:ProbeConfig", "probing.probe:eval_probes")
compare: "Verb[CompareResult]" = Verb("compare", "comparing.config:CompareConfig", "verbs.steps:compare")
audit: "Verb[AuditResult]" = Verb("audit", "auditing.config:AuditConfig", "auditing.audit:audit")
report: "Verb[ReportResult]" = Verb("report", "reporting.config:ReportConfig", "reporting.report:report")
check_data: "Verb[CheckResult]" = Verb("check_data", "checking.config:CheckConfig", "checking.check:check")
run_demo: "Verb[DemoResult]" = Verb("run_demo", "demo.config:DemoConfig", "verbs.steps:run_demo")
export_push: "Verb[Exported]" = Verb("export_push", "exporting.config:ExportPushConfig", "exporting.push:push_student")
cache_ls: "Verb[Listed]" = Verb("cache_ls", "cache.admin.config:LsConfig", "verbs.caches:cache_ls")
cache_info: "Verb[CacheInfo]" = Verb("cache_info", "cache.admin.config:InfoConfig", "verbs.caches:cache_info")
cache_diff: "Verb[CacheDiff]" = Verb("cache_diff", "cache.admin.config:DiffConfig", "verbs.caches:cache_diff")
cache_gc: "Verb[Listed]" = Verb("cache_gc", "cache.admin.config:GcConfig", "verbs.caches:cache_gc")
cache_rm: "Verb[Removal]" = Verb("cache_rm", "cache.admin.config:RmConfig", "verbs.caches:cache_rm")
cache_verify: "Verb[Listed]" = Verb("cache_verify", "cache.admin.config:VerifyConfig", "verbs.caches:cache_verify")
cache_repair: "Verb[RepairResult]" = Verb("cache_repair", "cache.admin.config:RepairConfig", "verbs.caches:cache_repair")
cache_plan: "Verb[CachePlan]" = Verb("cache_plan", "extract.config:PlanConfig", "verbs.caches:cache_plan")
cache_extend: "Verb[ExtendResult]" = Verb("cache_extend", "cache.admin.config:ExtendConfig", "verbs.caches:cache_extend")
cache_pack: "Verb[Moved]" = Verb("cache_pack", "cache.admin.config:PackConfig", "verbs.caches:cache_pack")
cache_unpack: "Verb[Moved]" = Verb("cache_unpack", "cache.admin.config:UnpackConfig", "verbs.caches:cache_unpack")
cache_push: "Verb[Pushed]" = Verb("cache_push", "cache.admin.config:PushConfig", "verbs.caches:cache_push")
cache_pull: "Verb[Moved]" = Verb("cache_pull", "cache.admin.config:PullConfig", "verbs.caches:cache_pull")
cache_merge: "Verb[Moved]" = Verb("cache_merge", "cache.admin.config:MergeConfig", "verbs.caches:cache_merge")
# fmt: on


def _words(advice: Advice) -> str:
    """The hints of the storage layer are made by a layer that knows the command line."""
    return str(import_module("kdcli.extract.hints").words(advice))


Advice.words = _words

_HOMES = {
    "CacheConfig": "kdcli.extract.config",
    "ProbeConfig": "kdcli.probing.config",
    "RankConfig": "kdcli.ranking.config",
    "StudentConfig": "kdcli.training.config",
    "open_cache": "kdcli.serving.opened",
    "open_data": "kdcli.data.sources",
    "open_model": "kdcli.models.spec",
    "train_sweep": "kdcli.verbs.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``kd --help`` must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    from kdcli.errors import nearest

    raise AttributeError(f"module 'kdcli' has no attribute '{name}'.{nearest(name, __dir__())}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
