"""The stages of a sequence, decided but not begun: one teacher each, in which order, with which plan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from kdcli.cache.matching import find_places, same_content
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.shelf import Stage
from kdcli.console import console
from kdcli.data.sources import ImageData
from kdcli.errors import UsageError
from kdcli.methods.base import find_method
from kdcli.options.fields import absolute
from kdcli.training.classes import Classes
from kdcli.training.config import StudentConfig
from kdcli.training.gains import cached_predictions, predicting_array
from kdcli.training.plan import Pins, Plan
from kdcli.training.resolve import make_plan
from kdcli.training.rundir import read_pins
from kdcli.training.sources import Sources
from kdcli.training.teachers import require_within_labels
from kdcli.types import Ranking

_LOOKED_AT = 64
"""Images whose bytes tell whether a cache is of the training images."""


@final
@dataclass(frozen=True, slots=True)
class Stages:
    """The stages, decided but not begun.

    Attributes:
        config: of the whole.
        ranking: that was given.
        training: of the caches, those that hold images to train on.
        plans: of the stages by teacher, in their order, each as if it were the first.
        by: what ``scores`` are; empty where none were needed.
        scores: that gave the order.
    """

    config: StudentConfig
    ranking: Ranking | None
    training: tuple[Path | str, ...]
    plans: Mapping[str, Plan]
    by: str
    scores: Mapping[str, float]

    @property
    def first(self) -> Plan:
        """Plan of the first stage."""
        return next(iter(self.plans.values()))

    @property
    def records(self) -> dict[str, TeacherRecord]:
        """The teachers, in their order."""
        return {name: plan.teachers.records[name] for name, plan in self.plans.items() if plan.teachers}

    @property
    def weights(self) -> dict[str, float]:
        """Of each teacher in its own stage."""
        return {name: plan.teachers.weights[name] for name, plan in self.plans.items() if plan.teachers}

    def order(self) -> dict[str, Any]:
        """What a run records of the order."""
        return {"order": self.config.sequential, "teachers": list(self.plans)}

    def identity(self) -> dict[str, Any]:
        """What makes this sequence this sequence: that of its first stage, with all teachers in their order."""
        return {
            **self.first.identity(),
            "teachers": {name: record.id for name, record in self.records.items()},
            "weights": self.weights,
            "sequential": self.order(),
        }

    def whole(self) -> Plan:
        """The first stage's plan with the configuration and ranking of the sequence."""
        changes = {
            "out": self.config.out.absolute(),
            "cache": tuple(map(absolute, self.config.cache)),
            **{name: getattr(self.config, name) for name in ("sequential", "overwrite", "stage", "ranking")},
            "teacher": tuple(self.plans),
        }
        return replace(self.first, config=self.first.config.model_copy(update=changes), ranking=self.ranking)


def arrange(config: StudentConfig, ranking: Ranking | None, processes: int, sources: Sources) -> Stages:
    """The teachers in their order, with the plan of each one's stage."""
    disk = Stage.told(config.stage, config.stage_limit)
    data = sources.data(config.first_data, data_root=config.data_root, download=config.download, stage=disk)
    training = _with_training_images(config, data, sources)
    if ranking is not None:
        require_within_labels(ranking, sources.cache(training, config), data, config)
    pins = Pins() if config.overwrite else read_pins(config.out)
    plans = {}
    with _quietly():  # each stage says it again, when it is trained
        for name in _names(config, ranking, training, pins, sources):
            place = config.out.absolute() / "stage"
            stage = stage_config(config, training, name, place, config.init).model_copy(
                update={"stage": None}
            )
            plans[name] = make_plan(stage, ranking_of(ranking, config, name), pins, processes, sources)
            _require_alone(name, plans[name])
    by, scores = _scores(config, ranking, plans)
    names = _ordered(config, list(plans), scores)
    return Stages(config, ranking, training, {name: plans[name] for name in names}, by, scores)


def _require_alone(name: str, plan: Plan) -> None:
    used = plan.teachers.weights if plan.teachers is not None else {}
    if set(used) != {name}:
        raise UsageError(
            f"--sequential gives each stage one teacher, but {plan.method.name} reads {', '.join(used) or 'none'}",
            "Choose a method that learns from the teachers named by --teacher; kd methods lists them.",
        )


def _with_training_images(config: StudentConfig, data: ImageData, sources: Sources) -> tuple[Path | str, ...]:
    """The caches to train from. One that holds none of the images is there for the test data only."""
    if len(config.cache) < 2:
        return config.cache
    found = tuple(
        path for path in config.cache if _holds_some(sources.cache((path,), config).members[0], data)
    )
    return found or config.cache


def _holds_some(member: CacheReader, data: ImageData) -> bool:
    """Whether a cache holds images of a data set, judged by the bytes of some: two folders may name theirs alike."""
    rows = find_places(member, data, np.arange(len(data)))
    places = np.flatnonzero(rows >= 0)
    places = places[same_content(member, rows[places], places, data.sizes(), None, {})]
    looked_at = places[np.linspace(0, len(places) - 1, min(len(places), _LOOKED_AT)).astype(np.int64)]
    return bool(same_content(member, rows[looked_at], looked_at, data.sizes(), data, {}).any())


def _names(
    config: StudentConfig,
    ranking: Ranking | None,
    training: tuple[Path | str, ...],
    pins: Pins,
    sources: Sources,
) -> tuple[str, ...]:
    if config.sequential == "given" and not config.teacher:
        raise UsageError(
            "--sequential given takes the order of --teacher, and none is given",
            "Add --teacher NAME --teacher NAME, or choose ascending, descending or random.",
        )
    ranked = () if ranking is None else tuple(source.name for source in ranking.sources)
    unranked = [name for name in config.teacher if ranking is not None and name not in ranked]
    if unranked:
        raise UsageError(
            f"--ranking has no source '{unranked[0]}'", f"Its sources are {', '.join(ranked) or 'none'}."
        )
    names = tuple(dict.fromkeys(config.teacher)) or ranked or pins.teachers
    if not names and training:
        names = tuple(sources.cache(training, config).teachers)
    if len(names) < 2:
        raise UsageError(
            f"--sequential needs two teachers or more, and there is {'one' if names else 'none'}",
            "Cache more teachers (kd cache-teachers), or leave --sequential out.",
        )
    return names


def _scores(
    config: StudentConfig, ranking: Ranking | None, plans: Mapping[str, Plan]
) -> tuple[str, dict[str, float]]:
    """What the teachers are ordered by, and how it is called; nothing where the order needs none."""
    if config.sequential in ("random", "given"):
        return "", {}
    if ranking is not None:
        return f"{ranking.metric} of --ranking", {
            source.name: source.score for source in ranking.sources if source.name in plans
        }
    return "accuracy on the training labels", {name: _accuracy(name, plan) for name, plan in plans.items()}


def _accuracy(name: str, plan: Plan) -> float:
    """Top-1 of a teacher's cached logits, view 0, on the labelled images that the student trains on."""
    assert plan.recording is not None  # every method with teachers has one
    assert plan.teachers is not None
    hint = "Order them yourself (--sequential given --teacher ...), or by --ranking."
    labelled = np.flatnonzero(plan.data.labels >= 0)
    if not len(labelled):
        raise UsageError("no image is labelled, so the teachers' accuracy is not known", hint)
    cache, rows, labels = plan.recording.cache, plan.recording.rows[labelled], plan.data.labels[labelled]
    teacher = plan.teachers.records[name]
    usable = cache.require({name: (predicting_array(teacher),)}, rows, [0], plan.config.allow_partial)
    classes = Classes(plan.data.class_names, plan.classes.count)
    predicted = cached_predictions(cache, teacher, rows[usable], classes)
    if predicted is None or not usable.any():
        raise UsageError(
            f"teacher '{name}' does not know the classes of the data, so its accuracy is not known", hint
        )
    return float((predicted == labels[usable]).mean())


def _ordered(config: StudentConfig, names: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """Of equal scores, the one that is named first comes first."""
    if config.sequential == "random":
        known = sorted(names)
        return [known[place] for place in np.random.default_rng(config.seed).permutation(len(known))]
    if config.sequential == "given":
        return list(names)
    sign = -1 if config.sequential == "descending" else 1
    return sorted(names, key=lambda name: sign * scores[name])


def stage_config(
    config: StudentConfig, training: tuple[Path | str, ...], name: str, out: Path, init: str | None
) -> StudentConfig:
    """The configuration of one stage: a run like any other."""
    ranked = find_method(config.method).ranked
    changes = {
        "sequential": None,
        "teacher": (name,),
        "cache": training,
        "ranking": config.ranking if ranked else None,
        "init": init,
        "out": out,
        "overwrite": False,
    }
    return config.model_copy(update=changes)


def ranking_of(ranking: Ranking | None, config: StudentConfig, name: str) -> Ranking | None:
    """The ranking as a stage's method sees it: its teacher is all there is."""
    if ranking is None or not find_method(config.method).ranked:
        return None
    return replace(
        ranking, sources=tuple(replace(each, weight=1.0) for each in ranking.sources if each.name == name)
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings only."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
