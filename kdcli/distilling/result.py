"""What ``kd distill`` gives: the student, what it is worth, and the verdict in plain words."""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

from kdcli.documents import declared
from kdcli.metrics.intervals import of_disagreement
from kdcli.results import Result, Table

_CLEARLY: Final = 0.05
"""Accuracy by which a teacher's features have to be better than a student for the teacher to know more."""


@final
@dataclass(frozen=True, slots=True)
class Against:
    """The student against the same student from labels alone, on the same test images.

    Attributes:
        accuracy, baseline: shares of the test images that are right.
        images: how many there are.
        won, lost: images that only the student, and only the baseline, gets right.
        low, high: 95 % interval of the difference in accuracy.
    """

    accuracy: float
    baseline: float
    images: int
    won: int
    lost: int
    low: float
    high: float

    @classmethod
    def of(cls, accuracy: float, baseline: float, images: int, won: int, lost: int) -> "Against":
        """From what was counted."""
        return cls(accuracy, baseline, images, won, lost, *of_disagreement(won, lost, images))


@final
@dataclass(frozen=True, slots=True)
class DistillResult(Result):
    """What was made, and how good it is.

    Attributes:
        student: model spec of the student.
        method: it learnt by, and ``why`` that.
        out: folder of everything, absolute.
        accuracy: share of the test images that are right; None where nothing was tested.
        against: the same student from labels alone; None where there was none.
        probes: few-shot accuracy by representation.
        report: the page.
        seconds: of this call.
        commands: title, command and seconds of each step.
        verdict: lines of plain words.
    """

    bars: ClassVar[tuple[str, ...]] = ("representation", "accuracy")

    student: str
    method: str
    why: str
    out: str
    accuracy: float | None
    against: Against | None
    probes: dict[str, float]
    report: str
    seconds: float
    commands: tuple[tuple[str, str, float], ...]
    verdict: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        document: dict[str, Any] = declared(self)
        return document

    def records(self) -> tuple[dict[str, Any], ...]:
        """Few-shot accuracy, a representation a row."""
        return tuple({"representation": name, "accuracy": value} for name, value in self.probes.items())

    def tables(self) -> tuple[Table, ...]:
        """The verdict, and what was made."""
        made = [("student", self.student), ("method", f"{self.method}: {self.why}"), ("report", self.report)]
        return (Table(("verdict",), [(line,) for line in self.verdict]), Table(("made", "is"), made))


def verdict_of(against: Against, sources: dict[str, float], student: str, classes: int) -> tuple[str, ...]:
    """Whether distilling helped, and if that cannot be said, why not and what to try.

    Args:
        against: the comparison.
        sources: cross-validated accuracy of a linear classifier on each teacher's features, by name.
        student: its name, as it is called in the sentence.
        classes: of the images, for what guessing gets.
    """
    gain = 100 * (against.accuracy - against.baseline)
    numbers = (
        f"{student}: {100 * against.accuracy:.1f} % of {against.images} test images right, from labels alone "
        f"{100 * against.baseline:.1f} %, by guessing {100 / classes:.1f} %: {gain:+.1f} points (95 % interval "
        f"{100 * against.low:+.1f} to {100 * against.high:+.1f}; {against.won} images won, {against.lost} lost)"
    )
    if against.low > 0:
        return (numbers, "distilling helped")
    if against.high < 0:
        lines = [numbers, "distilling did harm here: keep the student from labels alone"]
    else:
        lines = [numbers, f"{against.images} test images do not tell the two apart: no gain is shown"]
    best = max(against.accuracy, against.baseline)
    told = [f"{name} {100 * accuracy:.1f} %" for name, accuracy in sources.items()]
    if told:
        lines.append(
            f"a linear classifier on a teacher's features gets (in folds of the training images): {', '.join(told)}"
        )
        lines.append(
            "so the teacher knows more than the student could learn from these images: try more --epochs, a larger "
            "--image-size, or a student that starts from weights (--student local-dir:PATH or hf-hub:NAME)"
            if max(sources.values()) > best + _CLEARLY
            else "so the teacher knows little that the student lacks: try another one"
        )
    return tuple(lines)
