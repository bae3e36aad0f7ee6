"""The step: which sources should teach this task, and with what weight (P2 §4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from jaxtyping import Float64, Int64

from kdcli.cache.fingerprints import pack
from kdcli.console import console
from kdcli.errors import BadDataError, UsageError
from kdcli.metrics.targets import Targets
from kdcli.ranking.alone import open_files
from kdcli.ranking.cached import open_cached
from kdcli.ranking.columns import Column, chosen_column, columns_of, score
from kdcli.ranking.config import RankConfig
from kdcli.ranking.documents import ranking_document
from kdcli.ranking.material import Material
from kdcli.ranking.probe import select_probe
from kdcli.ranking.weights import scheme_weights, weighting_document
from kdcli.types import RankedSource, Ranking

Table = Mapping[str, Mapping[str, float | None]]
"""Score of each source by column (``metric/representation``); None where the metric is undefined."""


@final
@dataclass(frozen=True, slots=True)
class RankResult:
    """A ranking and what it was chosen from.

    Attributes:
        ranking: by the chosen metric.
        table: mean score over the probe seeds, of every column asked for.
        std: standard deviation over the probe seeds (n - 1); empty for a single one.
        seeds: of the probe sets.
        data: what ``--data`` named, as results of students have it.
        whole: whether all columns were asked for, so that the document shows them.
        settings: what decides the scores of each metric, where the document says it.
    """

    ranking: Ranking
    table: Table
    std: Table
    seeds: tuple[int, ...]
    data: str | None = None
    whole: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The ranking's document, and more fields where more was asked for."""
        document = ranking_document(self.ranking)
        if self.data is not None:
            document["data"] = self.data
        if self.whole:
            document["table"] = {column: dict(scores) for column, scores in self.table.items()}
        if self.settings:
            document["settings"] = dict(self.settings)
        if self.std:
            std = {column: dict(values) for column, values in self.std.items()}
            document["repeats"] = {"seeds": list(self.seeds), "std": std}
        return document


def rank_sources(config: RankConfig) -> Ranking:
    """Score sources on a labelled probe set, without a forward pass; see :func:`rank`.

    Returns:
        The sources, best first (ties by name), with the weights of P2 Eq. 5 or of ``--scheme``.
    """
    return rank(config).ranking


def rank(config: RankConfig) -> RankResult:
    """Score sources on labelled probe sets by one metric or by all, reading each source once.

    Args:
        config: which caches or files, sources, metric, probe set and weights.

    Raises:
        UsageError: options that do not go together.
        CacheMissingError: no cache, rows not cached yet, or the representation was not kept.
        NotFoundError: a source named is not there.
        BadDataError: no labels, too few images, or a score that would be undefined.
    """
    _require_input(config)
    own = chosen_column(config)
    columns = columns_of(config, own)
    told = columns if config.metric == "all" or config.logme_steps else []
    settings = {column.metric.name: column.metric.settings for column in told}
    if config.features is not None:
        material: Material = open_files(config, own.array)
    else:
        material = open_cached(config, own.array, tuple(column.array for column in columns))
    columns = _possible(columns, material)
    probes = _probes(material, config)
    scores = _scores(material, columns, own, probes)
    table = {column: {name: _mean(values) for name, values in row.items()} for column, row in scores.items()}
    std = {column: {name: _std(values) for name, values in row.items()} for column, row in scores.items()}
    seeds = tuple(range(config.seed, config.seed + config.repeats))
    ranking = _ranking(material, config, own, scores[own.label], probes)
    std = std if config.repeats > 1 else {}
    return RankResult(ranking, table, std, seeds, material.location, config.metric == "all", settings)


def _require_input(config: RankConfig) -> None:
    if config.features is None and config.labels is not None:
        raise UsageError("--labels goes with --features", "Give --features DIR, a folder of .npy files.")
    if config.features is not None:
        if config.labels is None:
            raise UsageError("--features needs --labels", "Give --labels FILE.npy: one label per row.")
        if config.cache or config.data is not None:
            raise UsageError(
                "--features stands alone, without --cache and --data", "Rank either files or cached teachers."
            )
    elif not config.cache:
        raise UsageError(
            "--cache is missing",
            "Give --cache PATH; or --features DIR and --labels FILE; or --ranking FILE and --against RESULTS.",
        )


def _possible(columns: Sequence[Column], material: Material) -> list[Column]:
    possible = [column for column in columns if column.array in material.kept]
    missing = dict.fromkeys(column.array for column in columns if column not in possible)
    for array in missing:
        console.warn(f"not all sources keep {array}: the columns that need them are left out")
    return possible


def _probes(material: Material, config: RankConfig) -> list[Int64[np.ndarray, " m"]]:
    seeds = range(config.seed, config.seed + config.repeats)
    probes = [select_probe(material.labels, config.probe_size, seed, material.class_names) for seed in seeds]
    if len(probes) > 1 and len(probes[0]) == len(material.labels):
        console.warn("the probe set holds all labelled images, so every repeat is the same")
    return probes


def _scores(
    material: Material, columns: Sequence[Column], own: Column, probes: Sequence[Int64[np.ndarray, " m"]]
) -> dict[str, dict[str, list[float] | None]]:
    """Column -> source -> its score on each probe set; outputs of a source are gathered once."""
    union = np.unique(np.concatenate(probes))
    chosen = material.select(union)
    drawn = [tuple(np.searchsorted(union, probe)) for probe in probes]
    tasks = {rows: _targets(chosen, np.array(rows)) for rows in drawn}  # equal ones are scored once
    scores: dict[str, dict[str, list[float] | None]] = {column.label: {} for column in columns}
    with console.progress(len(chosen.names), "sources", "ranking") as bar:
        for name in chosen.names:
            arrays = dict.fromkeys(column.array for column in columns)
            stored = {array: chosen.gather(name, array) for array in arrays}
            for column in columns:
                values = stored[column.array]
                try:
                    found = {rows: score(column, values[np.array(rows)], tasks[rows]) for rows in tasks}
                    scores[column.label][name] = [found[rows] for rows in drawn]
                except BadDataError as error:
                    if column == own:
                        raise BadDataError(f"source '{name}': {error.message}", error.hint) from error
                    console.warn(f"{column.label} of source '{name}' is left empty: {error.message}")
                    scores[column.label][name] = None
            bar.advance(1)
    return scores


def _targets(images: Material, rows: Int64[np.ndarray, " m"]) -> Targets:
    return Targets.of(images.labels[rows], lambda row: images.image(int(rows[row])))


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _std(values: Sequence[float] | None) -> float | None:
    return None if values is None or len(values) < 2 else float(np.std(values, ddof=1))


def _ranking(
    material: Material,
    config: RankConfig,
    own: Column,
    scores: Mapping[str, Sequence[float] | None],
    probes: Sequence[Int64[np.ndarray, " m"]],
) -> Ranking:
    names = tuple(scores)
    means = np.array([np.mean(scores[name] or [np.nan]) for name in names])
    weights = scheme_weights(
        means, names, config.scheme, power=config.power, sources=config.sources, seed=config.seed
    )
    _warn_of_fallbacks(means[weights > 0], config)
    sources = [
        RankedSource(name, material.id_of(name), float(mean), float(weight))
        for name, mean, weight in zip(names, means, weights, strict=True)
    ]
    return Ranking(
        cache_id=material.cache_id,
        metric=own.metric.name,
        on=own.on,
        probe=_probe_document(material, config, probes),
        sources=tuple(sorted(sources, key=lambda source: (-source.score, source.name))),
        weighting=weighting_document(config.scheme, config.power, config.sources, config.seed),
    )


def _probe_document(
    material: Material, config: RankConfig, probes: Sequence[Int64[np.ndarray, " m"]]
) -> dict[str, Any]:
    """What makes the scores anew, and which images all probe sets together are, if that can be told."""
    images = material.fingerprints(np.unique(np.concatenate(probes)))
    known = {} if images is None else {"images": pack(images)}
    asked = {"repeats": config.repeats if config.repeats > 1 else None, "logme_steps": config.logme_steps}
    told = {name: value for name, value in asked.items() if value is not None}
    return {"size": len(probes[0]), "seed": config.seed, **told, **known}


def _warn_of_fallbacks(scores: Float64[np.ndarray, " s"], config: RankConfig) -> None:
    """Where the formula of the weights has no value; ``scores`` are those of sources that got weight."""
    if config.scheme == "weighted" and config.power > 0 and scores.max() <= 0:
        console.warn("no source has a positive score: all weight goes to the best one")
    if config.scheme == "inverse" and scores.min() <= 0:
        console.warn("inverse weights of scores <= 0 have no finite value: those sources share all weight")
