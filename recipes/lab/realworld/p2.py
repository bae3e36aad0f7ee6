"""P2's study: who of several sources teaches a task with few labels, which PARC is to know beforehand.

Every source is the generalist, fine-tuned on other scripts, emoji or icons than the target's; every student starts from
the generalist, too, which is none of the sources. What is trained is what comes behind the trunk.

p2/sources/NAME/cache    the trunk's maps of a source's images
p2/sources/NAME/train    the source
p2/TARGET/trunk          the trunk's maps of the target's images
p2/TARGET/cache          what all sources say of them
p2/TARGET/seedS/rank     PARC on the labelled images, and weights; rank-inverse: the weights of Fig. 1's inverse
p2/TARGET/seedS/students all that learn from the cache
p2/TARGET/seedS/labels   labels only
p2/TARGET/seedS/fixmatch FixMatch, which draws its views anew: its trunk runs live and stays, too
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from lab.realworld.claims import Values
from lab.realworld.shared import Room
from lab.steps import Step, words

START = "start"
"""What caches call the generalist."""


def steps(room: Room) -> Iterator[Step]:
    """All of it."""
    for source, task in room.settings["p2.sources"].items():
        yield from _source(room, source, task)
    for target in room.settings["p2.targets"]:
        yield from _target(room, target)


# --- sources and targets --------------------------------------------------------------------------


def _part(room: Room, name: str, task: Mapping[str, Any], split: str, *more: str) -> str:
    """Data of a task: ``scripts``, ``emoji`` (a group) by identity, ``subgroups`` (of a group), ``icons``,
    ``fashion``, ``pen`` or ``digits``."""  # fmt: skip
    images = room.images
    match task:
        case {"scripts": [script]}:
            return images.glyphs(script, split, *more)
        case {"scripts": scripts}:
            return room.union(f"p2-{name}", scripts, split, *more)
        case {"emoji": group}:
            return images.emoji(group, split, *more)
        case {"subgroups": group}:
            return images.emoji(group, split, *more, label="subgroup")
        case {"icons": _}:
            return images.icons(split, *more)
        case {"fashion": _}:
            return images.fashion(split, *more)
        case {"pen": _}:
            return images.pen(split, *more)
    return images.few_digits(split, *more)


def _kind(task: Mapping[str, Any]) -> tuple[str, ...]:
    """What has to be installed for it."""
    kinds = {
        "scripts": "glyphs",
        "emoji": "emoji",
        "subgroups": "emoji",
        "icons": "icons",
        "fashion": "fashion",
        "digits": "digits",
    }
    return tuple(kind for key, kind in kinds.items() if key in task)


def _source(room: Room, source: str, task: Mapping[str, Any]) -> Iterator[Step]:
    """From the generalist by labels: of both styles (vendors, sets), so that it has seen what tells them apart."""
    settings, name = room.settings, f"p2/sources/{source}"
    share = (f"n={task['images']}",) if "images" in task else ()
    data = "++".join(_part(room, source, task, split, *share) for split in ("train", "test"))
    yield Step(
        f"{name}/cache",
        words("cache-teachers", data, cache=room.cache(name), teacher=f"{START}={room.start()}",
              keep=f"maps:{settings['p2.trunk']}", views=f"eval+train:{settings['p2.source.views']}",
              recipe=settings["recipe"]),
        needs=("weights/lite0",), data=_kind(task),
    )  # fmt: skip
    yield Step(
        f"{name}/train",
        words("train-student", data, cache=room.cache(name), method="labels-only", out=room.run(name),
              **_behind_trunk(room), **settings.options("p2.train"), **settings.options("p2.sourced")),
        needs=(f"{name}/cache",), data=_kind(task),
    )  # fmt: skip


def _behind_trunk(room: Room) -> dict[str, Any]:
    return {"student": room.start(), "train_from": room.settings["p2.trunk"], "bn": "frozen"}


def _target(room: Room, target: str) -> Iterator[Step]:
    settings, cache = room.settings, room.cache(f"p2/{target}")
    task = settings["p2.targets"][target]
    data, sources = _part(room, target, task, "train"), settings["p2.sources"]
    kinds = tuple(dict.fromkeys(kind for each in (task, *sources.values()) for kind in _kind(each)))
    common = {"cache": cache, "views": f"eval+train:{settings['p2.views']}", "recipe": settings["recipe"]}
    yield Step(
        f"p2/{target}/trunk",
        words("cache-teachers", data, teacher=f"{START}={room.start()}",
              keep=f"features,maps:{settings['p2.trunk']}", **common),
        needs=("weights/lite0",), data=kinds,
    )  # fmt: skip
    yield Step(
        f"p2/{target}/cache",
        words("cache-teachers", data, keep="logits,features",
              teacher=[f"{source}={room.export(f'p2/sources/{source}')}" for source in sources], **common),
        needs=(f"p2/{target}/trunk", *(f"p2/sources/{source}/train" for source in sources)), data=kinds,
    )  # fmt: skip
    for seed in settings["p2.seeds"]:
        yield from _seed(room, target, seed, kinds)


# --- students of a seed ---------------------------------------------------------------------------


def _seed(room: Room, target: str, seed: int, kinds: tuple[str, ...]) -> Iterator[Step]:
    settings, name, cache = room.settings, f"p2/{target}/seed{seed}", room.cache(f"p2/{target}")
    task = settings["p2.targets"][target]
    data = _part(room, target, task, "train", f"labelled={task['labelled']}", f"seed={seed}")
    for rank, scheme in (("rank", {"power": settings["p2.power"]}), ("rank-inverse", {"scheme": "inverse"})):
        yield Step(
            f"{name}/{rank}",
            words("rank-sources", cache=cache, data=data, exclude=START, metric="parc", seed=seed, **scheme),
            needs=(f"p2/{target}/cache",), data=kinds,
        )  # fmt: skip
    drawn = (f"n={settings['p2.test.images']}", f"seed={seed}") if settings["p2.test.images"] else ()
    sweeps: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {
        "students": (_students(room, target, seed), _behind_trunk(room) | {"cache": cache}),
        "labels": (
            {"labels-only": {"method": "labels-only"}},
            _behind_trunk(room) | {"cache": cache},
        ),
    }
    if target in settings["p2.related"]:
        sweeps["fixmatch"] = (
            {"fixmatch": {"method": "fixmatch"}},
            _behind_trunk(room) | {"recipe": settings["recipe"]},
        )
    for kind, (students, options) in sweeps.items():
        path, files = room.lab.sweep(f"{name}/{kind}", students)
        own = settings.options("p2.train") | settings.options(f"p2.{kind}")
        own["epochs"] = task["epochs"][kind]
        yield Step(
            f"{name}/{kind}",
            words("train-student", data, test=_part(room, target, task, "test", *drawn),
                  sweep=path, out=room.run(name) / kind, seed=seed, data_seed=seed, **options, **own),
            needs=(f"p2/{target}/cache", f"{name}/rank", f"{name}/rank-inverse"), files=files, data=kinds,
        )  # fmt: skip


def _students(room: Room, target: str, seed: int) -> dict[str, dict[str, Any]]:
    """All that learn from the cache; of some seeds also one student a source."""
    settings, name = room.settings, f"p2/{target}/seed{seed}"
    ranking, inverse = (str(room.lab.document_path(f"{name}/{rank}")) for rank in ("rank", "rank-inverse"))
    sources = list(settings["p2.sources"])
    singles = sources if seed in settings["p2.single_seeds"] else []
    return {
        "nearest": {"method": "distill-nearest", "ranking": ranking},
        "weighted": {"method": "distill-weighted", "ranking": ranking},
        "equal": {"method": "distill-equal", "teacher": sources},
        "inverse": {"method": "distill-weighted", "ranking": inverse},
        **{f"single-{source}": {"method": "distill-equal", "teacher": [source]} for source in singles},
    }


# --- what has run ---------------------------------------------------------------------------------


def values(room: Room) -> Values:
    """What has run: top-1 in percent by method, a column a target and the mean of the related ones; correlations."""
    settings = room.settings
    by_target = {
        target: {seed: found for seed in settings["p2.seeds"] if (found := _accuracies(room, target, seed))}
        for target in settings["p2.targets"]
    }
    table: dict[tuple[str, str], dict[int, float]] = {}
    for target, seeds in by_target.items():
        for seed, found in seeds.items():
            for row, value in found.items():
                if not row.startswith("single-"):
                    table.setdefault((row, target), {})[seed] = value
    return {**_related(table, settings["p2.related"]), **table, **_correlations(room, by_target)}


def _related(table: Values, related: Sequence[str]) -> dict[tuple[str, str], dict[int, float]]:
    """Means over the related targets, of the rows and seeds that all of them have."""
    means = {}
    for row in dict.fromkeys(row for row, _ in table):
        columns = [table.get((row, target), {}) for target in related]
        seeds = set.intersection(*(set(column) for column in columns))
        if seeds:
            means[row, "related"] = {
                seed: fmean(column[seed] for column in columns) for seed in sorted(seeds)
            }
    return means


def _accuracies(room: Room, target: str, seed: int) -> dict[str, float]:
    """Top-1 by student; of single sources also their mean, P2's DistillRandomSelection."""
    found: dict[str, float] = {}
    for kind in ("labels", "students", "fixmatch"):
        if room.lab.has(step := f"p2/{target}/seed{seed}/{kind}"):
            students = room.lab.document(step)["students"]
            found |= {each["name"]: 100 * each["test"]["top1"] for each in students}
    if singles := [value for name, value in found.items() if name.startswith("single-")]:
        found["random selection"] = fmean(singles)
    return found


def _correlations(room: Room, by_target: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Values:
    """Spearman's correlations, means over targets: scores with single-source students, and these with each other."""
    settings = room.settings
    seeds = settings["p2.single_seeds"]
    names = [f"single-{source}" for source in settings["p2.sources"]]
    singles = {
        target: {seed: [own[seed][name] for name in names] for seed in seeds if names[0] in own.get(seed, {})}
        for target, own in by_target.items()
    }
    if not all(len(own) == len(seeds) for own in singles.values()):
        return {}
    scores = {target: {seed: _scores(room, target, seed) for seed in seeds} for target in singles}
    found: dict[tuple[str, str], dict[int, float]] = {
        ("PARC, Spearman", "all targets"): {
            seed: fmean(spearman(scores[target][seed], own[seed]) for target, own in singles.items())
            for seed in seeds
        }
    }
    for target, own in singles.items():
        found["PARC, Spearman", target] = {seed: spearman(scores[target][seed], own[seed]) for seed in seeds}
    if len(seeds) > 1:
        between = [
            spearman(own[one], own[other])
            for own in singles.values()
            for one, other in combinations(seeds, 2)
        ]
        found["ceiling: two seeds' students, Spearman", "all targets"] = {0: fmean(between)}
    return found


def _scores(room: Room, target: str, seed: int) -> list[float]:
    """PARC by source."""
    document = room.lab.document(f"p2/{target}/seed{seed}/rank")
    by_name = {each["name"]: float(each["score"]) for each in document["sources"]}
    return [by_name[source] for source in room.settings["p2.sources"]]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation; 0 where either says nothing, all its values being equal."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(spearmanr(np.asarray(first), np.asarray(second)).statistic)
