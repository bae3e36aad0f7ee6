"""Sequences of a report: what each stage of ``--sequential`` gave and took (P3 Fig. 11)."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.reporting.document import Cell, Column, Notes, Part, Section, Table, number, percent, points, word
from kdcli.reporting.material import Run
from kdcli.reporting.progress import Stages, stages_chart

MOST_SEQUENCES = 6
"""Sequences that are drawn; all are in the table."""
_COLUMNS = (
    Column("Teacher", "name"),
    Column("Student", "text", setting=True),
    Column("Stage"),
    Column("Teacher's top-1, %"),
    Column("Student's top-1, %"),
    Column("Since the start, points"),
    Column("By this stage, points"),
    Column("Gained, %"),
    Column("Lost, %"),
    Column("Gained by this stage, %"),
    Column("Lost by this stage, %"),
)
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
    rows = tuple(row for run in tested for row in _rows(run))
    gains = [stage.get("gain") for run in tested for stage in _stages(run)]
    notes = _NOTES if all(gain is not None for gain in gains) else (*_NOTES, _UNKNOWN)
    parts: list[Part] = [
        stages_chart(drawn, "stages-chart"),
        Table("stages", _COLUMNS, rows, notes=notes).trimmed(),
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


def _rows(run: Run) -> list[tuple[Cell, ...]]:
    start = (
        Cell("before all stages", "before all stages"),
        word(run.name),
        number(0, 0),
        percent(None),
        percent(_start(run)),
        *(points(None) for _ in range(2)),
        *(percent(None) for _ in range(4)),
    )
    return [start, *(_row(run, stage) for stage in _stages(run))]


def _row(run: Run, stage: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (
        Cell(stage["teacher"], stage["teacher"]),
        word(run.name),
        number(stage["stage"], 0),
        percent(stage.get("teacher_top1")),
        percent(stage["top1"]),
        points(stage.get("delta"), 2),
        points(stage.get("delta_previous"), 2),
        *(percent(stage.get(key)) for key in ("gain", "loss", "gain_previous", "loss_previous")),
    )


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
