"""Which cached teachers a run uses, with which weight, and whether the cache holds what it needs of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any, final

import numpy as np

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.fingerprints import fingerprints, unpack
from kdcli.cache.provenance import TeacherRecord
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import CacheMissingError, IdentityError, UsageError
from kdcli.methods.base import Choice, Method, find_method, method_names
from kdcli.options.resolving import command_line, spelled
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


def _ranking(config: StudentConfig, **asked: Any) -> str:
    """The command that ranks by the labels that a run has, for hints."""
    data_root = {} if config.data_root is None else {"data_root": config.data_root}
    return spelled(
        "rank-sources", cache=config.cache or "PATH", data=config.first_data, **data_root, **asked, json=True
    )


def require_options(config: StudentConfig, method: Method, ranking: Ranking | None) -> None:
    """Refuse a method whose inputs were not given, before anything is opened.

    Raises:
        UsageError: naming the command that makes what is missing.
    """
    needs = method.needs_of(config.options)
    if config.multi_label is not None and not needs.several_labels:
        learns = "no labels" if method.predicts(config.options) else "one class an image"
        raise UsageError(
            f"{method.name} learns {learns}, and --multi-label gives several labels an image",
            "Leave --multi-label out; or use --method labels-only, or another that takes several labels (kd methods).",
        )
    name = method.name
    if needs.kinds and not config.cache:
        raise UsageError(
            f"{name} reads teachers from a cache, and no --cache is given",
            f"kd cache-teachers {config.first_data} --cache PATH --teacher SPEC, then add --cache PATH here",
        )
    if needs.ranking and ranking is None:
        raise UsageError(
            f"{name} needs --ranking",
            f"{_ranking(config)} | " + command_line(config.model_copy(update={"ranking": "-"})),
        )
    if ranking is not None and not ranking.sources and needs.kinds:
        raise UsageError("the ranking has no sources", "Make it anew: " + _ranking(config))


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
    if method.needs_of(config.options).generalist and own is None:
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
            _raising(config.options),
        )
    used = dict.fromkeys([*weights, *([generalist.name] if generalist else [])])
    records = {name: cache.teacher(name) for name in used}
    if "logits" in method.needs_of(config.options).kinds:
        _require_classifiers(method, records)
    needs = method.needs_of(config.options)
    if needs.classes or needs.same:  # before their classes are compared with others
        whole = [name for name in weights if not (needs.largest and "topk" in records[name].outputs)]
        cache.require_kept(dict.fromkeys(whole, sorted(needs.kinds - {"maps", "logp_label"})))
    return Teachers(weights, records, generalist)


def _raising(options: object) -> str:
    """What gives some teacher a weight, by the options that weigh them."""
    told = getattr(options, "teacher_weight", ())
    if told:
        return f"Give one of them a weight above 0, such as --teacher-weight {told[0].partition('=')[0]}=1."
    return "Raise --generalist-weight above 0, or cache more teachers."


def _require_classifiers(method: Method, records: Mapping[str, TeacherRecord]) -> None:
    """Refuse teachers whose logits no command could add to the cache."""
    headless = [name for name, record in records.items() if not record.num_classes]
    if headless:
        spare = method.spares.get("logits")
        raise UsageError(
            f"teacher '{headless[0]}' has no classifier, so it gives no logits, and {method.name} learns from logits",
            (f"Learn without logits ({spare}), or use" if spare else "Use")
            + f" a method of features: --method {' or '.join(method_names('only_features'))}; see kd methods.",
        )


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
        raise UsageError(
            f"--teacher leaves out {', '.join(left_out)}, to which the ranking gives weight",
            f"Rank just these: {_ranking(config, teacher=config.teacher)}",
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
            f"{_ranking(config)} > ranking.json, then add {cache_flags(config)} --ranking ranking.json here",
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
            f"Rank the teachers of this cache: {_ranking(config)}",
            found,
        )
    if ranking.cache_id is not None and ranking.cache_id not in (*cache.cache_ids, joint_id(cache.cache_ids)):
        console.warn(
            "the ranking was made on another cache of the same teachers; its weights are used as they are"
        )


def require_within_labels(ranking: Ranking, cache: CacheSet, data: ImageData, config: StudentConfig) -> None:
    """Refuse a ranking that was made with labels which the student does not have (P2 section 4.1).

    Args:
        ranking: of a probe set; one that does not say which images these are is taken as it is.
        cache: that holds the images.
        data: all that the run is given, a validation split included.
        config: the run, for the hint.

    Raises:
        IdentityError: some probe images are not among the labelled ones; how many, and the command that ranks anew.
    """
    if "images" not in ranking.probe:
        console.note(
            "the ranking does not say on which images it was made: no check that their labels are the student's"
        )
        return
    probe = unpack(ranking.probe["images"])
    if not find_method(config.method).needs_of(config.options).labels:
        console.note(f"the ranking was made with {len(probe)} labels, and {config.method} learns from none")
        return
    labelled = data.select(np.flatnonzero(data.labels >= 0))
    known = fingerprints(cache, cache.rows_of(labelled, check_content=False))
    if outside := int((~np.isin(probe, known)).sum()):
        raise IdentityError(
            f"{outside} of the {len(probe)} images that the ranking was made on are not among the {len(labelled)} "
            f"labelled images of {config.first_data}: sources are chosen by labels that the student has (P2 4.1)",
            _ranking_anew(ranking, cache, config),
        )


def _ranking_anew(ranking: Ranking, cache: CacheSet, config: StudentConfig) -> str:
    """The command that makes a ranking by the labels of a run, otherwise like one that there is."""
    weighting = ranking.weighting
    asked = {
        "metric": ranking.metric,
        "on": ranking.on,
        "probe_size": ranking.probe.get("size"),
        **{name: ranking.probe.get(name) for name in ("seed", "repeats", "logme_steps")},
        "scheme": weighting.get("scheme"),
        "power": weighting.get("power"),
        "sources": weighting.get("sources"),
    }
    usual = {"metric": "parc", "on": "features", "probe_size": 500, "seed": 0}
    told = {name: value for name, value in asked.items() if value not in (None, usual.get(name))}
    names = tuple(source.name for source in ranking.sources)
    if set(names) != set(cache.teachers):
        told["teacher"] = names
    file = config.ranking if config.ranking not in (None, "-") else "ranking.json"
    return f"{_ranking(config, **told)} > {quote(str(file))}"


def joint_id(cache_ids: Iterable[str]) -> str:
    """One text for the identities of several caches."""
    return ",".join(cache_ids)
