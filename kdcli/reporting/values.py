"""What a report is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class ReportRow:
    """One student in the table; None is shown as a dash.

    Attributes:
        name: of the run; finds its history.
        method: value of ``--method``.
        test_top1: accuracy on the test set, a fraction.
        probe: few-shot probe accuracy: mean and half-width of its 95 % interval, fractions.
        seconds: what training it took.
        live_seconds: what it would have taken with live teachers.
        note: one line about this row.
        interval: ends of the 95 % interval of ``test_top1``, fractions.
    """

    name: str
    method: str
    test_top1: float | None = None
    probe: tuple[float, float] | None = None
    seconds: float | None = None
    live_seconds: float | None = None
    note: str = ""
    interval: tuple[float, float] | None = None


@final
@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page, in its order; what is empty is left out.

    Attributes:
        title: of the page.
        intro: a paragraph: what was done, on what.
        commands: steps: what it is for, the exact shell command, seconds it took.
        ranking: of the sources.
        rows: the students.
        histories: per run, one document per epoch as in metrics.jsonl.
        score_points: source, its score, accuracy of a student of this source alone (a fraction).
        versions: of kd and of what can change bits.
        notes: what a reader must know to read the numbers right, one line each.
    """

    title: str
    intro: str = ""
    commands: Sequence[tuple[str, str, float]] = ()
    ranking: Ranking | None = None
    rows: Sequence[ReportRow] = ()
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    score_points: Sequence[tuple[str, float, float]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
