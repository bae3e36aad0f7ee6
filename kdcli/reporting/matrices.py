"""Charts with a cell or a point per pair or image: flips, confusion, classes, t-SNE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.plotting import MARKS, Look, figure_of
from kdcli.reporting.charts import panels_of, shape_of, short
from kdcli.reporting.document import Chart, Mark
from kdcli.reporting.drawing import NARROW, WIDE
from kdcli.reporting.style import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = Float[np.ndarray, "r c"]
MOST_NAMED = 32
"""Classes whose names fit beside a matrix."""
_MOST_NAMED_BESIDE = 12  # beside one of several


def heat(axes: "Axes", values: Matrix, color: str) -> None:
    """Cells whose colour is as strong as their value, of 0 to the largest; what is 0 or unknown stays empty."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    peak = float(np.nanmax(values, initial=0.0)) or 1.0
    cells, colors = [], []
    for row, column in np.argwhere(np.nan_to_num(values) > 0):
        x, y = column - 0.5, row - 0.5
        cells.append([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)])
        colors.append((*to_rgb(color), float(values[row, column]) / peak))
    axes.add_collection(PolyCollection(cells, facecolors=colors, edgecolors="none"))
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(True)
    axes.set_xticks([])
    axes.set_yticks([])


def flips_chart(names: Sequence[str], shares: Matrix, name: str, caption: str) -> Chart:
    """What each teacher (row) knows that each student (column) does not, percent."""

    def draw(look: Look) -> "Figure":
        side = min(NARROW, 2.2 + 0.62 * len(names))
        figure = figure_of(side + 1.2, side)
        axes = figure.subplots()
        heat(axes, shares, look.series[0])
        for row, column in np.argwhere(np.isfinite(shares)):
            axes.text(
                column, row, f"{shares[row, column]:.1f}", ha="center", va="center_baseline", fontsize=9
            )
        labels = [short(each) for each in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.tick_params(labelcolor=look.ink)
        axes.set_ylabel("teacher")
        axes.set_xlabel("student")
        return figure

    return Chart(
        name,
        f"Positive flips between {len(names)} models",
        draw,
        caption,
        title="What each knows that each other does not",
    )


def confusion_chart(matrices: Mapping[str, Matrix], classes: Sequence[str], name: str, caption: str) -> Chart:
    """Share of the images of each true class (row) by predicted class (column), a panel per model."""
    lines, columns = shape_of(len(matrices))
    most = MOST_NAMED if len(matrices) == 1 else _MOST_NAMED_BESIDE
    named = len(classes) <= most

    def draw(look: Look) -> "Figure":
        width = NARROW if columns == 1 else WIDE
        figure = figure_of(width, 0.3 + lines * (width / columns + 0.25))
        for axes, (model, matrix) in zip(panels_of(figure, len(matrices)), matrices.items(), strict=True):
            heat(axes, matrix, look.series[0])
            axes.set_title(short(model), color=look.ink)
            axes.set_ylabel("true class")
            axes.set_xlabel("predicted class")
            if named:
                labels = [short(each) for each in classes]
                axes.set_yticks(range(len(classes)), labels)
                axes.set_xticks(range(len(classes)), labels, rotation=90)
        return figure

    return Chart(name, f"Confusion of {len(classes)} classes by {len(matrices)} models", draw, caption)


def class_gains(gains: Sequence[tuple[str, float]], name: str, title: str, caption: str) -> Chart:
    """Change of the accuracy of each class, points, in the order given."""

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 0.75 + 0.24 * len(gains))
        axes = figure.subplots()
        values = [value for _, value in gains]
        colors = [look.series[0] if value >= 0 else look.series[1] for value in values]
        axes.barh(range(len(gains)), values, height=0.66, color=colors)
        axes.axvline(0, color=look.soft, linewidth=1)
        axes.set_yticks(range(len(gains)), [short(each) for each, _ in gains])
        axes.tick_params(axis="y", labelcolor=look.ink)
        axes.set_ylim(len(gains) - 0.4, -0.6)
        axes.set_xlabel("change of accuracy, points")
        axes.spines[:].set_visible(False)
        axes.grid(axis="x")
        return figure

    return Chart(name, f"Change of accuracy of {len(gains)} classes", draw, caption, title=title)


@final
@dataclass(frozen=True, slots=True)
class Changes:
    """By how much the accuracy of each class changes with a representation, points, descending; two or more."""

    name: str
    classes: tuple[str, ...]
    points: tuple[float, ...]


def class_changes(changes: Sequence[Changes], name: str, title: str, caption: str) -> Chart:
    """A row of dots per representation, one for each class, beside each other where they would be over each other."""

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 0.75 + 0.85 * len(changes))
        axes = figure.subplots()
        axes.axvline(0, color=look.soft, linewidth=1)
        axes.set_yticks(range(len(changes)), [short(each.name) for each in changes])
        axes.tick_params(axis="y", labelcolor=look.ink)
        axes.set_ylim(len(changes) - 0.4, -0.6)
        axes.set_xlabel("change of accuracy of a class, points")
        axes.spines[:].set_visible(False)
        axes.grid(axis="x")
        for place, each in enumerate(changes):
            heights = place + side_by_side(np.asarray(each.points))
            axes.plot(
                each.points, heights, "o", color=look.series[0], markersize=4, alpha=0.75, markeredgewidth=0
            )
            axes.plot(float(np.mean(each.points)), place + 0.36, "D", color=look.series[1], markersize=5)
            for end, aside, side in ((0, 7, "left"), (-1, -7, "right")):
                axes.annotate(
                    short(each.classes[end]), (each.points[end], heights[end]), (aside, 0),
                    textcoords="offset points", ha=side, va="center_baseline", fontsize=9.5,
                )  # fmt: skip
        axes.margins(x=0.16)
        return figure

    count = max(len(each.classes) for each in changes)
    marks = (Mark("a class", 0, "o"), Mark("mean of the classes", 1, "s"))
    label = f"Change of accuracy of {count} classes with {len(changes)} representations"
    return Chart(name, label, draw, caption, marks, title)


def side_by_side(values: Float[np.ndarray, " n"], room: float = 0.26) -> Float[np.ndarray, " n"]:
    """Heights, at most ``room`` from 0, that spread points which lie within an eightieth of the range."""
    heights = np.zeros(len(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return heights
    bins = np.floor(80 * (values - values.min()) / np.ptp(values)).astype(np.int64)
    step = min(0.09, 2 * room / max(np.bincount(bins).max() - 1, 1))
    for each in np.unique(bins):
        inside = np.flatnonzero(bins == each)
        heights[inside] = step * (np.arange(len(inside)) - (len(inside) - 1) / 2)
    return heights


def embedding_chart(
    places: Mapping[str, Float[np.ndarray, "n 2"]], labels: Int64[np.ndarray, " n"], names: Sequence[str],
    name: str, caption: str,
) -> Chart:  # fmt: skip
    """t-SNE of one set of images by several representations; a class is a colour and a marker."""
    lines, columns = shape_of(len(places))
    present = [int(each) for each in np.unique(labels)]
    looks = {
        each: (place % SERIES, MARKS[place // SERIES % len(MARKS)]) for place, each in enumerate(present)
    }

    def draw(look: Look) -> "Figure":
        width = NARROW if columns == 1 else WIDE
        figure = figure_of(width, 0.3 + lines * (width / columns + 0.1))
        for axes, (model, points) in zip(panels_of(figure, len(places)), places.items(), strict=True):
            for each, (number, marker) in looks.items():
                chosen = points[labels == each]
                axes.plot(chosen[:, 0], chosen[:, 1], marker, color=look.series[number], markersize=2.6,
                          linestyle="", alpha=0.8, markeredgewidth=0)  # fmt: skip
            axes.set_title(short(model), color=look.ink)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(True)
        return figure

    few = len(present) <= SERIES * 2
    marks = tuple(
        Mark(names[each], looks[each][0], "o" if looks[each][1] == "o" else "s") for each in present
    )
    return Chart(name, f"t-SNE of {len(labels)} images", draw, caption, marks if few else ())
