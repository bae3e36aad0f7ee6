"""Charts over the epochs of a training: losses with their parts, and accuracies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdcli.plotting import Look, figure_of
from kdcli.reporting.charts import finite, open_axes, panels_of, shape_of, short
from kdcli.reporting.document import Chart, Mark
from kdcli.reporting.drawing import NARROW, WIDE
from kdcli.reporting.style import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: tuple[tuple[float, ...], ...] = ((), (7, 2.2), (2, 1.6), (7, 2, 1.5, 2), (4, 2), (9, 2, 2, 2, 2, 2))
EPOCH_FACTS = frozenset({"epoch", "loss", "lr", "view", "steps", "images_per_second", "seconds", "stage"})
"""What an epoch's line in metrics.jsonl holds besides parts of the loss and accuracies."""
_FIDELITY = ("r2", "cos", "val_r2", "val_cos")
"""How near a student's predictions are to its teachers' outputs: no part of the loss."""
_HELD_OUT = "val_r2/"
_ACCURACIES = ("_top1", "_top5", "_accuracy", "_mAP", "_exact_match")


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "curves", caption: str = ""
) -> Chart:
    """The loss and its parts over the epochs, one panel per run."""
    chart = _panels(histories, lambda epochs: ["loss", *_parts(epochs)], name)
    return replace(chart, label=f"Loss over the epochs of {len(histories)} runs", caption=caption)


def fidelity_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Chart | None:
    """R2 of each teacher's outputs on held-out images by epoch, one panel per run that has it; None where none has."""
    known = {run: epochs for run, epochs in histories.items() if _held_out(epochs)}
    if not known:
        return None
    chart = _panels(known, _held_out, name)
    marks = tuple(replace(mark, text=mark.text.removeprefix(_HELD_OUT)) for mark in chart.legend)
    caption = "R2 of the teachers' outputs on held-out images; 1 is the teacher, 0 its mean."
    return replace(chart, label=f"R2 over the epochs of {len(known)} runs", caption=caption, legend=marks)


def _panels(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    keys_of: Callable[[Sequence[Mapping[str, Any]]], list[str]],
    name: str,
) -> Chart:
    """Values over the epochs, one panel per run; the loss stands out."""
    keys = list(dict.fromkeys(key for epochs in histories.values() for key in keys_of(epochs)))
    parts = [key for key in keys if key != "loss"]
    lines, columns = shape_of(len(histories))

    def draw(look: Look) -> "Figure":
        figure = figure_of(WIDE if columns == 3 else NARROW, 0.4 + 2.15 * lines)
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
        panels = panels_of(figure, len(histories))
        for place, (axes, (run, epochs)) in enumerate(zip(panels, histories.items(), strict=True)):
            marker = "o" if len(epochs) == 1 else None
            numbers = epoch_numbers(epochs)
            for key in keys_of(epochs):
                values = finite([epoch.get(key) for epoch in epochs])
                if key == "loss":
                    axes.plot(numbers, values, color=look.ink, linewidth=2.2, marker=marker)
                    continue
                number, dashes = _line(parts.index(key))
                axes.plot(numbers, values, color=look.series[number], dashes=dashes, linewidth=1.5,
                          marker=marker, markersize=3)  # fmt: skip
            axes.set_title(short(run), color=look.ink)
            epoch_axis(axes, "epoch" if place >= (lines - 1) * columns else "")
        return figure

    marks = [Mark("loss", "ink", width=2.4)] if "loss" in keys else []
    marks += [Mark(part, *_spread(index)) for index, part in enumerate(parts)]
    return Chart(name, name, draw, legend=tuple(marks))


def accuracy_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str, name: str) -> Chart:
    """An accuracy over the epochs, one line per run.

    Args:
        histories: of runs that have it.
        key: its name in an epoch's line.
        name: of the chart.
    """

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 3.6)
        axes = figure.subplots()
        for index, epochs in enumerate(histories.values()):
            number, dashes = _line(index)
            numbers = epoch_numbers(epochs)
            values = [100 * value for value in finite([epoch.get(key) for epoch in epochs])]
            marker = "o" if len(epochs) == 1 else None
            axes.plot(numbers, values, color=look.series[number], dashes=dashes, linewidth=1.6, marker=marker)
        axes.set_ylabel("mAP, %" if key.endswith("_mAP") else "accuracy, %")
        epoch_axis(axes)
        return figure

    marks = tuple(Mark(short(run), *_spread(index)) for index, run in enumerate(histories))
    return Chart(name, f"Accuracy over the epochs of {len(histories)} runs", draw, legend=marks)


# --- pieces ----------------------------------------------------------------------------------


def _parts(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the loss's parts in a history."""
    return [
        name
        for name in dict.fromkeys(name for epoch in epochs for name in epoch)
        if name not in EPOCH_FACTS
        and not name.partition("/")[0].endswith(_ACCURACIES)
        and name.partition("/")[0] not in _FIDELITY
        and not name.startswith("share/")  # of the images, that a teacher teaches (P3)
        and all(isinstance(epoch.get(name, 0.0), int | float) for epoch in epochs)
    ]


def _held_out(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the R2 of each output."""
    return list(dict.fromkeys(name for epoch in epochs for name in epoch if name.startswith(_HELD_OUT)))


def epoch_numbers(epochs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where each epoch stands; the stages of a sequence, which count from 1 each, one after the other."""
    if any("stage" in epoch for epoch in epochs):
        return list(range(1, len(epochs) + 1))
    return [epoch.get("epoch", place) for place, epoch in enumerate(epochs, 1)]


def _line(index: int) -> tuple[int, tuple[float, ...]]:
    """Colour and dashes of line number ``index``; every pair of both comes once in 36."""
    return index % SERIES, _DASHES[(index + index // SERIES) % len(_DASHES)]


def _spread(index: int) -> tuple[int, str, tuple[float, ...]]:
    """Legend entry of line number ``index``: colour, no marker, dashes."""
    number, dashes = _line(index)
    return number, "", dashes


def epoch_axis(axes: "Axes", title: str = "epoch") -> None:
    """Open axes over whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_axes(axes)
