"""Charts of what goes on in steps: the stages of a sequence, and the epochs of joint teachers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from kdcli.plotting import Look, figure_of
from kdcli.reporting.charts import finite, open_axes, panels_of, shape_of, short
from kdcli.reporting.curves import epoch_axis, epoch_numbers
from kdcli.reporting.document import Chart, Mark
from kdcli.reporting.drawing import NARROW, WIDE
from kdcli.reporting.style import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARENT = (2.0, 1.6)
"""Dashes of a parent's accuracy."""


@final
@dataclass(frozen=True, slots=True)
class Stages:
    """One sequence: fractions, None where they are not known.

    Attributes:
        name: of the student.
        teachers: in their order.
        top1: of the student before all stages, then after each.
        taught_by: top-1 of each teacher.
        gain: of each stage, against the student before all stages.
        loss: likewise.
    """

    name: str
    teachers: tuple[str, ...]
    top1: tuple[float | None, ...]
    taught_by: tuple[float | None, ...]
    gain: tuple[float | None, ...]
    loss: tuple[float | None, ...]


def stages_chart(sequences: Sequence[Stages], name: str) -> Chart:
    """Knowledge gained and lost, and accuracies, stage by stage; a row of panels for each sequence."""

    def draw(look: Look) -> "Figure":
        figure = figure_of(WIDE, 0.4 + 2.45 * len(sequences))
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.09)
        panels = figure.subplots(len(sequences), 2, squeeze=False)
        for (left, right), stages in zip(panels, sequences, strict=True):
            numbers = range(1, len(stages.teachers) + 1)
            _line(left, look, numbers, stages.gain, 0, -1)
            _line(left, look, numbers, stages.loss, 1, -1)
            left.set_ylabel("gained and lost, %")
            left.set_title(short(stages.name), color=look.ink)
            left.set_ylim(bottom=0)
            _line(right, look, range(len(stages.top1)), stages.top1, 2, 0)
            right.plot(numbers, _percents(stages.taught_by), "s", color=look.series[3], markersize=5.5)
            right.set_ylabel("accuracy, %")
            for axes in (left, right):
                _stage_axis(axes, stages.teachers)
        return figure

    marks = (
        Mark("knowledge gained of the stage's teacher", 0, "o"), Mark("own knowledge lost", 1, "o"),
        Mark("student's accuracy", 2, "o"), Mark("teacher's accuracy", 3, "s"),
    )  # fmt: skip
    caption = "Stage by stage, against the student before all stages (P3 Fig. 11)."
    return Chart(
        name, f"Gain, loss and accuracy by stage of {len(sequences)} sequences", draw, caption, marks
    )


def _line(
    axes: "Axes", look: Look, places: Sequence[int], values: Sequence[float | None], color: int, least: int
) -> None:
    """Values with their numbers; one that is unknown leaves a gap."""
    percents = _percents(values)
    axes.plot(places, percents, "-o", color=look.series[color], linewidth=1.6, markersize=5)
    for place, value in zip(places, percents, strict=True):
        if math.isfinite(value) and place >= least:
            axes.annotate(
                f"{value:.1f}", (place, value), (0, 6), textcoords="offset points", ha="center", fontsize=8.5
            )


def _stage_axis(axes: "Axes", teachers: Sequence[str]) -> None:
    labels = ["start", *(short(teacher) for teacher in teachers)]
    crowded = len(labels) * max(map(len, labels)) > 56
    turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(labels)), labels, **turned)
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.margins(y=0.2)
    open_axes(axes)


def _percents(values: Sequence[float | None]) -> list[float]:
    return [100 * value for value in finite(values)]


def joint_curves(
    histories: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    parents: Mapping[str, float],
    name: str,
    what: str,
) -> Chart:
    """Accuracy of joint teachers over the epochs, a panel per data set.

    Args:
        histories: by data set and joint teacher; ``what/DATA_SET`` of an epoch is the accuracy.
        parents: the best parent's accuracy, by data set, where it is known; a fraction.
        name: of the chart.
        what: name of the accuracy, ``test_top1`` or ``val_top1``.
    """
    joints = list(dict.fromkeys(joint for each in histories.values() for joint in each))
    lines, columns = shape_of(len(histories))

    def draw(look: Look) -> "Figure":
        figure = figure_of(WIDE if columns > 1 else NARROW, 0.4 + 2.4 * lines)
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
        panels = panels_of(figure, len(histories))
        for axes, (data_set, known) in zip(panels, histories.items(), strict=True):
            for joint, epochs in known.items():
                values = _percents([epoch.get(f"{what}/{data_set}") for epoch in epochs])
                marker = "o" if len(epochs) == 1 else None
                color = look.color(joints.index(joint) % SERIES)
                axes.plot(epoch_numbers(epochs), values, color=color, linewidth=1.6, marker=marker)
            if data_set in parents:
                axes.axhline(100 * parents[data_set], color=look.ink, linewidth=1.2, dashes=_PARENT)
            axes.set_title(short(data_set), color=look.ink)
            epoch_axis(axes)
        panels[0].set_ylabel("accuracy, %")
        return figure

    marks = [Mark(short(joint), place % SERIES) for place, joint in enumerate(joints)]
    if parents:
        marks.append(Mark("best parent", "ink", dashes=_PARENT, width=1.4))
    shown = "test" if what == "test_top1" else "validation"
    caption = f"Top-1 {shown} accuracy of each head over the epochs, by data set."
    return Chart(
        name, f"Accuracy of {len(joints)} joint teachers over the epochs", draw, caption, tuple(marks)
    )
