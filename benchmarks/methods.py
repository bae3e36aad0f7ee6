"""Every method of kd on one task with labels and one without: one cache, one protocol; writes docs/method-table.md.

    python benchmarks/methods.py [--quick | --full] [--only METHOD,METHOD] [--turns SEEDS] [--out FOLDER]

Each method of the registry is tried on both tasks. Those that can be trained there choose their rate in the same
grid, on validation images, and are then trained on as many other training sets as there are seeds; students of a set
are one sweep. What is done is kept in FOLDER: the same call goes on where it was stopped. A method that cannot be
trained is on the page with kd's reason. ``--quick`` takes a method of each kind, is too small for its accuracies to
mean anything, and prints the page instead of writing it; ``--full`` takes hours.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import Figures, benchmark, commit, figure, machine, parser_of, say
from methods_page import Row, Section, page
from methods_place import FULL, GRID, LETTERS, QUICK, Place, Plan, Task, minutes_of, timed
from methods_trials import QUICK_ONLY, Trial, candidates, ranked, try_all

TREE = Path(__file__).parents[1]


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """One task: the methods that can be trained on it.

    Attributes:
        trials: of the rows that can, by name.
    """

    place: Place
    task: Task
    trials: Mapping[str, Trial]

    def grid(self) -> list["Unit"]:
        """The sweeps that choose the rates, one a rate (and group)."""
        rates = self.place.plan.rates
        return [
            Unit(self, GRID, f"grid-{rate}-{group}", names, dict.fromkeys(names, rate))
            for rate in (rates if len(rates) > 1 else ())
            for group, names in self.groups(self.trials).items()
        ]

    def groups(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Rows by who shares a stream: all but those that eat other batches."""
        together = tuple(name for name in names if not self.trials[name].alone)
        return {"together": together, **{name: (name,) for name in names if self.trials[name].alone}}

    def rates(self) -> dict[str, float]:
        """The best rate of each row on the validation images, of equals the smallest; none of what always diverged."""
        rates = self.place.plan.rates
        if len(rates) == 1:
            return dict.fromkeys(self.trials, rates[0])
        scores: dict[str, dict[float, float]] = {name: {} for name in self.trials}
        for unit in self.grid():
            for name, score in unit.scores().items():
                scores[name][unit.rates[name]] = score
        return {
            name: max(own, key=lambda rate, own=own: (own[rate], -rate))
            for name, own in scores.items()
            if own
        }

    def final(self, rates: Mapping[str, float]) -> list["Unit"]:
        """The sweeps that are reported, one a seed (and group)."""
        return [
            Unit(self, seed, f"seed{seed}-{group}", names, rates)
            for seed in range(1, self.place.plan.seeds + 1)
            for group, names in self.groups(rates).items()
        ]


@dataclass(frozen=True)
class Unit:
    """One sweep, and what its students score."""

    study: Study
    number: int
    name: str
    rows: tuple[str, ...]
    rates: Mapping[str, float]

    @property
    def folder(self) -> Path:
        return self.study.place.folder / self.study.task.name / "runs" / self.name

    def train(self) -> None:
        """The sweep, and without labels its probe."""
        place, task, trials = self.study.place, self.study.task, self.study.trials
        students = {
            row: {**ranked(place, task, f"train{self.number}", trials[row].options), "lr": self.rates[row]}
            for row in self.rows
        }
        place.sweep(task, self.number, self.name, students)
        if not task.labels and self.finished():
            models = {row: str(self.folder / row) for row in self.finished()}
            place.probe(task, self.number, self.name, models)

    def finished(self) -> list[str]:
        """The rows that did not diverge."""
        return [row for row in self.rows if (self.folder / row / "result.json").is_file()]

    def scores(self) -> dict[str, float]:
        """Accuracy in percent, by row, of those that did not diverge."""
        if not self.study.task.labels:
            probed = self.study.place.probed(self.study.task, self.name)
            return {row: probed[row] for row in self.finished()}
        return {row: 100 * float(self._result(row)["test"]["top1"]) for row in self.finished()}

    def seconds(self) -> dict[str, float]:
        """What the steps of each row took."""
        return {row: sum(each["seconds"] for each in self._result(row)["history"]) for row in self.finished()}

    def _result(self, row: str) -> Any:
        return json.loads((self.folder / row / "result.json").read_text(encoding="utf-8"))


def run_all(units: Iterable[Unit], jobs: int) -> None:
    """Some sweeps at a time, the largest first."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Unit.train, sorted(units, key=lambda unit: -len(unit.rows))))


# --- what was found --------------------------------------------------------------------------------


def section(study: Study, rates: Mapping[str, float], refused: Mapping[str, str], jobs: int) -> Section:
    """The numbers of one task."""
    place, task = study.place, study.task
    scores: dict[str, list[float]] = {row: [] for row in rates}
    seconds: list[dict[str, float]] = [{} for _ in range(place.plan.seeds)]
    for unit in study.final(rates):
        for row, score in unit.scores().items():
            scores[row].append(score)
        seconds[unit.number - 1] |= unit.seconds()
    costs = {row: [own[row] / own[task.baseline] for own in seconds if row in own] for row in rates}
    judged = range(
        1, 2 if task.labels else place.plan.seeds + 1
    )  # with labels teachers do not depend on the seed
    with ThreadPoolExecutor(jobs) as pool:
        references = list(pool.map(lambda seed: place.references(task, seed), judged))
    rows = [
        Row(
            name=row,
            method=study.trials[row].method,
            scores=tuple(scores[row]),
            cost=statistics.median(costs[row]) if costs[row] else float("nan"),
            apart=study.trials[row].alone,
            rate=rates[row],
            bytes=place.bytes_of(task, study.trials[row].arrays),
        )
        for row in rates
    ]
    return Section(task, rows, {key: [own[key] for own in references] for key in references[0]}, refused)


def compare(place: Place, options: argparse.Namespace) -> list[Section]:
    """Both tasks, from images to numbers."""
    rows = candidates(options.only or (QUICK_ONLY if options.quick else None))
    place.prepare(options.jobs)
    tried = try_all(place, rows, options.jobs)
    studies = {
        task: Study(place, task, {row: each for row, each in trials.items() if not each.refused})
        for task, trials in tried.items()
    }
    run_all([unit for each in studies.values() for unit in each.grid()], options.jobs)
    rates = {task: each.rates() for task, each in studies.items()}
    run_all([unit for task, each in studies.items() for unit in each.final(rates[task])], options.jobs)
    refused = {
        task: {
            **{row: each.refused for row, each in trials.items() if each.refused},
            **{row: "diverged at every rate" for row in studies[task].trials if row not in rates[task]},
        }
        for task, trials in tried.items()
    }
    return [section(studies[task], rates[task], refused[task], options.jobs) for task in tried]


def figures(options: argparse.Namespace) -> Figures:
    """Write the page; gives how far the teachers and the best methods are from the baselines."""
    plan = QUICK if options.quick else FULL if options.full else Plan()
    plan = replace(plan, seeds=options.turns or plan.seeds, epochs=options.epochs or plan.epochs)
    where = machine(("torch", "timm"))  # before: the load is not to be its own
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else options.out.absolute()
        require_same_code(folder)
        with timed(folder):
            sections = compare(Place(folder, plan), options)
        text = page(sections, plan, {**where, "minutes": minutes_of(folder)}, command(options))
    if options.quick:
        say(text)
    else:
        options.page.write_text(text, encoding="utf-8")
    found: Figures = {}
    for each in sections:
        base, best = each.base.mean, max(each.rows, key=lambda row: row.mean)
        lead = statistics.fmean(each.references[LETTERS]) - base
        what = f"the teacher above {each.task.baseline}, {each.task.name}"
        found[f"{each.task.name}_teacher_lead"] = figure(lead, 5, "points", what)
        gain = f"the best method, {best.name}, above {each.task.baseline}, {each.task.name}"
        found[f"{each.task.name}_best_gain"] = figure(best.mean - base, 0, "points", gain)
    return found


def command(options: argparse.Namespace) -> str:
    """As it was called, without what is particular to a machine."""
    told = {name: getattr(options, name) for name in ("only", "turns", "epochs")}
    words = [
        *(["--full"] if options.full else []),
        *(f"--{name} {value}" for name, value in told.items() if value),
    ]
    return " ".join(["python benchmarks/methods.py", *words])


def require_same_code(folder: Path) -> None:
    """A folder holds what one commit made.

    Raises:
        SystemExit: another commit began it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "commit.txt"
    if not marker.exists():
        marker.write_text(commit(), encoding="utf-8")
    if marker.read_text(encoding="utf-8") != commit():
        raise SystemExit(
            f"error: {folder} was begun by commit {marker.read_text(encoding='utf-8')}, and this is {commit()}\n"
            f"hint: remove it, or give another --out; to go on all the same, remove {marker}"
        )


def options_of() -> argparse.ArgumentParser:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="ten seeds, more rates, images, views and epochs")
    parser.add_argument("--only", help="methods, with commas; both baselines are added")
    parser.add_argument("--epochs", type=int, help="of every student; default: 12")
    parser.add_argument(
        "--out", type=Path, default=TREE / "build" / "method-table", help="what is kept, and gone on with"
    )
    parser.add_argument(
        "--page", type=Path, default=TREE / "docs" / "method-table.md", help="what is written"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes at a time, of one thread each (default 2)"
    )
    return parser


if __name__ == "__main__":
    benchmark(__doc__ or "", figures, ("torch", "timm"), options_of())
