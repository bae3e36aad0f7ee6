"""Charts of rankings, accuracies and training, drawn with matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from kdcli.plotting import Look, figure_of, log_sizes
from kdcli.reporting.document import Chart, Mark
from kdcli.reporting.drawing import NARROW, WIDE
from kdcli.reporting.markup import clean
from kdcli.reporting.style import SERIES
from kdcli.types import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_NAME = 30


def ranking_bars(ranking: Ranking, name: str = "ranking", title: str = "") -> Chart:
    """Scores and weights of the sources, best first."""
    names = [short(source.name) for source in ranking.sources]
    scores = [source.score for source in ranking.sources]
    weights = [source.weight for source in ranking.sources]
    places = range(len(names))

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 0.75 + 0.3 * len(names))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for axes, values, color, head in (
            (left, scores, look.series[0], f"{ranking.metric.upper()} score"),
            (right, weights, look.series[5], "weight"),
        ):
            axes.barh(places, finite(values), height=0.62, color=color)
            axes.set_title(head, color=look.soft, fontsize=9.5)
            axes.axvline(0, color=look.line, linewidth=1)
            low, high = _span([0.0, *values])
            room = 0.16 * (high - low)
            axes.set_xlim(low - (2 * room if low < 0 else 0), high + room)
            for place, value in zip(places, values, strict=True):
                _value_beside(axes, value, place)
            axes.spines[:].set_visible(False)
            axes.set_xticks([])
        left.set_yticks(places, names)
        left.tick_params(axis="y", labelcolor=look.ink, labelsize=10)
        left.set_ylim(len(names) - 0.5, -0.5)
        right.tick_params(axis="y", labelleft=False)
        return figure

    label = f"Ranking of {len(names)} sources by {ranking.metric.upper()}: scores and weights"
    return Chart(name, label, draw, _ranking_caption(ranking), title=title)


def _ranking_caption(ranking: Ranking) -> str:
    what = "teachers' features" if ranking.on == "features" else "teachers' softmax outputs"
    size = ranking.probe.get("size")
    probe = f", on {size} probe images" if size is not None else ""
    scheme = ranking.weighting.get("scheme")
    weights = f" by the scheme {scheme}" if scheme else " that distill-weighted gives each source"
    return f"{ranking.metric.upper()} of the {what} with the labels of the task{probe}; beside it the weight{weights}."


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A student's accuracy on the test set, and the ends of its 95 % interval if it is known; fractions."""

    name: str
    accuracy: float
    interval: tuple[float, float] | None = None


def accuracies(rows: Sequence[Reached], name: str = "accuracies") -> Chart:
    """Test accuracy of each student, in the table's order."""

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 0.75 + 0.34 * len(rows))
        axes = figure.subplots()
        for place, row in enumerate(rows):
            if row.interval is not None:
                ends = [100 * end for end in row.interval]
                axes.plot(ends, [place] * 2, color=look.series[0], linewidth=1.4)
            axes.plot(100 * row.accuracy, place, "o", color=look.series[0], markersize=6.5)
        _named_rows(axes, look, [row.name for row in rows])
        return figure

    intervals = ", 95 % interval" if any(row.interval for row in rows) else ""
    legend = (Mark(f"test accuracy{intervals}", 0, "o"),)
    return Chart(name, f"Accuracy of {len(rows)} students", draw, legend=legend)


@final
@dataclass(frozen=True, slots=True)
class Spread:
    """Values that belong together, with their mean; ``half`` is the half-width of its interval, if there is one."""

    name: str
    values: tuple[float, ...]
    mean: float
    half: float | None = None


def spreads(groups: Sequence[Spread], name: str, title: str, single: str, mean: str) -> Chart:
    """Accuracies of several groups: each value, and the mean with its interval.

    Args:
        groups: in order; fractions.
        name: of the chart.
        title: above it.
        single: what one value is, for the legend.
        mean: what the mean is.
    """

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 0.75 + 0.34 * len(groups))
        axes = figure.subplots()
        aside = 0.13 if any(group.values for group in groups) else 0.0
        for place, group in enumerate(groups):
            percents = [100 * value for value in group.values]
            axes.plot(percents, [place - aside] * len(percents), "o", color=look.series[5], markersize=4)
            center = 100 * group.mean
            if group.half is not None:
                ends = [center - 100 * group.half, center + 100 * group.half]
                axes.plot(ends, [place + aside] * 2, color=look.series[0], linewidth=1.4)
            axes.plot(center, place + aside, "D", color=look.series[0], markersize=5.5)
        _named_rows(axes, look, [group.name for group in groups])
        return figure

    several = any(group.values for group in groups)
    marks = (*((Mark(single, 5, "o"),) if several else ()), Mark(mean, 0, "s"))
    return Chart(name, f"Accuracy of {len(groups)} groups", draw, legend=marks, title=title)


def score_scatter(points: Sequence[tuple[str, float, float]], metric: str, name: str = "scatter") -> Chart:
    """Score against accuracy, one named point per source, and how well the one predicts the other."""

    def draw(look: Look) -> "Figure":
        figure = figure_of(NARROW, 3.7)
        axes = figure.subplots()
        scores = [score for _, score, _ in points]
        percents = [100 * accuracy for _, _, accuracy in points]
        axes.scatter(scores, percents, s=46, color=look.series[0], linewidth=0, zorder=3)
        axes.set_xlabel(f"{metric} score")
        axes.set_ylabel("accuracy, %")
        axes.margins(x=0.12, y=0.15)
        open_axes(axes)
        axes.grid(axis="x")
        named = [(short(each), x, y) for (each, _, _), x, y in zip(points, scores, percents, strict=True)]
        place_names(figure, axes, named)
        return figure

    caption = "Each point is a source: its score, and the accuracy of a student of this source alone."
    if (rho := _rank_correlation(points)) is not None:
        caption += f" Rank correlation {rho:.2f}".replace("-", "−") + f" over {len(points)} sources."
    return Chart(name, f"Score against accuracy for {len(points)} sources", draw, caption)


def _rank_correlation(points: Sequence[tuple[str, float, float]]) -> float | None:
    """Spearman's; None where one side is constant, or for fewer than three points."""
    from scipy.stats import spearmanr

    scores = [score for _, score, _ in points]
    reached = [accuracy for _, _, accuracy in points]
    if len(points) < 3 or len(set(scores)) == 1 or len(set(reached)) == 1:
        return None
    return float(spearmanr(scores, reached).statistic)


@final
@dataclass(frozen=True, slots=True)
class Costed:
    """A model, its accuracy (a fraction), its size, and the multiply-adds of one forward."""

    name: str
    group: str
    accuracy: float
    parameters: int | None
    operations: int | None


def accuracy_against_cost(models: Sequence[Costed], name: str, title: str = "") -> Chart | None:
    """P2's Fig. 5: accuracy against what one forward costs, and against the size; None where neither is known."""
    by_operations = [(model, model.operations) for model in models if model.operations]
    by_parameters = [(model, model.parameters) for model in models if model.parameters]
    both = (
        ("multiply-adds of a forward, millions", by_operations),
        ("parameters, millions", by_parameters),
    )
    panels = [panel for panel in both if len({value for _, value in panel[1]}) > 1]
    if not panels:
        return None
    groups = list(dict.fromkeys(model.group for model in models))

    def draw(look: Look) -> "Figure":
        figure = figure_of(WIDE if len(panels) > 1 else NARROW, 3.9)
        axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for place, (axes, (head, known)) in enumerate(zip(axes_of, panels, strict=True)):
            axes.set_xscale("log")
            for model, value in known:
                color = look.color(groups.index(model.group))
                axes.plot(value / 1e6, 100 * model.accuracy, "o", color=color, markersize=6.5)
            log_sizes(axes.xaxis)
            axes.set_xlabel(head)
            if place == 0:
                axes.set_ylabel("accuracy, %")
            axes.margins(x=0.14, y=0.12)
            open_axes(axes)
            axes.grid(axis="x")
            named = {(model.name, value / 1e6): 100 * model.accuracy for model, value in known}
            place_names(figure, axes, [(short(each), x, y) for (each, x), y in named.items()])
        return figure

    marks = tuple(Mark(group, place % SERIES, "o") for place, group in enumerate(groups))
    return Chart(name, f"Accuracy against cost of {len(models)} models", draw,
                 legend=marks if len(groups) > 1 else (), title=title)  # fmt: skip


# --- pieces -----------------------------------------------------------------------------------


def finite(values: Sequence[Any]) -> list[float]:
    """Numbers to draw; what is none leaves a gap."""
    return [
        float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
        for value in values
    ]


def _span(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low, low + 1)


def short(name: str) -> str:
    """A name that fits beside a chart."""
    name = " ".join(clean(name).split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def shape_of(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels, three in a row at the most."""
    columns = min(3, count)
    return math.ceil(count / columns), columns


def panels_of(figure: "Figure", count: int) -> "list[Axes]":
    """So many panels, in rows of three at the most."""
    grid = figure.subplots(*shape_of(count), squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    return list(grid.flat[:count])


def open_axes(axes: "Axes") -> None:
    """No frame, and lines to read values by."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")


def _named_rows(axes: "Axes", look: Look, names: Sequence[str]) -> None:
    """Rows from top to bottom, over an axis of accuracies."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.tick_params(axis="y", labelcolor=look.ink, labelsize=10)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlabel("accuracy, %")
    axes.spines[:].set_visible(False)
    axes.grid(axis="x")
    for place in range(len(names)):
        axes.axhline(place, color=look.line, linewidth=0.5, zorder=0)


def _value_beside(axes: "Axes", value: float, place: int) -> None:
    """The number at the end of a bar; a missing one at its root."""
    known = math.isfinite(value)
    below = known and value < 0
    axes.annotate(
        f"{value:.3f}".replace("-", "−") if known else "–", (value if known else 0.0, place),
        (-4 if below else 4, 0), textcoords="offset points", va="center_baseline",
        ha="right" if below else "left", fontsize=9.5,
    )  # fmt: skip


def place_names(figure: "Figure", axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point where it covers no other name and no point."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    dots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken: list[Any] = []
    sides = (((7, 0), "left", "center"), ((-7, 0), "right", "center"), ((0, 8), "center", "bottom"),
             ((0, -8), "center", "top"), ((6, 7), "left", "bottom"), ((6, -7), "left", "top"),
             ((-6, 7), "right", "bottom"), ((-6, -7), "right", "top"))  # fmt: skip
    for name, x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        for offset, horizontal, vertical in sides:
            text = axes.annotate(
                name, (x, y), offset, textcoords="offset points", ha=horizontal, va=vertical, fontsize=9.5
            )
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken) and not any(
                box.contains(*dot) for dot in dots
            )
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if free and inside:
                taken.append(box)
                break
            text.remove()
        else:  # too crowded: the name stays, over another
            axes.annotate(name, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=9.5)
