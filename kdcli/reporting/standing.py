"""Which student is best, by how much, at what budget: only students of one test set and equal budgets are compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

import numpy as np
from jaxtyping import Bool

from kdcli.methods.base import method_names
from kdcli.metrics.intervals import (
    Interval,
    of_difference,
    of_paired,
    of_seed_difference,
    of_seeds,
    of_share,
)
from kdcli.reporting.material import Run
from kdcli.reporting.students import main_of, seed_groups, top1_of

EQUAL_WITHIN = 0.05
"""Numbers of images seen that differ by at most this share of the larger one are an equal budget."""
_MANY = 3
"""From so many students on, the best one's accuracy is told to be picked."""

Right = Mapping[str, Bool[np.ndarray, " n"]]
"""Of runs, by name: which of all test images each gets right; of those alone for which it is known."""


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """What training a student took, whatever it ran on.

    Attributes:
        images: shown to the student, repeats counted; None where the history does not say.
        epochs: passes over the data.
        steps: of the optimiser.
    """

    images: int | None
    epochs: int | None
    steps: int | None

    def equals(self, other: "Budget") -> bool:
        """Whether both saw as many images, but for a rest of a batch an epoch; unknown ones equal none."""
        if self.images is None or other.images is None:
            return False
        return abs(self.images - other.images) <= EQUAL_WITHIN * max(self.images, other.images)

    def text(self) -> str:
        """As a person reads it."""
        known = ((self.epochs, "epoch"), (self.steps, "step"), (self.images, "image"))
        return ", ".join(
            f"{value:,} {word}{'' if value == 1 else 's'}{' seen' if word == 'image' else ''}"
            for value, word in known
            if value is not None
        )


def budget_of(run: Run) -> Budget:
    """The budget of a run, by its history: of a sequence that of all its stages."""
    history = run.history
    if not history:
        return Budget(None, None, None)
    last: dict[Any, int] = {epoch.get("stage"): int(epoch.get("steps") or 0) for epoch in history}
    steps = sum(last.values())
    seen = [(epoch.get("images_per_second"), epoch.get("seconds")) for epoch in history]
    images: int | None = None
    if all(rate and seconds for rate, seconds in seen):
        images = round(sum(rate * seconds for rate, seconds in seen))
    elif steps and run.identity.get("batch_size"):
        images = steps * int(run.identity["batch_size"])
    return Budget(images, len(history), steps or None)


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
        how = f"Student's t over {len(runs)} runs that differ in their seed"
        return Contender(name, tuple(runs), fmean(scores), of_seeds(scores), how, budget)
    interval = interval_of(runs[0])
    how = f"Wilson, {tested_on(runs[0]):,} test images; other seeds not included" if interval else ""
    return Contender(name, tuple(runs), scores[0], interval, how, budget)


def tested_on(run: Run) -> int:
    """Number of its test images; 0 where it is not recorded."""
    test = run.identity.get("test")
    return int(test.get("images") or 0) if isinstance(test, Mapping) else 0


def interval_of(run: Run) -> Interval | None:
    """Wilson's interval of a run's test accuracy; None without one or without the number of images."""
    images, accuracy = tested_on(run), top1_of(run)
    return of_share(round(accuracy * images), images) if images and accuracy is not None else None


# --- what is said -----------------------------------------------------------------------------


def standing(runs: Sequence[Run], right: Right, where: str) -> list[str]:
    """What a reader wants to know first, in sentences; none where nothing was tested.

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
        return [_alone(each, where) for each in known[:3]] + _why_no_best(known)
    best, *others = peers
    lines = [f"{_name(best)} is the best of {len(peers)} students of equal budget {where}: {_score(best)}."]
    rival = next((each for each in others if each.plain), others[0])
    lines.append(_difference(best, rival, right))
    if rival is not others[0]:
        lines.append(_difference(best, others[0], right))
    lines.append(f"Budget of {best.name}: {best.budget.text()}; the others' are equal within 5 %.")
    if len(peers) >= _MANY:
        lines.append("Picked as the best by these very test images, its accuracy is a little too high.")
    return lines + [_left_out(each, best) for each in known if each not in peers]


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
        return f"{text} (no interval: the number of test images is not recorded)"
    low, high = (100 * end for end in one.interval)
    return f"{text} (95 % interval {low:.1f} to {high:.1f} %; {one.how})"


def _alone(one: Contender, where: str) -> str:
    budget = one.budget.text()
    return f"{_name(one)} reaches {_score(one)} {where}" + (f", after {budget}." if budget else ".")


def _why_no_best(known: Sequence[Contender]) -> list[str]:
    if len(known) < 2:
        return []
    return [
        "Which of them is best is not said: no two had an equal budget. Train them for as many images, with --epochs."
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
    said = f"That is {gap:.1f} points more than {than}"
    if found is None:
        return f"{said}; the runs give no interval of the difference."
    (low, high), how = found
    ends = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
    close = " It includes 0: these tests do not tell the two apart." if low <= 0 <= high else ""
    return f"{said} (95 % interval of the difference {ends} points; {how}).{close}"


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
        if not all(map(math.isfinite, interval)):
            return None
        return interval, "Student's t over paired seeds" if paired else "Welch's t over the runs of both"
    if len(one.runs) > 1 or len(other.runs) > 1:
        return None
    a, b = one.runs[0], other.runs[0]
    if a.name in right and b.name in right:
        return of_paired(right[a.name], right[b.name]), "Bonett and Price, image by image"
    counts = [(round((top1_of(run) or 0.0) * tested_on(run)), tested_on(run)) for run in (a, b)]
    if top1_of(a) is None or not all(images for _, images in counts):
        return None
    return of_difference(*counts), "Newcombe, as if each had its own test images: an upper bound of the width"
