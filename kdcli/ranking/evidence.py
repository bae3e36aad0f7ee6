"""Does the ranking work? Scores of sources against accuracies of the students they taught (P2 §5.2 and §5.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np

from kdcli.console import console
from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.files import real_path
from kdcli.ranking.agreement import Estimate, estimate_all
from kdcli.ranking.config import RankConfig
from kdcli.ranking.documents import ranking_of, table_of
from kdcli.ranking.rank import RankResult
from kdcli.ranking.students import LABELS_ONLY, RANDOM_SELECTION, RANDOM_WEIGHTS, Student, read_students
from kdcli.reading import read_json

FEWEST_SOURCES = 3
"""Two points always lie on a line."""
RANDOM_DRAWS = 5
"""Students of random weights below which their mean is not reported."""

_Key = TypeVar("_Key", str, float)


@final
@dataclass(frozen=True, slots=True)
class Scores:
    """What one ranking says about one target.

    Attributes:
        target: name of the target.
        own: column that the ranking follows.
        table: score of each source by column; None where it is undefined.
        cache_id: of the cache that was ranked; None for files.
        data: what ``--data`` named, as results of students have it.
    """

    target: str
    own: str
    table: Mapping[str, Mapping[str, float | None]]
    cache_id: str | None
    data: str | None


@final
@dataclass(frozen=True, slots=True)
class Target:
    """A target and its students.

    Attributes:
        scores: of its sources.
        accuracy: mean accuracy of the students of each single source.
        schemes: mean accuracy by scheme of P2's Fig. 1; ``weighted(12)`` names p.
        powers: accuracy of the weighted students by p, with 0 for equal and inf for nearest (P2's Fig. 6).
        students: how many.
    """

    scores: Scores
    accuracy: dict[str, float]
    schemes: dict[str, float]
    powers: dict[float, float]
    students: int

    @property
    def name(self) -> str:
        """Of the target."""
        return self.scores.target

    def pairs(self, column: str) -> tuple[list[float], list[float]] | None:
        """Scores and accuracies of the sources that have both, by name; None for fewer than three."""
        scores = self.scores.table.get(column, {})
        known = [name for name in sorted(self.accuracy) if scores.get(name) is not None]
        if len(known) < FEWEST_SOURCES:
            return None
        return [float(scores[name] or 0) for name in known], [self.accuracy[name] for name in known]


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """The answer.

    Attributes:
        targets: in the order given.
        column: that the rankings follow; the figures show it.
        top: k of the top-k statistics.
        grid: column -> target (and ``mean``) -> statistic (P2 Tables 2 and 3).
    """

    targets: tuple[Target, ...]
    column: str
    top: int
    grid: Mapping[str, Mapping[str, Mapping[str, Estimate]]]

    def document(self) -> dict[str, Any]:
        """As JSON: ``{"targets", "grid", "schemes", "powers"}``."""
        return {
            "targets": {
                target.name: {"students": target.students, "accuracy": target.accuracy}
                for target in self.targets
            },
            "grid": {
                column: {
                    target: {name: asdict(estimate) for name, estimate in cells.items()}
                    for target, cells in row.items()
                }
                for column, row in self.grid.items()
            },
            "schemes": {
                scheme: {**values, "mean": float(np.mean(list(values.values())))}
                for scheme, values in self.schemes().items()
            },
            "powers": {
                target.name: {f"{power:g}": value for power, value in sorted(target.powers.items())}
                for target in self.targets
            },
        }

    def schemes(self) -> dict[str, dict[str, float]]:
        """Accuracy by scheme and target, of the schemes that every target has: others cannot be averaged."""
        common = [
            scheme
            for scheme in self.targets[0].schemes
            if all(scheme in target.schemes for target in self.targets)
        ]
        return {scheme: {t.name: t.schemes[scheme] for t in self.targets} for scheme in common}


def evidence_of_ranking(result: RankResult, config: RankConfig) -> Evidence:
    """Compare a ranking that was just made with the students of ``--against``.

    Raises:
        NotFoundError, BadDataError: no such results, or too few of them are of this target.
    """
    ranking = result.ranking
    place = config.cache[0] if config.cache else config.features
    name = real_path(place or "target").stem
    scores = Scores(
        name, f"{ranking.metric}/{ranking.on}", result.table, ranking.cache_id, result.data
    )  # fmt: skip
    return _evidence([scores], config)


def evidence_of_files(config: RankConfig) -> Evidence:
    """Compare rankings in files (``--ranking``), one a target, with the students of ``--against``.

    The name of a target is the stem of its file.

    Raises:
        UsageError: options that do not go together, two files of one name, or rankings by different metrics.
        NotFoundError, BadDataError: a file is not there, or is no ranking.
    """
    if config.cache or config.features is not None:
        raise UsageError(
            "--ranking reads rankings made before, without --cache and --features",
            "Rank each target first: kd rank-sources --cache TARGET.kd --json > TARGET.json",
        )
    if not config.against:
        raise UsageError("--ranking needs --against", "Name the students' results: --against runs/")
    scores = [_read_scores(path) for path in config.ranking]
    names = [one.target for one in scores]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two rankings are called '{twice}'", "A file's name is its target's: rename one of them."
        )
    own = {one.own for one in scores}
    if len(own) > 1:
        raise UsageError(
            f"the rankings follow different metrics: {', '.join(sorted(own))}",
            "Rank every target by the same --metric and --on.",
        )
    return _evidence(scores, config)


def _read_scores(path: Path) -> Scores:
    if path.is_dir() or not path.exists():
        raise NotFoundError(
            f"--ranking {path} is {'a folder' if path.is_dir() else 'not there'}",
            "Make it: kd rank-sources --cache TARGET.kd --metric all --json > TARGET.json",
        )
    document = read_json(path)
    ranking = ranking_of(document, path)
    columns, data = table_of(document, path)
    own = f"{ranking.metric}/{ranking.on}"
    table = columns | {own: {source.name: source.score for source in ranking.sources}}
    return Scores(path.stem, own, table, ranking.cache_id, data)


def _evidence(scores: Sequence[Scores], config: RankConfig) -> Evidence:
    students = read_students(config.against)
    groups = _by_target(scores, students)
    targets = tuple(_target(one, group) for one, group in zip(scores, groups, strict=True))
    fewest = min(len(target.accuracy) for target in targets)
    if fewest <= config.top:
        console.warn(f"the top {config.top} of {fewest} sources leave no choice: give a smaller --top")
    columns = [c for c in scores[0].table if all(target.pairs(c) is not None for target in targets)]
    grid = {
        column: estimate_all(
            {target.name: pairs for target in targets if (pairs := target.pairs(column)) is not None},
            config.top,
            config.seed,
        )
        for column in columns
    }
    return Evidence(targets, scores[0].own, config.top, grid)


def _by_target(scores: Sequence[Scores], students: Sequence[Student]) -> list[list[Student]]:
    """The students of each target; those of no target are left out with a note.

    Raises:
        UsageError: a student belongs to two.
    """
    groups: list[list[Student]] = [[] for _ in scores]
    with_cache = [
        student for student in students if student.cache_id is not None or student.target is not None
    ]
    for student in with_cache:
        mine = [number for number, one in enumerate(scores) if _is_of(student, one)]
        if len(mine) > 1:
            both = " and ".join(scores[number].target for number in mine)
            raise UsageError(
                f"{student.path} could be of the targets {both}: they share a cache",
                'Rank each with its own --data, or give each result a "target": the name of its ranking\'s file.',
            )
        for number in mine:
            groups[number].append(student)
    data = [{student.data for student in group} for group in groups]
    for (
        student
    ) in students:  # labels-only reads no cache: it is of the target whose other students saw its data
        if student not in with_cache:
            for group, known in zip(groups, data, strict=True):
                if student.data in known:
                    group.append(student)
    left_out = len(students) - sum(map(len, groups))
    if left_out > 0:
        console.note(f"{left_out} of {len(students)} results are of no target that is ranked here: left out")
    return groups


def _is_of(student: Student, scores: Scores) -> bool:
    """By the target's name where the result gives it, else by cache, and by data where both name theirs."""
    if student.target is not None:
        return student.target == scores.target
    if None not in (student.data, scores.data) and student.data != scores.data:
        return False
    return scores.cache_id is None or student.cache_id == scores.cache_id


def _target(scores: Scores, students: Sequence[Student]) -> Target:
    ranked = set(scores.table[scores.own])
    singles: dict[str, list[float]] = {}
    for student in students:
        if student.single in ranked:
            singles.setdefault(str(student.single), []).append(student.accuracy)
    if len(singles) < FEWEST_SOURCES:
        raise BadDataError(
            f"target '{scores.target}' has students of {len(singles)} single sources among its "
            f"{len(ranked)} ranked ones and {len(students)} results; at least {FEWEST_SOURCES} are needed",
            "Train one per source on the ranked cache: "
            "kd train-student DATA --cache CACHE --teacher SOURCE --method distill-equal --test TEST ...",
        )
    _warn_of_settings(scores.target, students)
    accuracy = {name: float(np.mean(values)) for name, values in sorted(singles.items())}
    if len(set(accuracy.values())) == 1:
        console.warn(
            f"all single-source students of target '{scores.target}' do equally well: nothing to predict"
        )
    schemes, powers = _schemes(scores.target, students, ranked)
    schemes[RANDOM_SELECTION] = float(np.mean(list(accuracy.values())))
    return Target(scores, accuracy, _ordered(schemes), powers, len(students))


def _warn_of_settings(target: str, students: Sequence[Student]) -> None:
    taught = [student.setting for student in students if student.weights]
    for field in taught[0]:
        # Students by labels alone see fewer images, but start where the others do (P2 section 5.1).
        settings = [student.setting for student in students] if field == "init" else taught
        values = dict.fromkeys(str(setting[field]) for setting in settings if setting[field] is not None)
        if len(values) > 1:
            console.warn(f"students of target '{target}' differ in {field}: {', '.join(values)}")


def _schemes(
    target: str, students: Sequence[Student], ranked: set[str]
) -> tuple[dict[str, float], dict[float, float]]:
    """Mean accuracy of the students of each scheme, and of each power."""
    by_scheme: dict[str, list[float]] = {}
    by_power: dict[float, list[float]] = {}
    for student in students:
        if student.scheme is None or (student.scheme == "equal" and set(student.weights) != ranked):
            continue
        label = student.scheme if student.power is None else f"weighted({student.power:g})"
        by_scheme.setdefault(label, []).append(student.accuracy)
        power = {"equal": 0.0, "nearest": np.inf}.get(student.scheme, student.power)
        if power is not None:
            by_power.setdefault(float(power), []).append(student.accuracy)
    draws = len(by_scheme.get(RANDOM_WEIGHTS, ()))
    if 0 < draws < RANDOM_DRAWS:
        del by_scheme[RANDOM_WEIGHTS]
        console.warn(
            f"target '{target}' has {draws} students of random weights; a mean needs at least {RANDOM_DRAWS}"
        )
    return _means(by_scheme), _means(by_power)


def _means(values: Mapping[_Key, Sequence[float]]) -> dict[_Key, float]:
    return {key: float(np.mean(several)) for key, several in values.items()}


def _ordered(schemes: Mapping[str, float]) -> dict[str, float]:
    """The baselines first, then the weighted ones by their p."""

    def place(label: str) -> tuple[int, float]:
        first = (LABELS_ONLY, "inverse", RANDOM_WEIGHTS, RANDOM_SELECTION, "equal", "nearest")
        return (
            (first.index(label), 0) if label in first else (len(first), float(label[len("weighted(") : -1]))
        )

    return {label: schemes[label] for label in sorted(schemes, key=place)}
