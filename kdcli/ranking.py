"""Which cached teachers should teach this task, and with what weight (P2 §4)."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, final

import numpy as np
from jaxtyping import Float, Float64, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli.cache.cacheset import CacheSet
from kdcli.config import RankConfig
from kdcli.console import console
from kdcli.data.sources import ImageData, open_data
from kdcli.errors import BadDataError, CacheMissingError, KdError, NotFoundError, UsageError
from kdcli.metrics.checks import check_classes, check_finite
from kdcli.metrics.cka import label_cka
from kdcli.metrics.parc import parc
from kdcli.types import OutputKind, RankedSource, Ranking

METRICS: Final[Mapping[str, Callable[..., float]]] = {"parc": parc, "cka": label_cka}
"""Similarity of a representation [n d] and labels [n], higher is better."""

EVAL_VIEW = 0
_HASHED_AT_ONCE = 8192


def rank_sources(config: RankConfig) -> Ranking:
    """Score the cached teachers on a labelled probe set, without a forward pass.

    Args:
        config: which caches, teachers, metric and probe set.

    Returns:
        The sources, best first (ties by name), with the weights of P2 Eq. 5.

    Raises:
        CacheMissingError: no cache, rows not cached yet, or the representation was not kept.
        NotFoundError: a teacher named is not in the cache.
        BadDataError: no labels, too few images, or a score that would be undefined.
    """
    caches = CacheSet.open(config.cache, config.verify)
    names = _chosen_teachers(caches, config)
    array = _required_array(caches, names, config)
    images = _labelled_images(caches, config)
    reads = {name: [array] for name in names}
    usable = np.flatnonzero(caches.require(reads, images.rows, [EVAL_VIEW], config.allow_partial))
    if not len(usable):
        raise CacheMissingError(
            f"none of the {len(images.rows)} labelled images has cached outputs",
            "Run kd cache-teachers to its end.",
        )
    usable = usable[_key_order(caches, images.rows[usable])]
    probe = usable[select_probe(images.labels[usable], config.probe_size, config.seed, images.class_names)]
    rows, labels = images.rows[probe], images.labels[probe]
    if images.data is not None:
        rows = caches.rows_of(images.data.select(probe))  # compares the bytes, of the images that are used
        caches.require(reads, rows, [EVAL_VIEW], config.allow_partial)

    def image(row: int) -> str:
        return f"image '{caches.keys[int(rows[row])]}'"

    scores: dict[str, float] = {}
    for name in names:
        stored = caches.gather(name, array, rows, EVAL_VIEW)
        try:
            check_finite(stored, image)
            features = softmax(stored) if config.on == "pseudo" else stored
            scores[name] = METRICS[config.metric](features, labels, row_name=image)
        except BadDataError as error:
            raise BadDataError(f"source '{name}': {error.message}", error.hint) from error
    return _ranking(caches, config, scores, len(probe))


def _ranking(caches: CacheSet, config: RankConfig, scores: Mapping[str, float], probe_size: int) -> Ranking:
    weights = source_weights(np.array(list(scores.values())), config.power, tuple(scores))
    if config.power > 0 and max(scores.values()) <= 0:
        console.warn("no source has a positive score: all weight goes to the best one")
    sources = [
        RankedSource(name, caches.teachers[name].id, score, float(weight))
        for (name, score), weight in zip(scores.items(), weights, strict=True)
    ]
    return Ranking(
        cache_id="+".join(caches.cache_ids),
        metric=config.metric,
        on=config.on,
        probe={"size": probe_size, "seed": config.seed},
        sources=tuple(sorted(sources, key=lambda source: (-source.score, source.name))),
    )


# --- what is ranked on what -------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class _LabelledImages:
    """Images with a label: their rows in the cache, and where they come from when ``--data`` names them."""

    rows: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...] | None
    data: ImageData | None


def _chosen_teachers(caches: CacheSet, config: RankConfig) -> list[str]:
    for name in (*config.teacher, *config.exclude):
        caches.teacher(name)  # refuses a name that no cache has, with the nearest one
    names = sorted(set(config.teacher or caches.teachers) - set(config.exclude))
    if not names:
        raise NotFoundError("no teacher is left to rank", "Cache teachers first, or give fewer --exclude.")
    return names


def _required_array(caches: CacheSet, names: Sequence[str], config: RankConfig) -> OutputKind:
    array: OutputKind = "logits" if config.on == "pseudo" else "features"
    caches.require_kept({name: [array] for name in names})
    return array


def _labelled_images(caches: CacheSet, config: RankConfig) -> _LabelledImages:
    """All labelled images of the cache, or those of ``--data`` with the labels they have there."""
    if config.data is None:
        rows = np.flatnonzero(caches.labels >= 0)
        if not len(rows):
            raise BadDataError(
                "the cache holds no labels to rank against",
                "Name the same images with labels: kd rank-sources --data DATA.",
            )
        return _LabelledImages(rows, *_by_name(caches.labels[rows], caches.class_names), None)
    data = open_data(config.data, data_root=config.data_root)
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise BadDataError(f"{config.data} has no labels to rank against", "Name labelled data with --data.")
    data = data.select(labelled)
    rows = caches.rows_of(data, check_content=False)
    return _LabelledImages(rows, *_by_name(data.labels, data.class_names), data)


def _by_name(
    labels: Int64[np.ndarray, " n"], class_names: tuple[str, ...] | None
) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...] | None]:
    """Number classes by their names: in which order caches are given must not change a ranking either."""
    if class_names is None:
        return labels, None
    order = sorted(range(len(class_names)), key=class_names.__getitem__)  # two classes may share a name
    return np.argsort(order)[labels], tuple(class_names[label] for label in order)


def _key_order(caches: CacheSet, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Order by (a hash of) the keys: in which order images were cached must not change a ranking.

    Hashes take 8 bytes a row and are made in parts: a million keys at once would not stay within the
    memory goal.
    """
    hashes = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _HASHED_AT_ONCE):
        part = slice(start, start + _HASHED_AT_ONCE)
        hashes[part] = caches.keys.select(rows[part]).hashes()
    return np.argsort(hashes, kind="stable")


def softmax(logits: Float[np.ndarray, "n c"]) -> Float64[np.ndarray, "n c"]:
    """Pseudo-labels of a source: its class probabilities at temperature 1, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


# --- probe set --------------------------------------------------------------------------------


def select_probe(
    labels: Int64[np.ndarray, " n"], size: int, seed: int, class_names: Sequence[str] | None = None
) -> Int64[np.ndarray, " m"]:
    """Draw a class-balanced probe set: one image of each class per round until ``size`` is reached.

    A class that runs out is skipped and the rounds go on. Where two images of each class do not fit,
    a random subset of ``size // 2`` classes is used (after Bolya et al. 2021). For one seed a larger
    probe set contains a smaller one as long as both hold all classes.

    Args:
        labels: class index, -1 for images without a label (never drawn).
        size: images wanted; with at least as many as are labelled, all of them are used.
        seed: of classes and images, by a counter-based generator: the same on every machine.
        class_names: names of the classes, for errors.

    Returns:
        Positions in ``labels``, ascending; at least two of each class drawn.

    Raises:
        BadDataError: no labels, one class only, or a class with a single image.
        UsageError: ``size`` does not fit two classes.
    """
    labelled = np.flatnonzero(labels >= 0)
    check_classes(labels[labelled], class_names)
    if size >= len(labelled):
        return labelled
    if size < 4:
        raise UsageError(
            f"--probe-size {size} is too small: two images of two classes are the least",
            "Give --probe-size 4 or more.",
        )
    members = _by_class(labels, labelled)
    rng = np.random.Generator(np.random.Philox(seed))
    kept = rng.permutation(len(members))
    if 2 * len(members) > size:
        kept = kept[: size // 2]
    shares = _round_robin(np.array([len(members[c]) for c in kept]), size)
    drawn = [rng.permutation(members[c])[:share] for c, share in zip(kept, shares, strict=True)]
    return np.sort(np.concatenate(drawn))


def _by_class(
    labels: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " m"]
) -> list[Int64[np.ndarray, " _"]]:
    order = rows[np.argsort(labels[rows], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _round_robin(available: Int64[np.ndarray, " c"], size: int) -> Int64[np.ndarray, " c"]:
    """How many of each class, in rounds over the classes; rounds without a class running out go at once."""
    taken = np.zeros_like(available)
    left = min(size, int(available.sum()))
    while left:
        open_classes = np.flatnonzero(taken < available)
        rounds = min(left // len(open_classes), int((available - taken)[open_classes].min()))
        chosen = open_classes if rounds else open_classes[:left]
        taken[chosen] += max(rounds, 1)
        left -= len(chosen) * max(rounds, 1)
    return taken


# --- weights ----------------------------------------------------------------------------------


def source_weights(
    scores: Float64[np.ndarray, " s"], power: float, names: Sequence[str] = ()
) -> Float64[np.ndarray, " s"]:
    """Weights of the sources: alpha_i = e_i^p / sum_s e_s^p with e_j = max(0, e_j) (P2 Eq. 5).

    Scores are clipped before the power; p = 0 gives 1/S to all, also where a score is not positive
    (0^0 = 1: DistillEqual); p = inf gives all to the best (DistillNearest). Where no score is
    positive Eq. 5 is 0/0: all weight goes to the best source. Equally good sources share.

    Args:
        scores: one per source; their scale does not matter.
        power: p >= 0.
        names: of the sources, for errors.

    Returns:
        Weights >= 0 that sum to 1.

    Raises:
        BadDataError: a score is NaN or inf; names the source.
    """
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        name = names[wrong[0]] if names else f"number {wrong[0]}"
        raise BadDataError(
            f"the score of source '{name}' is {scores[wrong[0]]}", f"Leave it out with --exclude {name}."
        )
    best = float(scores.max())
    if power == 0:
        weights = np.ones(len(scores))
    elif best <= 0 or math.isinf(power):
        weights = (scores == best).astype(np.float64)
    else:
        weights = np.power(np.maximum(scores, 0) / best, power)  # at most 1: no overflow however large p is
    return weights / math.fsum(weights)


# --- the ranking as JSON ----------------------------------------------------------------------


def ranking_document(ranking: Ranking) -> dict[str, Any]:
    """What ``kd rank-sources --json`` prints."""
    return {
        "cache_id": ranking.cache_id,
        "metric": ranking.metric,
        "on": ranking.on,
        "probe": dict(ranking.probe),
        "sources": [
            {"name": source.name, "id": source.id, "score": source.score, "weight": source.weight}
            for source in ranking.sources
        ],
    }


@final
class _SourceDocument(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    name: str
    id: str | None
    score: float
    weight: float = Field(ge=0)


@final
class _RankingDocument(BaseModel):
    cache_id: str | None
    metric: str
    on: str
    probe: dict[str, Any]
    sources: tuple[_SourceDocument, ...] = Field(min_length=1)


@final
class _ErrorFields(BaseModel):
    code: int = Field(ge=1, le=255)
    message: str
    hint: str = ""


@final
class _ErrorDocument(BaseModel):
    error: _ErrorFields


_RERUN = "Give what 'kd rank-sources --json' prints, as a file or through a pipe with --ranking -."


def parse_ranking(text: str) -> Ranking:
    """Read a ranking; an error document of the command before in the pipe is raised again as it was.

    Args:
        text: one JSON document.

    Raises:
        BadDataError: empty, not JSON, or no ranking; the message says which and where.
        KdError: the document is ``{"error": ...}``; ``exit_code`` is the code in it.
    """
    if not text.strip():
        raise BadDataError("the ranking is empty", _RERUN)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BadDataError(f"the ranking is not JSON: {error}", _RERUN) from error
    try:
        if isinstance(document, dict) and "error" in document:
            _raise_again(_ErrorDocument.model_validate(document).error)
        fields = _RankingDocument.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise BadDataError(f"the JSON is not a ranking: {place}: {first['msg']}", _RERUN) from error
    _check_sources(fields.sources)
    sources = tuple(RankedSource(s.name, s.id, s.score, s.weight) for s in fields.sources)
    return Ranking(fields.cache_id, fields.metric, fields.on, fields.probe, sources)


def _check_sources(sources: Sequence[_SourceDocument]) -> None:
    total = math.fsum(source.weight for source in sources)
    if abs(total - 1) > 1e-6:
        raise BadDataError(f"the weights of the ranking sum to {total:g}, not 1", _RERUN)
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadDataError(f"the ranking names source '{twice}' twice", _RERUN)


def _raise_again(error: _ErrorFields) -> NoReturn:
    kinds = {kind.exit_code: kind for kind in KdError.__subclasses__()}
    again = kinds.get(error.code, KdError)(error.message, error.hint)
    vars(again)["exit_code"] = error.code  # no class has the codes of bugs and signals
    raise again
