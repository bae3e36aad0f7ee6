"""``kd compare``: what models know of each other, and what distilling one into another changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet, only_location
from kdcli.cache.shelf import Stage
from kdcli.comparing.answers import (
    EVAL_VIEW,
    Answers,
    Images,
    accuracy_of,
    cached_answers,
    cached_means,
    reads_of,
)
from kdcli.comparing.config import CompareConfig
from kdcli.comparing.forward import Opened, forward_answers, look_at
from kdcli.comparing.keeping import Kept
from kdcli.comparing.measuring import changes_of, pair_of, summaries
from kdcli.comparing.models import Candidate, Field, chosen, read_field
from kdcli.comparing.result import CompareResult, ModelFacts
from kdcli.comparing.similarity import ClassSimilarity, class_similarity, cosines_of
from kdcli.comparing.space import Classes, Space, one_space
from kdcli.console import console
from kdcli.data.sources import ImageData, open_told
from kdcli.errors import BadDataError, CacheMissingError, NotFoundError, UsageError
from kdcli.models.properties import family_of, parameters_of
from kdcli.options.resolving import created_by
from kdcli.runtime import stop_signals

Labelled = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], tuple[str, ...] | None, ImageData | None]
"""Rows in the caches, labels, class names, and the images where they are needed."""


def compare(config: CompareConfig) -> CompareResult:
    """Compare models on labelled images, and students with what they were before they were distilled.

    Args:
        config: models and images.

    Raises:
        UsageError: fewer than two models, or no images.
        NotFoundError: an unknown model, or a class-similarity file that is not there.
        BadDataError: unequal label spaces, no labels, or predictions that are not finite.
        CacheMissingError: images that a teacher has not seen; the hint fills the cache.
        StoppedEarly: a signal arrived while models were run.
    """
    kept = None if config.out is None else Kept(config.out)
    caches = (
        CacheSet.open(config.cache, config.verify, Stage.told(gigabytes=config.stage_limit))
        if config.cache
        else None
    )
    field = read_field(config, caches)
    wanted = _pairs(config, field.bases)
    if config.generalist is not None:
        chosen(tuple(field.candidates), (config.generalist,), "--generalist")
    opened = look_at([each for each in field.candidates.values() if each.record is None], config)
    labelled = _labelled(config, caches, field)
    space = one_space(labelled[2], {each.name: _classes(each, opened) for each in field.candidates.values()})
    from_file = (
        None
        if config.class_similarity is None
        else class_similarity(config.class_similarity, space.names[: len(space.labels)])
    )
    images = _images(labelled, space, caches)
    answers, sources = _answers(config, caches, field, opened, images, kept)
    models = _facts(field, opened, answers, sources, images)
    similarity = from_file or _substitute(config, caches, field, answers, models, images)
    pairs = tuple(pair_of(teacher, student, answers, images, similarity) for teacher, student in wanted)
    changes = changes_of(field.links, answers, images, config.equal_within)
    if not pairs and not changes:
        raise UsageError(
            "--teacher and --student leave no pair of two models",
            "Name other models, or leave one of them out.",
        )
    result = CompareResult(
        data=_about(config.test if config.test is not None else _location(caches), images),
        models=models,
        pairs=pairs,
        changes=changes,
        methods=summaries(changes, models, config.bins),
        similarity=None
        if similarity is None
        else {"source": similarity.source, "substitute": similarity.substitute},
        equal_within=config.equal_within,
        created=created_by(config),
    )
    if kept is not None:
        kept.write_result(result.document())
    return result


def _pairs(config: CompareConfig, bases: Sequence[str]) -> list[tuple[str, str]]:
    """Those of ``--pair``, else every ordered one; with a teacher of ``--teacher`` and a student of ``--student``."""
    teachers, students = (
        chosen(bases, given, option)
        for given, option in ((config.teacher, "--teacher"), (config.student, "--student"))
    )
    found = [_pair(word, bases) for word in config.pair] or permutations(bases, 2)
    return [(teacher, student) for teacher, student in found if teacher in teachers and student in students]


def _pair(word: str, bases: Sequence[str]) -> tuple[str, str]:
    teacher, _, student = word.partition(",")
    if teacher == student or not student:
        raise UsageError(f"--pair {word} is not TEACHER,STUDENT", "Name two models: --pair big,small")
    chosen(bases, (teacher, student), "--pair")
    return teacher, student


# --- images -----------------------------------------------------------------------------------


def _about(spec: str | None, images: Images) -> dict[str, Any]:
    """The images of the comparison, for its result."""
    return {
        "spec": spec,
        "images": len(images),
        "keys": images.keys,
        "classes": list(images.names[: images.present]),
        "class_sizes": np.bincount(images.labels, minlength=images.present).tolist(),
        "label_space": len(images.names),
    }


def _location(caches: CacheSet | None) -> str | None:
    """Where the images of a lone cache are; None without one, or when they are in several places."""
    if caches is None or len(caches.members) != 1:
        return None
    return only_location(caches.members[0].manifest)


def _labelled(config: CompareConfig, caches: CacheSet | None, field: Field) -> Labelled:
    """The labelled images that every cached teacher has seen, in the order of the data."""
    run = [name for name, each in field.candidates.items() if each.record is None]
    spec = config.test if config.test is not None else _location(caches) if run else None
    if run and spec is None:
        raise UsageError(
            f"'{run[0]}' has to be run over images, and none are named",
            "Name them: --test DATA" + ("" if caches is None else ", the images of the caches together."),
        )
    if spec is None:
        assert caches is not None  # a model that is not run is cached
        rows, labels, names = np.flatnonzero(caches.labels >= 0), caches.labels, caches.class_names
        if not len(rows):
            raise BadDataError(
                "the cache holds no labels to compare with", "Name the same images with labels: --test DATA"
            )
        found: Labelled = rows, labels[rows], names, None
    else:
        found = _named(config, spec, caches if len(run) < len(field.candidates) else None, bool(run))
    return found if caches is None else _usable(config, caches, field, found)


def _named(config: CompareConfig, spec: str, caches: CacheSet | None, run: bool) -> Labelled:
    data = open_told(spec, config)
    labelled = np.flatnonzero(data.labels >= 0)
    if not len(labelled):
        raise BadDataError(f"{spec} has no labels to compare with", "Name labelled data with --test.")
    if len(labelled) < len(data):
        console.note(f"{len(data) - len(labelled)} of {len(data)} images have no label: left out")
        data = data.select(labelled)
    # The bytes are compared where the images are read anyway.
    rows = np.zeros(0, np.int64) if caches is None else caches.rows_of(data, check_content=run)
    return rows, data.labels, data.class_names, data


def _usable(config: CompareConfig, caches: CacheSet, field: Field, found: Labelled) -> Labelled:
    """Without the images that were dropped as bad; those that a teacher has not seen yet are refused."""
    rows, labels, names, data = found
    reads = {
        each.record.name: reads_of(each) for each in field.candidates.values() if each.record is not None
    }
    if not reads:
        return found
    usable = np.flatnonzero(caches.require(reads, rows, [EVAL_VIEW], config.allow_partial))
    if not len(usable):
        raise CacheMissingError(
            f"none of the {len(rows)} labelled images has cached outputs of all of {', '.join(reads)}",
            "Run kd cache-teachers to its end, over the same images.",
        )
    if len(usable) == len(rows):
        return found
    return rows[usable], labels[usable], names, None if data is None else data.select(usable)


def _images(labelled: Labelled, space: Space, caches: CacheSet | None) -> Images:
    rows, labels, names, data = labelled
    labels = space.labels[labels]
    keys = data.keys if data is not None else caches.keys.select(rows) if caches is not None else None
    assert keys is not None
    own = False
    if caches is not None and len(rows) and caches.class_names is not None and names is not None:
        number = {name: index for index, name in enumerate(names)}
        table = np.asarray([*(number.get(name, -2) for name in caches.class_names), -1])
        own = names == caches.class_names or bool((table[caches.labels[rows]] == labelled[1]).all())
    return Images(
        keys=keys.digest(),
        labels=labels,
        names=space.names,
        present=len(space.labels),
        key_of=lambda place: keys[place],
        rows=rows,
        own_labels=own,
        data=data,
        columns=space.columns,
    )


# --- answers ----------------------------------------------------------------------------------


def _classes(candidate: Candidate, opened: Mapping[str, Opened]) -> Classes:
    if candidate.record is None:
        return opened[candidate.name].classes
    return Classes(candidate.record.class_names, candidate.record.num_classes)


def _answers(
    config: CompareConfig,
    caches: CacheSet | None,
    field: Field,
    opened: Mapping[str, Opened],
    images: Images,
    kept: Kept | None,
) -> tuple[dict[str, Answers], dict[str, str]]:
    """The predictions of every model, and where they are from: cache, kept predictions, or a forward."""
    records = {name: each.record.id for name, each in field.candidates.items() if each.record is not None}
    found = {}
    for name in records:
        assert caches is not None
        found[name] = cached_answers(caches, field.candidates[name], images)
    sources = dict.fromkeys(found, "cache")
    ids = {name: each.id for name, each in opened.items()}
    if kept is not None:
        earlier = kept.find(images, ids)
        found |= earlier
        sources |= dict.fromkeys(earlier, "kept")
    left = [each for name, each in field.candidates.items() if name not in found]
    with stop_signals() as stop:
        forward = forward_answers(
            left, {name: each.amp for name, each in opened.items()}, images, config, stop
        )
    found |= forward
    sources |= dict.fromkeys(forward, "forward")
    if kept is not None:
        kept.write(images, {name: found[name] for name in field.candidates}, ids | records)
    return found, sources


def _facts(
    field: Field,
    opened: Mapping[str, Opened],
    answers: Mapping[str, Answers],
    sources: Mapping[str, str],
    images: Images,
) -> dict[str, ModelFacts]:
    bases, found = set(field.bases), {}
    for name, candidate in field.candidates.items():
        record = candidate.record
        architecture = opened[name].architecture if record is None else record.architecture
        found[name] = ModelFacts(
            name=name,
            spec=candidate.spec,
            source=sources[name],
            architecture=architecture,
            family=family_of(architecture),
            parameters=opened[name].parameters
            if record is None
            else parameters_of(architecture, record.num_classes),
            accuracy=accuracy_of(answers[name], images.labels),
            base=name in bases,
            amp=opened[name].amp if record is None else record.amp,
        )
    return found


def _substitute(
    config: CompareConfig,
    caches: CacheSet | None,
    field: Field,
    answers: Mapping[str, Answers],
    models: Mapping[str, ModelFacts],
    images: Images,
) -> ClassSimilarity | None:
    """Cosines of the class means of the generalist: the one that is named, else the most accurate with features."""
    best = sorted(field.bases, key=lambda name: -models[name].accuracy)
    for name in (config.generalist,) if config.generalist is not None else best:
        means, record = answers[name].class_means, field.candidates[name].record
        if record is not None and record.output_of("features") is not None:
            assert caches is not None
            usable = caches.require(
                {record.name: ["features"]}, images.rows, [EVAL_VIEW], config.allow_partial
            )
            means = cached_means(caches, field.candidates[name], _seen(images, usable))
        if means is not None:
            return cosines_of(means[: images.present], name)
    if config.generalist is not None:
        raise NotFoundError(
            f"--generalist {config.generalist} has no features to take class means of",
            "Cache it with --keep logits,features, name another model, or give --class-similarity FILE.",
        )
    console.note(
        "no model has features, so no similarity of classes is given; --class-similarity FILE gives it"
    )
    return None


def _seen(images: Images, usable: np.ndarray) -> Images:
    """The images of which the cache holds features."""
    places = np.flatnonzero(usable)
    return replace(images, rows=images.rows[places], labels=images.labels[places])
