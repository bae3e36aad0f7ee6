"""Rankings and caches of a report: how sources were ranked, and what is kept."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdcli.cache.admin.inventory import CacheInfo, inspect_cache
from kdcli.console import size
from kdcli.extract.config import CacheConfig
from kdcli.models.properties import parameters_of
from kdcli.options.resolving import command_line
from kdcli.reporting import charts
from kdcli.reporting.document import (
    Cell,
    Chart,
    Column,
    Command,
    Notes,
    Part,
    Section,
    Table,
    number,
    percent,
    word,
)
from kdcli.reporting.material import Ranked, Run
from kdcli.reporting.students import top1_of

MOST_RANKINGS = 6
"""Rankings that are drawn; all are in the table."""

# --- rankings ---------------------------------------------------------------------------------


def ranking_section(rankings: Sequence[Ranked]) -> Section | None:
    """Scores and weights."""
    if not rankings:
        return None
    names = _names([ranked.path for ranked in rankings])
    columns = (
        Column("Source", "name"),
        Column("Ranking", "text", setting=True),
        Column("Metric", "text", setting=True),
        Column("On", "text", setting=True),
        Column("Score"),
        Column("Weight"),
        Column("Scheme", "text", setting=True),
    )
    rows = tuple(
        (
            Cell(source.name, source.name),
            word(name),
            word(ranked.ranking.metric),
            word(ranked.ranking.on),
            number(source.score, 4),
            number(source.weight, 4),
            word(str(ranked.ranking.weighting.get("scheme", "")) or None),
        )
        for name, ranked in zip(names, rankings, strict=True)
        for source in ranked.ranking.sources
    )
    distinct = {
        _scores_of(ranked): (name, ranked)
        for name, ranked in reversed(list(zip(names, rankings, strict=True)))
    }
    shown = list(reversed(distinct.values()))[:MOST_RANKINGS]
    several = len(rankings) > 1
    parts: list[Part] = [
        charts.ranking_bars(ranked.ranking, f"ranking-{place}", name if several else "")
        for place, (name, ranked) in enumerate(shown, 1)
    ]
    if several:
        parts.append(Notes((f"{len(rankings)} rankings, {len(distinct)} of them with different scores; "
                            f"{len(shown)} are drawn.",)))  # fmt: skip
    return Section("Ranking", (*parts, Table("rankings", columns, rows).trimmed()))


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
            title = name if len(rankings) > 1 else ""
            parts.append(Chart(chart.name, chart.label, chart.draw, chart.caption, chart.legend, title))
    return Section("Score against accuracy", tuple(parts)) if parts else None


def _single_accuracies(ranked: Ranked, runs: Sequence[Run]) -> dict[str, float]:
    """Mean accuracy of the students of each single source: of this report's runs, else of the evidence."""
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
    if not found and len(targets) == 1:
        return dict(next(iter(targets.values())).get("accuracy") or {})
    return {name: sum(values) / len(values) for name, values in found.items()}


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
    columns = (
        Column("Cache", "name"),
        Column("Data", "text"),
        Column("Images"),
        Column("Views", setting=True),
        Column("Teachers"),
        Column("Complete, %"),
        Column("Size, MB"),
        Column("Storage", "text", setting=True),
        Column("Dropped images"),
    )
    rows = tuple(
        (
            Cell(str(info.path), info.path.name),
            word(" ++ ".join(segment.spec for segment in info.manifest.segments)),
            number(info.manifest.samples, 0),
            number(info.manifest.views, 0),
            number(len(info.teachers), 0),
            percent(info.done / info.total if info.total else None),
            number(info.bytes, 1, 1e6),
            word(info.manifest.backend),
            number(len(info.dropped) or None, 0),
        )
        for info in caches
    )
    kept = (
        Column("Teacher", "name"),
        Column("Cache", "text", setting=True),
        Column("Architecture", "text", setting=True),
        Column("Parameters, M"),
        Column("Keeps", "text", setting=True),
        Column("Size, MB"),
        Column("Forward, s"),
        Column("Complete, %"),
        Column("Id", "note"),
    )
    teachers = tuple(_teacher_row(info, name) for info in caches for name in info.teachers)
    total = size(sum(info.bytes for info in caches))
    lines = Notes((f"{len(caches)} {'cache' if len(caches) == 1 else 'caches'} of {total}.",))
    return Section(
        "Caches",
        (
            Table("caches", columns, rows).trimmed(),
            lines,
            Table("teachers", kept, teachers, "Teachers").trimmed(),
        ),
    )


def _teacher_row(info: CacheInfo, name: str) -> tuple[Cell, ...]:
    record = info.teachers[name]
    states = [info.states[f"{name}/{kind}"] for kind in record.outputs]
    done, total = sum(state.done for state in states), sum(state.total for state in states)
    return (
        Cell(name, name),
        word(info.path.name),
        word(record.architecture),
        number(parameters_of(record.architecture, record.num_classes), 2, 1e6),
        word(", ".join(record.outputs)),
        number(sum(state.bytes for state in states), 1, 1e6),
        number(sum(state.seconds for state in states)),
        percent(done / total if total else None),
        word(record.id[:12]),
    )


def cache_commands(caches: Sequence[CacheInfo]) -> list[Command]:
    """The command that made each cache, where its options are those of this version."""
    commands = []
    for info in caches:
        try:
            config = CacheConfig.model_validate(info.manifest.created.get("config", {}))
        except ValidationError:
            continue
        seconds = sum(state.seconds for state in info.states.values())
        commands.append(Command(info.path.name, command_line(config), seconds))
    return commands
