"""Which student is best, by how much, at what budget: only students of one test set and equal budgets are compared."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import final

import numpy as np
from jaxtyping import Bool

from kdcli.methods.base import method_names
from kdcli.metrics.intervals import (
    Interval,
    of_difference,
    of_paired,
    of_seed_difference,
    of_seeds,
)
from kdcli.reporting.budgets import Budget, budget_of, interval_of, main_of, tested_on, top1_of
from kdcli.reporting.material import Run

_SEED = re.compile(r"(?:^|(?<=[-_/.]))(?:seed|s)?[-_]?\d+$")
_MANY = 3
"""From so many students on, the best one's accuracy is told to be picked."""
_SETUP = {"student": "architecture", "init": "start", "image_size": "input size"}
"""Keys of a run's identity that make two students two networks, with their names."""
_MOST_ALONE = 3
"""Students named where none is called best."""

Right = Mapping[str, Bool[np.ndarray, " n"]]
"""Of runs, by name: which of all test images each gets right; of those alone for which it is known."""


@final
@dataclass(frozen=True, slots=True)
class Contender:
    """A student, or one that was trained with several seeds.

    Attributes:
        name: of the run, or of the group.
        runs: one, or one for each seed.
        score: accuracy on the test set (or mAP), the mean over the runs, a fraction.
        interval: 95 %; None where there is none.
        how: the interval was made.
        budget: of each of the runs.
    """

    name: str
    runs: tuple[Run, ...]
    score: float
    interval: Interval | None
    how: str
    budget: Budget

    @property
    def plain(self) -> bool:
        """Whether it learned from labels alone."""
        return self.runs[0].method in method_names("only_labels")

    @property
    def unit(self) -> str:
        """Of its score."""
        return "%" if top1_of(self.runs[0]) is not None else "% mAP"


def contenders(runs: Sequence[Run]) -> list[Contender]:
    """The tested students of one test set, best first; those whose epoch was chosen on it are left out."""
    fair = [run for run in runs if main_of(run) is not None and run.result.get("selection") != "test"]
    groups = seed_groups(fair) or {run.name: [run] for run in fair}
    found = [_contender(name if len(group) > 1 else group[0].name, group) for name, group in groups.items()]
    return sorted(found, key=lambda each: -each.score)


def _contender(name: str, runs: Sequence[Run]) -> Contender:
    scores = [score for run in runs if (score := main_of(run)) is not None]
    budgets = [budget_of(run) for run in runs]
    budget = budgets[0] if all(budgets[0].equals(each) for each in budgets[1:]) else Budget(None, None, None)
    if len(runs) > 1:
        varied = len(set(scores)) > 1  # equal ones do not say how much another seed would change
        how = f"Student's t, over {len(runs)} seeds" if varied else ""
        return Contender(name, tuple(runs), fmean(scores), of_seeds(scores) if varied else None, how, budget)
    interval = interval_of(runs[0])
    how = f"Wilson's, over {tested_on(runs[0]):,} test images; what another seed would change is not in it"
    how = how if interval else ""
    return Contender(name, tuple(runs), scores[0], interval, how, budget)


def seed_groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Tested runs that differ in their seed alone, as their names and records say; none where nothing repeats."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if top1_of(run) is not None:
            groups.setdefault(_without_seed(run), []).append(run)
    several = any(len({run.result.get("seed") for run in group}) > 1 for group in groups.values())
    return groups if several else {}


def _without_seed(run: Run) -> str:
    last = run.name.rpartition("/")[2]
    stripped = _SEED.sub("", last).rstrip("-_.") or run.method
    return stripped if stripped == run.method or run.method in stripped else f"{stripped} ({run.method})"


# --- what is said -----------------------------------------------------------------------------


def standing(runs: Sequence[Run], right: Right, where: str) -> list[str]:
    """What a reader wants to know first, in sentences, the verdict first; none where nothing was tested.

    Args:
        runs: of one test set.
        right: see :data:`Right`.
        where: "on the test set", or on which of several.
    """
    known = contenders(runs)
    if not known:
        return []
    peers = comparable(known)
    if len(peers) < 2:
        alone = [_alone(each, where) for each in known[:_MOST_ALONE]]
        return [*_why_no_best(known, where), *alone, *_intervals(known[:_MOST_ALONE])]
    best, *others = peers
    rival = next((each for each in others if each.plain), others[0])
    gaps = [difference(best, each, right) for each in others]
    clear = all(gap is not None and gap[0][0] > 0 for gap in gaps)
    even = all(gap is not None and gap[0][0] <= 0 for gap in gaps)
    of = f"of {len(peers)} students of equal budget {where}"
    if even:
        names = f"{best.name} and {others[0].name}" if len(peers) == 2 else f"{len(peers)} students"
        found = (
            f"No difference is shown between {names} of equal budget {where}; the highest score is "
            f"{_name(best)}'s, {_score(best)}."
        )
    else:
        found = f"{_name(best)} {'is the best' if clear else 'has the highest score'} {of}: {_score(best)}."
    lines = [f"{found} {_difference(best, rival, right)}"]
    if rival is not others[0]:
        lines.append(_difference(best, others[0], right))
    lines.append(f"Budget of {best.name}: {best.budget.text()}; the others saw as many images within 5 %.")
    if len(peers) >= _MANY:
        lines.append("Picked as the best by these very test images, its accuracy is a little too high.")
    lines += [_left_out(each, best) for each in known if each not in peers]
    return lines + _intervals([best])


def comparable(known: Sequence[Contender]) -> list[Contender]:
    """The students that may be compared: as many as there are of one budget, with one of labels alone if possible.

    Args:
        known: of one test set, best first.
    """
    groups = [[each for each in known if each.budget.equals(one.budget)] for one in known]
    exact = [group for group in groups if all(a.budget.equals(b.budget) for a in group for b in group)]
    several = [group for group in exact if len(group) > 1]
    if not several:
        return []
    return max(several, key=lambda group: (len({each.plain for each in group}), len(group), group[0].score))


def _name(one: Contender) -> str:
    return f"{one.name} ({one.runs[0].method})" if one.runs[0].method not in one.name else one.name


def _score(one: Contender) -> str:
    text = f"{100 * one.score:.1f} {one.unit}"
    if one.interval is None:
        return text
    low, high = (100 * end for end in one.interval)
    return f"{text} (95 % interval {low:.1f} to {high:.1f} %)"


def _intervals(shown: Sequence[Contender]) -> list[str]:
    """How the intervals were made, and what they leave out."""
    found = dict.fromkeys(each.how for each in shown if each.how)
    if not found:
        return []
    return [f"Intervals of accuracies: {'; '.join(found)}."]


def _alone(one: Contender, where: str) -> str:
    budget = one.budget.text()
    return f"{_name(one)} reaches {_score(one)} {where}" + (f", after {budget}." if budget else ".")


def _why_no_best(known: Sequence[Contender], where: str) -> list[str]:
    if len(known) < 2:
        return []
    return [
        f"Which of {len(known)} students is best {where} is not said: no two of them saw as many images in training. "
        "Train them for equal budgets (--epochs) to compare them."
    ]


def _left_out(one: Contender, best: Contender) -> str:
    if one.budget.images is None or not best.budget.images:
        return f"{one.name} ({100 * one.score:.1f} {one.unit}) is not compared: its budget is not known."
    times = one.budget.images / best.budget.images
    return (
        f"{one.name} ({100 * one.score:.1f} {one.unit}) is not compared: it saw {one.budget.images:,} images, "
        f"{times:.2g} times as many."
    )


def _difference(best: Contender, other: Contender, right: Right) -> str:
    gap = 100 * (best.score - other.score)
    than = f"{other.name} ({'labels alone, ' if other.plain else ''}{100 * other.score:.1f} {other.unit})"
    found = difference(best, other, right)
    said = (
        f"That is {gap:.1f} points more than {than}"
        if f"{gap:.1f}" != "0.0"
        else f"That is as much as {than}"
    )
    apart = _apart(best, other)
    if found is None:
        return f"{said}; the runs give no interval of the difference.{apart}"
    (low, high), how = found
    ends = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
    close = " It includes 0: this test does not tell the two apart." if low <= 0 <= high else ""
    return f"{said}; 95 % interval of the difference {ends} points ({how}).{close}{apart}"


def _apart(one: Contender, other: Contender) -> str:
    """In what two students differ besides how they learned, as a sentence."""
    found = []
    for key, name in _SETUP.items():
        first, second = (each.runs[0].identity.get(key) for each in (one, other))
        if first != second and None not in (first, second):
            found.append(f"{name} ({first}, {second})")
    return f" They differ in {', '.join(found)}, too." if found else ""


def difference(one: Contender, other: Contender, right: Right) -> tuple[Interval, str] | None:
    """The interval of a difference of two students' scores and how it was made; None where there is none."""
    if len(one.runs) > 1 and len(other.runs) > 1:
        first, second = ({run.result.get("seed"): main_of(run) for run in each.runs} for each in (one, other))
        paired = first.keys() == second.keys() and len(first) == len(one.runs) == len(other.runs)
        seeds = sorted(first, key=str) if paired else []
        values = [
            [score for score in ([each[seed] for seed in seeds] if paired else map(main_of, runs)) if score is not None]
            for each, runs in ((first, one.runs), (second, other.runs))
        ]  # fmt: skip
        interval = of_seed_difference(values[0], values[1], paired)
        if interval[0] == interval[1]:
            return None
        return interval, "Student's t over paired seeds" if paired else "Welch's t over the runs of both"
    if len(one.runs) > 1 or len(other.runs) > 1:
        return None
    a, b = one.runs[0], other.runs[0]
    if a.name in right and b.name in right:
        return of_paired(right[a.name], right[b.name]), "Bonett and Price's, image by image"
    counts = [(round((top1_of(run) or 0.0) * tested_on(run)), tested_on(run)) for run in (a, b)]
    if top1_of(a) is None or not all(images for _, images in counts):
        return None
    return of_difference(*counts), "Newcombe's, from the counts: over the same images it is rather narrower"
