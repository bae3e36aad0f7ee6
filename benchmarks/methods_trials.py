"""Which methods can be trained on a task of methods.py, and what each is told beside the options that all have."""

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measuring import say
from methods_place import IMAGENET, LETTERS, TAP, Place, Plan, Task

import kdcli
from kdcli.console import console
from kdcli.errors import KdError, UsageError
from kdcli.files import write_json
from kdcli.methods.base import find_method
from kdcli.ranking.documents import ranking_of
from kdcli.reading import read_json
from kdcli.registry import METHODS
from kdcli.training.resolve import make_plan

Options = dict[str, Any]


EXTRA: dict[str, Options] = {
    "distill-equal": {"teacher": [LETTERS, IMAGENET]},
    "multi-head-kd": {"generalist": IMAGENET},
    "multi-head-crd": {"generalist": IMAGENET},
    "agglomerate": {"teacher": [LETTERS, IMAGENET], "levels": "features"},
    "fixmatch": {"unlabelled_ratio": 1.0},
    "mcl": {"mcl_share": 0.99},
}
"""What a method is told beside :func:`told`: both teachers where it is made for several; where it learns from experts
alone, that the letters' is one; and where its defaults cannot be used: fixmatch's seven unlabelled images a labelled
one, mcl's average of a long training."""

UNLABELLED: dict[str, Options] = {"cd": {"kl_weight": 1.0}}
"""The same where there are no labels, beside ``label_weight`` 0 of methods that have one: their other terms alone."""

VARIANTS: dict[str, tuple[str, Options]] = {
    "kd+standardise-logits": ("kd", {"standardise_logits": True}),
    "dkd+standardise-logits": ("dkd", {"standardise_logits": True}),
    "feature+maps": ("feature", {"levels": "all"}),
    "agglomerate+one-teacher": ("agglomerate", {"teacher": [LETTERS]}),
    "topk-kl+spread": ("topk-kl", {"rest": "spread"}),
}
"""Options that are rows of their own, where this kd has them."""

QUICK_ONLY = "distill-weighted,consolidation,multi-task,sp,mlfd,agglomerate"
"""What --quick tries unless told otherwise: one method of each kind, and one that cannot be trained."""


@dataclass(frozen=True)
class Trial:
    """Whether a method can be trained on a task, as one epoch on few images showed.

    Attributes:
        method: its name in the registry.
        options: what a student is told.
        refused: why not; empty where it can.
        alone: whether it eats other batches than the baseline, so that it cannot be in its sweep.
        arrays: what it reads of the cache, by teacher.
    """

    method: str
    options: Options
    refused: str = ""
    alone: bool = False
    arrays: Mapping[str, list[str]] = field(default_factory=dict)


# --- which methods ---------------------------------------------------------------------------------


def candidates(only: str | None) -> dict[str, tuple[str, Options]]:
    """Every row of the table: its method, and what that is told of its own; ``only`` are some methods, with commas."""
    baselines = [task.baseline for task in Plan().tasks]
    wanted = list(METHODS) if only is None else list(dict.fromkeys([*baselines, *only.split(",")]))
    if unknown := [name for name in wanted if name not in METHODS]:
        raise SystemExit(f"error: no method {', '.join(unknown)}\nhint: there are {', '.join(METHODS)}")
    rows = {name: (name, EXTRA.get(name, {})) for name in wanted}
    for label, (name, options) in VARIANTS.items():
        if name in wanted and set(options) <= {"teacher", *find_method(name).Options.model_fields}:
            rows[label] = (name, {**EXTRA.get(name, {}), **options})
    return rows


def told(name: str, task: Task, extra: Options) -> Options:
    """The options of a student that its method alone has: the one teacher, or what the method asks for instead."""
    method = find_method(name)
    fields = method.Options.model_fields
    own: Options = {"method": name}
    if method.needs.generalist:
        own["generalist"] = task.generalist  # the other one is the expert
    elif not method.needs.ranking:
        own["teacher"] = [LETTERS]
    if not task.labels:
        own |= {"label_weight": 0.0} if "label_weight" in fields else {}
        own |= UNLABELLED.get(name, {})
    own |= extra
    levels = [own.get(key, fields[key].default) for key in fields if key.endswith(("level", "levels"))]
    if "student_tap" in fields and not {"features", "none"} & set(levels):
        own |= {"student_tap": [TAP], "teacher_tap": [TAP]}
    return own


def ranked(place: Place, task: Task, part: str, options: Options) -> Options:
    """With the ranking by the labels of a training set, where the method needs one and there are labels."""
    if not (task.labels and find_method(options["method"]).needs.ranking):
        return options
    return {**options, "ranking": str(place.ranking(task, part))}


def attempt(place: Place, task: Task, label: str, options: Options) -> Trial:
    """Train a method for an epoch on two images a class, in a sweep with the baseline or, where it cannot be, alone."""
    console.quiet = True
    name, own = options["method"], ranked(place, task, "trial", options)
    folder = place.folder / task.name / "trials" / label
    common: Options = {**place.common(), "epochs": 1, "cache": (str(place.cache(task)),)}
    common["data"] = place.data(task, "trial", labels=task.labels)
    if task.labels:
        common["test"] = place.data(task, "trial")
    students = {"baseline": told(task.baseline, task, {}), label: own}
    try:
        try:
            tested, alone = trained(folder / "both", students, common)[label], False
        except UsageError as error:
            if "cannot share one stream" not in error.message:
                raise
            tested, alone = trained(folder / "alone", {label: own}, common)[label], True
        file = Path(own["ranking"]) if "ranking" in own else None
        ranking = None if file is None else ranking_of(read_json(file), file)
        plan = make_plan(kdcli.StudentConfig(out=folder, **common, **own), ranking)
    except KdError as error:
        reason = error.message.removeprefix(f"student '{label}': ").replace(str(common["data"]), "the data")
        return Trial(name, options, refused=reason)
    if task.labels and not tested:
        return Trial(name, options, refused="it trains no classifier of the task's classes")
    arrays = {key: list(each) for key, each in plan.method.arrays(plan.setup).items()}
    return Trial(name, options, alone=alone, arrays=arrays)


def trained(out: Path, students: Mapping[str, Options], common: Options) -> dict[str, bool]:
    """Train students in this process, anew; gives whether the classifier of each was tested, if it did not diverge."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").unlink(missing_ok=True)
    file = out / "students.json"
    file.write_text(json.dumps({"students": students}), encoding="utf-8")
    found = kdcli.train_sweep(file, out=out, overwrite=True, **common)
    return {name: name in found.diverged or "top1" in (found.students[name].test or {}) for name in students}


def try_all(place: Place, rows: Mapping[str, tuple[str, Options]], jobs: int) -> dict[Task, dict[str, Trial]]:
    """Of each task a trial of every row, by its name."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return {task: _tried(place, task, rows, pool) for task in place.plan.tasks}


def _tried(
    place: Place, task: Task, rows: Mapping[str, tuple[str, Options]], pool: ProcessPoolExecutor
) -> dict[str, Trial]:
    """A trial of every row; what was found is kept."""
    file = place.folder / task.name / "trials.json"
    known = {key: Trial(**each) for key, each in _read(file, {}).items()}
    missing = {key: told(name, task, extra) for key, (name, extra) in rows.items() if key not in known}
    say(f"{task.name}: trying {len(missing)} methods")
    found = [pool.submit(attempt, place, task, key, options) for key, options in missing.items()]
    for key, trial in zip(missing, (each.result() for each in found), strict=True):
        say(f"{task.name}, {key}: {trial.refused or ('alone' if trial.alone else 'runs')}")
        known[key] = trial
        write_json(file, {name: asdict(each) for name, each in known.items()})
    return {key: known[key] for key in rows}


def _read(file: Path, default: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else default
