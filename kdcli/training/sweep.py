"""A sweep: several students over one stream of batches, and the leaderboard of what became of them.

OUT/NAME/       each student's own run, as ``kd train-student --out OUT/NAME`` would have left it
OUT/sweep.json  the results of all, best first
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from kdcli.cells import fraction
from kdcli.console import duration
from kdcli.errors import DivergedError, OutputExistsError, StorageError
from kdcli.files import write_json
from kdcli.results import Result, Table
from kdcli.training.config import StudentConfig
from kdcli.training.result import TrainResult
from kdcli.training.scores import main_score
from kdcli.training.train import train_students
from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class SweepResult(Result):
    """What a sweep gave.

    Attributes:
        out: the folder of the sweep, absolute.
        students: results by name, the highest top-1 test accuracy first; untested ones last, in the given order.
        diverged: those that were given up, and why.
    """

    bars: ClassVar = ("name", "test.top1")

    out: str
    students: Mapping[str, TrainResult]
    diverged: Mapping[str, DivergedError]

    def document(self) -> dict[str, Any]:
        """The result as the JSON document that the command prints and sweep.json holds."""
        return {
            "out": self.out,
            "students": [{"name": name, **result.document()} for name, result in self.students.items()],
            "diverged": [{"name": name, "message": error.message} for name, error in self.diverged.items()],
        }

    def records(self) -> list[dict[str, Any]]:
        """A student each, without its epochs."""
        rows = [dict(one) for one in self.document()["students"]]
        return [{key: value for key, value in one.items() if key != "history"} for one in rows]

    def tables(self) -> Sequence[Table]:
        """See :class:`~kdcli.results.Result`."""
        scores = {name: one.test or one.validated for name, one in self.students.items()}
        names = next((tuple(each) for each in scores.values() if each), ())
        rows = [
            [
                name,
                one.method,
                one.details["student"],
                *(fraction(scores[name].get(score)) for score in names),
                duration(one.seconds),
                one.out,
            ]
            for name, one in self.students.items()
        ]
        lost = [
            [name, "diverged", "-", *["-"] * len(names), "-", f"{self.out}/{name}"] for name in self.diverged
        ]
        return (Table(["name", "method", "student", *names, "time", "out"], [*rows, *lost]),)

    def failure(self) -> DivergedError | None:
        """What to raise when all is done; None where no student diverged."""
        if not self.diverged:
            return None
        reasons = "; ".join(f"'{name}': {error.message}" for name, error in self.diverged.items())
        count = len(self.diverged) + len(self.students)
        others = "The others are finished. " if self.students else ""
        return DivergedError(
            f"{len(self.diverged)} of {count} students diverged: {reasons}",
            f"{others}Give these a smaller lr in the sweep file and add --overwrite, which leaves finished ones alone.",
            self.document(),
        )


def train_sweep(
    out: Path, configs: Mapping[str, StudentConfig], rankings: Mapping[str, Ranking | None] | None = None
) -> SweepResult:
    """Train several students over one stream, or go on with them; see :func:`kdcli.training.train.train_students`.

    Args:
        out: the folder of the sweep.
        configs: of the students, by name; each trains into a folder of its own.
        rankings: the value of what ``config.ranking`` names, by name of the student.

    Raises:
        OutputExistsError: ``out`` is itself a run, or a student's folder holds another one.
        KdError: see :func:`kdcli.training.train.train_students`.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"--out {out} is a file", "Give a folder; it is created when it is not there.")
    if (out / "run.json").is_file():
        raise OutputExistsError(
            f"--out {out} is the folder of one student",
            "Choose another folder; a sweep has one folder a student.",
        )
    outcomes = train_students(configs, rankings)
    diverged = {name: each for name, each in outcomes.items() if isinstance(each, DivergedError)}
    trained = {name: each for name, each in outcomes.items() if isinstance(each, TrainResult)}
    result = SweepResult(str(out.absolute()), _by_accuracy(trained), diverged)
    write_json(out / "sweep.json", result.document())
    return result


def _by_accuracy(results: Mapping[str, TrainResult]) -> dict[str, TrainResult]:
    def accuracy(name: str) -> float:
        test = results[name].test
        return float("-inf") if test is None else main_score(test)

    return {name: results[name] for name in sorted(results, key=accuracy, reverse=True)}
