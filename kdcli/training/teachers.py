"""Which cached teachers a run uses, with which weight, and whether the cache holds what it needs of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import final

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.errors import CacheMissingError, IdentityError, UsageError
from kdcli.methods.base import Choice, Method
from kdcli.options.resolving import command_line
from kdcli.training.config import StudentConfig
from kdcli.types import Difference, Ranking


@final
@dataclass(frozen=True, slots=True)
class Teachers:
    """The teachers of a run.

    Attributes:
        weights: of each teacher that is read, all > 0, in the order of the method.
        records: the same teachers and the generalist.
        generalist: the teacher that the student starts from and whose head is the classifier, if any.
    """

    weights: dict[str, float]
    records: dict[str, TeacherRecord]
    generalist: TeacherRecord | None = None

    def only(self, weights: Mapping[str, float]) -> "Teachers":
        """Some of them, with these weights."""
        own = [] if self.generalist is None else [self.generalist.name]
        records = {name: self.records[name] for name in dict.fromkeys([*weights, *own])}
        return Teachers(dict(weights), records, self.generalist)


def cache_flags(config: StudentConfig) -> str:
    """The ``--cache`` options of a run, for hints."""
    return " ".join(f"--cache {quote(str(path))}" for path in config.cache) or "--cache PATH"


def require_options(config: StudentConfig, method: Method, ranking: Ranking | None) -> None:
    """Refuse a method whose inputs were not given, before anything is opened.

    Raises:
        UsageError: naming the command that makes what is missing.
    """
    name = method.name
    if method.needs.kinds and not config.cache:
        raise UsageError(
            f"{name} reads teachers from a cache, and no --cache is given",
            f"kd cache-teachers {config.first_data} --cache PATH --teacher SPEC, then add --cache PATH here",
        )
    if method.needs.ranking and ranking is None:
        raise UsageError(
            f"{name} needs --ranking",
            f"kd rank-sources {cache_flags(config)} --json | "
            + command_line(config.model_copy(update={"ranking": "-"})),
        )
    if ranking is not None and not ranking.sources and method.needs.kinds:
        raise UsageError("the ranking has no sources", "Make it anew: kd rank-sources " + cache_flags(config))


def choose_teachers(
    config: StudentConfig,
    method: Method,
    cache: CacheSet,
    ranking: Ranking | None,
    pinned: Sequence[str] = (),
) -> Teachers:
    """Resolve names, check the ranking against the cache, and weigh.

    Args:
        config: names teachers and the generalist.
        method: weighs them.
        cache: where they are.
        ranking: of them, if any.
        pinned: what "all cached teachers" meant when this run began.

    Raises:
        NotFoundError: a teacher of that name is not in the cache.
        IdentityError: the ranking is of other teachers than the cache holds.
        UsageError: no generalist is named, ``--teacher`` contradicts the ranking, or no teacher is left.
    """
    own = method.generalist(config.options)
    if method.needs.generalist and own is None:
        raise UsageError(
            f"{method.name} needs --generalist NAME, the cached teacher that the student starts from",
            f"Cached teachers: {', '.join(cache.teachers) or 'none yet'}.",
        )
    if ranking is not None:
        require_same_sources(ranking, cache, config)
    names = _names(config, cache, ranking, pinned)
    generalist = cache.teacher(own) if own is not None else None
    weighed = method.weigh(Choice(names, ranking, config.options))
    weights = {name: weight for name, weight in weighed.items() if weight > 0}
    _require_agreement(config, weights, generalist)
    if not weights:
        raise UsageError(
            "no teacher has a positive weight, so there is nothing to learn from",
            "Raise --generalist-weight above 0, or cache more teachers.",
        )
    used = dict.fromkeys([*weights, *([generalist.name] if generalist else [])])
    return Teachers(weights, {name: cache.teacher(name) for name in used}, generalist)


def _names(
    config: StudentConfig, cache: CacheSet, ranking: Ranking | None, pinned: Sequence[str]
) -> tuple[str, ...]:
    for name in config.teacher:
        cache.teacher(name)
    chosen = tuple(dict.fromkeys(config.teacher))
    if ranking is None:
        names = chosen or tuple(name for name in pinned if name in cache.teachers) or tuple(cache.teachers)
        if not names:
            raise CacheMissingError(
                f"no teacher is cached in {cache_flags(config).replace('--cache ', '')}",
                f"kd cache-teachers {config.first_data} {cache_flags(config)} --teacher SPEC",
            )
        return names
    return chosen or tuple(source.name for source in ranking.sources)


def _require_agreement(
    config: StudentConfig, weights: dict[str, float], generalist: TeacherRecord | None
) -> None:
    allowed = {*config.teacher, *([generalist.name] if generalist else [])}
    left_out = [name for name in weights if config.teacher and name not in allowed]
    if left_out:
        flags = " ".join(f"--teacher {name}" for name in config.teacher)
        raise UsageError(
            f"--teacher leaves out {', '.join(left_out)}, to which the ranking gives weight",
            f"Rank just these: kd rank-sources {cache_flags(config)} {flags} --json",
        )


def ranked_records(
    ranking: Ranking | None, cache: CacheSet | None, config: StudentConfig
) -> list[TeacherRecord]:
    """The cached teachers that ``--init nearest-source`` chooses among, the highest score first.

    Raises:
        UsageError: no ranking or no cache is given.
        IdentityError: the ranking is of other teachers than the cache holds.
    """
    if ranking is None or cache is None:
        lacking = "--ranking" if ranking is None else "--cache"
        raise UsageError(
            f"--init nearest-source needs {lacking}: it starts from the ranking's best source, as it was cached",
            f"kd rank-sources {cache_flags(config)} --json > ranking.json, then add "
            f"{cache_flags(config)} --ranking ranking.json here",
        )
    require_same_sources(ranking, cache, config)
    best_first = sorted(ranking.sources, key=lambda source: -source.score)
    return [cache.teacher(source.name) for source in best_first]


def require_same_sources(ranking: Ranking, cache: CacheSet, config: StudentConfig) -> None:
    """Refuse a ranking of other teachers than the cache holds.

    Raises:
        IdentityError: naming every source that differs.
    """
    found: list[Difference] = []
    for source in ranking.sources:
        record = cache.teacher(source.name) if source.name in cache.teachers else None
        if record is None:
            found.append(Difference(f"source '{source.name}'", source.id, "not in this cache"))
        elif source.id is not None and source.id != record.id:
            found.append(Difference(f"id of source '{source.name}'", source.id, record.id))
    if found:
        raise IdentityError(
            "the ranking is of other teachers than the cache holds",
            f"Rank the teachers of this cache: kd rank-sources {cache_flags(config)} --json",
            found,
        )
    if ranking.cache_id is not None and ranking.cache_id not in (*cache.cache_ids, joint_id(cache.cache_ids)):
        console.warn(
            "the ranking was made on another cache of the same teachers; its weights are used as they are"
        )


def joint_id(cache_ids: Iterable[str]) -> str:
    """One text for the identities of several caches."""
    return ",".join(cache_ids)
