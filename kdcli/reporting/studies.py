"""Rankings and caches of a report: how sources were ranked, and what is kept."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.cache.admin.inventory import CacheInfo, PartState, inspect_cache
from kdcli.console import size
from kdcli.errors import named
from kdcli.extract.config import CacheConfig
from kdcli.models.properties import parameters_of
from kdcli.reporting import charts
from kdcli.reporting.budgets import top1_of
from kdcli.reporting.cells import Cell, number, percent, word
from kdcli.reporting.document import Column, Columns, Command, Notes, Part, Section, Table, tabulate
from kdcli.reporting.material import Ranked, Run
from kdcli.reporting.students import line_of

MOST_RANKINGS = 6
"""Rankings that are drawn; all are in the table."""

# --- rankings ---------------------------------------------------------------------------------


def ranking_section(rankings: Sequence[Ranked]) -> Section | None:
    """Scores and weights."""
    if not rankings:
        return None
    names = _names([ranked.path for ranked in rankings])
    columns: Columns = {
        Column("Source", "name"): lambda row: word(row[2].name),
        Column("File", "text", setting=True): lambda row: word(row[0]),
        Column("Metric", "text", setting=True): lambda row: word(row[1].metric),
        Column("Outputs", "text", setting=True): lambda row: word(row[1].on),
        Column("Score"): lambda row: number(row[2].score, 4),
        Column("Weight"): lambda row: number(row[2].weight, 4),
        Column("Scheme", "text", setting=True): lambda row: word(str(row[1].weighting.get("scheme", ""))),
    }
    named = list(zip(names, rankings, strict=True))
    rows = [(name, ranked.ranking, source) for name, ranked in named for source in ranked.ranking.sources]
    distinct = {_scores_of(ranked): (name, ranked) for name, ranked in reversed(named)}
    shown = list(reversed(distinct.values()))[:MOST_RANKINGS]
    several = len(rankings) > 1
    parts: list[Part] = [
        charts.ranking_bars(ranked.ranking, f"ranking-{place}", name if several else "")
        for place, (name, ranked) in enumerate(shown, 1)
    ]
    if several:
        parts.append(Notes((f"{len(rankings)} rankings, {len(distinct)} of them with different scores; "
                            f"{len(shown)} are drawn.",)))  # fmt: skip
    said = Notes((trust(rankings[0]),)) if not several and len(rankings[0].ranking.sources) > 1 else None
    return Section("Ranking", (*((said,) if said else ()), *parts, tabulate("rankings", rows, columns)))


def trust(ranked: Ranked) -> str:
    """What a ranking says, and how far to trust it, in one sentence or two."""
    first, *others = ranked.ranking.sources
    if not others:
        return ""
    images = ranked.ranking.probe.get("size")
    said = (
        f"The ranking ({ranked.ranking.metric}{f', {images} probe images' if images else ''}) puts {first.name} first "
        f"of {len(others) + 1} sources"
    )
    own = f"{ranked.ranking.metric}/{ranked.ranking.on}"
    targets = list(((ranked.evidence.get("grid") or {}).get(own) or {}).values())
    checked = (targets[0].get("spearman") or {}) if len(targets) == 1 else {}
    if checked.get("value") is not None:
        ends = (
            f" (95 % {checked['low']:.2f} to {checked['high']:.2f})" if checked.get("low") is not None else ""
        )
        return (
            f"{said}; checked with students of single sources, the order of the scores agrees with that of their "
            f"accuracies by a rank correlation of {checked['value']:.2f}{ends}."
        ).replace("-", "−")
    return (
        f"{said}: a guess from the teachers' outputs that nothing here checked; kd rank-sources --against RUNS "
        "compares it with students of one source each."
    )


def _scores_of(ranked: Ranked) -> tuple[Any, ...]:
    """What makes two rankings the same picture but for their weights."""
    ranking = ranked.ranking
    scores = tuple(sorted((source.name, source.score) for source in ranking.sources))
    return ranking.cache_id, ranking.metric, ranking.on, scores


def _names(paths: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def scores_section(rankings: Sequence[Ranked], runs: Sequence[Run]) -> Section | None:
    """Scores against the accuracy of students of a single source, where there are any."""
    parts: list[Part] = []
    names = _names([ranked.path for ranked in rankings])
    seen = set()
    for place, (name, ranked) in enumerate(zip(names, rankings, strict=True), 1):
        reached = _single_accuracies(ranked, runs)
        points_of = [
            (source.name, source.score, reached[source.name])
            for source in ranked.ranking.sources
            if source.name in reached and math.isfinite(source.score)
        ]
        if len(points_of) > 1 and _scores_of(ranked) not in seen:
            seen.add(_scores_of(ranked))
            chart = charts.score_scatter(points_of, ranked.ranking.metric.upper(), f"scores-{place}")
            parts.append(replace(chart, title=name if len(rankings) > 1 else ""))
    return Section("Score against accuracy", tuple(parts)) if parts else None


def _single_accuracies(ranked: Ranked, runs: Sequence[Run]) -> dict[str, float]:
    """Mean accuracy of the students of each single source: of this report's runs, or of the evidence if it has more."""
    found: dict[str, list[float]] = {}
    for run in runs:
        weights = [name for name, weight in (run.result.get("weights") or {}).items() if weight > 0]
        accuracy = top1_of(run)
        same = (
            run.result.get("cache_id") is not None and run.result.get("cache_id") == ranked.ranking.cache_id
        )
        if len(weights) == 1 and same and accuracy is not None:
            found.setdefault(weights[0], []).append(accuracy)
    targets = ranked.evidence.get("targets") or {}
    told = dict(next(iter(targets.values())).get("accuracy") or {}) if len(targets) == 1 else {}
    own = {name: sum(values) / len(values) for name, values in found.items()}
    return told if len(told) > len(own) else own


# --- caches -----------------------------------------------------------------------------------


def read_caches(paths: Sequence[Path]) -> list[CacheInfo]:
    """What is in each cache, from its records alone.

    Raises:
        KdError: one is damaged.
    """
    return [inspect_cache(path) for path in paths]


def cache_section(caches: Sequence[CacheInfo]) -> Section | None:
    """The inventory: caches, and the teachers in them."""
    if not caches:
        return None
    columns: Columns = {
        Column("Cache", "name"): lambda info: Cell(named(str(info.path)), info.name),
        Column("Data", "text"): lambda info: word(" ++ ".join(each.spec for each in info.manifest.segments)),
        Column("Images"): lambda info: number(info.manifest.samples, 0),
        Column("Views", setting=True): lambda info: number(info.manifest.views, 0),
        Column("Teachers"): lambda info: number(len(info.teachers), 0),
        Column("Complete, %"): lambda info: percent(info.done / info.total if info.total else None),
        Column("Size, MB"): lambda info: number(info.bytes, 1, 1e6),
        Column("Storage", "text", setting=True): lambda info: word(info.manifest.backend),
        Column("Dropped images"): lambda info: number(len(info.dropped) or None, 0),
    }
    total = size(sum(info.bytes for info in caches))
    lines = Notes((f"{len(caches)} {'cache' if len(caches) == 1 else 'caches'} of {total}.",))
    return Section("Caches", (tabulate("caches", caches, columns), lines, _teachers(caches)))


def _teachers(caches: Sequence[CacheInfo]) -> Table:
    """The teachers of all caches."""
    rows = [
        (info, record, [info.states[f"{record.name}/{kind}"] for kind in record.outputs])
        for info in caches
        for record in info.teachers.values()
    ]
    columns: Columns = {
        Column("Teacher", "name"): lambda row: word(row[1].name),
        Column("Cache", "text", setting=True): lambda row: word(row[0].name),
        Column("Architecture", "text", setting=True): lambda row: word(row[1].architecture),
        Column("Parameters, M"): lambda row: number(
            parameters_of(row[1].architecture, row[1].num_classes), 2, 1e6
        ),
        Column("Keeps", "text", setting=True): lambda row: word(", ".join(row[1].outputs)),
        Column("Size, MB"): lambda row: number(sum(state.bytes for state in row[2]), 1, 1e6),
        Column("Forward, s"): lambda row: number(sum(state.seconds for state in row[2])),
        Column("Complete, %"): lambda row: percent(_done(row[2])),
        Column("Id", "note"): lambda row: word(row[1].id[:12]),
    }
    return tabulate("teachers", rows, columns, "Teachers")


def _done(states: Sequence[PartState]) -> float | None:
    total = sum(state.total for state in states)
    return sum(state.done for state in states) / total if total else None


def cache_commands(caches: Sequence[CacheInfo]) -> list[Command]:
    """The command that made each cache, where its options are known."""
    return [
        Command(info.name, line, sum(state.seconds for state in info.states.values()))
        for info in caches
        if (line := line_of(CacheConfig, info.manifest.created.get("config", {}))) is not None
    ]
