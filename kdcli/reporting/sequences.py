"""Sequences of a report: what each stage of ``--sequential`` gave and took (P3 Fig. 11)."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.reporting.cells import number, percent, points, word
from kdcli.reporting.document import Column, Columns, Notes, Part, Section, tabulate
from kdcli.reporting.material import Run
from kdcli.reporting.progress import Stages, stages_chart

MOST_SEQUENCES = 6
"""Sequences that are drawn; all are in the table."""
Stage = tuple[Run, Mapping[str, Any]]
_COLUMNS: Columns = {
    Column("Teacher", "name"): lambda row: word(row[1]["teacher"]),
    Column("Student", "text", setting=True): lambda row: word(row[0].name),
    Column("Stage"): lambda row: number(row[1]["stage"], 0),
    Column("Teacher's top-1, %"): lambda row: percent(row[1].get("teacher_top1")),
    Column("Student's top-1, %"): lambda row: percent(row[1]["top1"]),
    Column("Since the start, points"): lambda row: points(row[1].get("delta"), 2),
    Column("By this stage, points"): lambda row: points(row[1].get("delta_previous"), 2),
    Column("Gained, %"): lambda row: percent(row[1].get("gain")),
    Column("Lost, %"): lambda row: percent(row[1].get("loss")),
    Column("Gained by this stage, %"): lambda row: percent(row[1].get("gain_previous")),
    Column("Lost by this stage, %"): lambda row: percent(row[1].get("loss_previous")),
}
_NOTES = (
    "Gained: of the test images that the stage's teacher gets right and the student did not, the share it gets right "
    "now. Lost: of those that the student got right, the share it gets wrong now. Both against the student before all "
    "stages, and by this stage alone against the student of the stage before (P3 section 5.1 and Fig. 11).",
)
_UNKNOWN = (
    "A gain is known where a cache holds the teacher's outputs on the test images: add it to the run's command with "
    "--cache; the finished stages are measured again, not trained."
)


def sequences_section(runs: Sequence[Run]) -> Section | None:
    """The stages of each finished sequence that was tested; None without one."""
    tested = [run for run in runs if _stages(run)]
    if not tested:
        return None
    drawn = [_drawn(run) for run in tested[:MOST_SEQUENCES]]
    rows = [row for run in tested for row in _rows(run)]
    gains = [stage.get("gain") for run in tested for stage in _stages(run)]
    notes = _NOTES if all(gain is not None for gain in gains) else (*_NOTES, _UNKNOWN)
    parts: list[Part] = [
        stages_chart(drawn, "stages-chart"),
        tabulate("stages", rows, _COLUMNS, notes=notes),
    ]
    if len(tested) > MOST_SEQUENCES:
        parts.append(Notes((f"The chart shows {MOST_SEQUENCES} of {len(tested)} sequences.",)))
    return Section("Stages, one teacher after the other", tuple(parts))


def _stages(run: Run) -> list[Mapping[str, Any]]:
    """What was measured of each stage; nothing where nothing was tested."""
    stages = run.result.get("stages") or []
    return [stage for stage in stages if stage.get("top1") is not None]


def _start(run: Run) -> float | None:
    return (run.result.get("original") or {}).get("top1")


def _rows(run: Run) -> list[Stage]:
    before = {"teacher": "before all stages", "stage": 0, "top1": _start(run)}
    return [(run, stage) for stage in (before, *_stages(run))]


def _drawn(run: Run) -> Stages:
    stages = _stages(run)
    return Stages(
        name=run.name,
        teachers=tuple(stage["teacher"] for stage in stages),
        top1=(_start(run), *(stage["top1"] for stage in stages)),
        taught_by=tuple(stage.get("teacher_top1") for stage in stages),
        gain=tuple(stage.get("gain") for stage in stages),
        loss=tuple(stage.get("loss") for stage in stages),
    )
