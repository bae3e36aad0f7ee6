"""P3's figures of transfers: rates by class (Fig. 5), gain against loss (7), students (8), stages (11)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcli.comparing.result import Change, CompareResult, Group
from kdcli.console import console
from kdcli.metrics.flips import TOP_SHARES
from kdcli.metrics.transfer_summary import grouped
from kdcli.models.properties import Family
from kdcli.plotting import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    LINE,
    ORANGE,
    SOFT,
    figure_of,
    jitter,
    legend,
    log_sizes,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 6
FAMILIES: dict[Family, tuple[str, str]] = {
    "cnn": (BLUE, "o"),
    "transformer": (ORANGE, "s"),
    "mlp": (GREEN, "^"),
    "unknown": (GRAY, "D"),
}
"""Colour and marker of each family of networks."""


def rates_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 5: transfer rate of the top-X % classes by family of the student, and by its size; a row a method."""
    methods = [m for m in result.methods if m.whole.gain.mean is not None][:_MOST_PANELS]
    if not methods:
        console.note("no fig5-rates: no transfer from a teacher with a positive flip")
        return None
    figure = figure_of(8.6, 0.4 + 2.7 * len(methods))
    rows = figure.subplots(len(methods), 2, squeeze=False, sharey=True)
    for (left, right), method in zip(rows, methods, strict=True):
        for family, group in method.by_family.items():
            color, mark = FAMILIES[family]
            known = [(place, _rate(group, x)) for place, x in enumerate(TOP_SHARES)]
            points = [(place, rate) for place, rate in known if rate is not None]
            left.plot([x for x, _ in points], [y for _, y in points], mark + "-", color=color, label=family)
        left.axhline(100 * (method.whole.gain.mean or 0), color=SOFT, linewidth=1, linestyle=":")
        left.set_xticks(range(len(TOP_SHARES)), [f"{x} %" for x in TOP_SHARES])
        left.set_title(short(method.method), color=INK)
        left.set_ylabel("transfer rate, %")
        for each in method.by_student:
            if each.parameters and (rate := _rate(each.group, 100)) is not None:
                color, mark = FAMILIES[each.family]
                right.plot(each.parameters / 1e6, rate, mark, color=color, markersize=7)
        right.set_xscale("log")
        log_sizes(right.xaxis)
        for axes in (left, right):
            axes.grid()
    legend(rows[0][0], loc="best", bbox_to_anchor=None)
    rows[-1][0].set_xlabel("classes with the top X % of positive flips\n(dotted: mean gain)")
    rows[-1][1].set_xlabel("parameters of the student, millions")
    return figure


def _rate(group: Group, percent: int) -> float | None:
    mean = group.rates[percent].mean
    return None if mean is None else 100 * mean


def gains_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 7: what was gained from the teacher against what was lost, in % of all images; a dot a pair.

    Of all images, not each of its own base, so that the diagonal is where gain and loss are equal; what
    both got wrong before is not in it.
    """
    taught = [change for change in result.changes if change.teachers and change.stage == 1]
    methods = list(grouped(taught, lambda change: change.method).items())[:_MOST_PANELS]
    if not methods:
        console.note("no fig7-gain-loss: no transfer from a teacher")
        return None
    columns = min(3, len(methods))
    lines = -(-len(methods) // columns)
    figure = figure_of(3.3 * columns + 1.5, 0.9 + 2.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(methods) :]:
        axes.remove()
    sizes = [result.models[change.student].parameters or 0 for change in taught]
    accuracies = [_teacher_accuracy(result, change) for change in taught]
    top = 1.08 * max([100 * max(c.counts.gained, c.counts.lost) / c.counts.images for c in taught] + [0.01])
    shade = _log_shade(sizes)
    for axes, (method, own) in zip(panels.flat, methods, strict=False):
        axes.plot([0, top], [0, top], color="#c0392b", linewidth=1, zorder=1)
        for change in own:
            _dot(axes, result, change, shade, accuracies)
        axes.set_title(short(method), color=INK)
        axes.set_xlim(-0.04 * top, top)
        axes.set_ylim(-0.04 * top, top)
        axes.set_aspect("equal")
        axes.grid()
    figure.supxlabel("knowledge lost, % of images", color=SOFT, fontsize=10)
    figure.supylabel("knowledge gained, % of images", color=SOFT, fontsize=10)
    bar = figure.colorbar(shade, ax=list(panels.flat[: len(methods)]), fraction=0.04, pad=0.02)
    log_sizes(bar.ax.yaxis)
    bar.set_label("parameters of the student, millions")
    bar.outline.set_visible(False)
    _families_legend(figure, {result.models[name].family for c in taught for name in c.teachers[:1]})
    return figure


def _dot(
    axes: "Axes", result: CompareResult, change: Change, shade: Any, accuracies: Sequence[float]
) -> None:
    """Colour: size of the student; marker: family of the teacher; area: how accurate that is."""
    low, high = min(accuracies), max(accuracies)
    better = (_teacher_accuracy(result, change) - low) / ((high - low) or 1)
    t = change.counts
    axes.scatter(
        [100 * t.lost / t.images],
        [100 * t.gained / t.images],
        s=28 + 70 * better,
        color=shade.to_rgba((result.models[change.student].parameters or 0) / 1e6),
        marker=FAMILIES[result.models[change.teachers[0]].family][1],
        linewidth=0.5,
        edgecolor="white",
        zorder=3,
    )


def _teacher_accuracy(result: CompareResult, change: Change) -> float:
    return max(result.models[name].accuracy for name in change.teachers)


def _log_shade(sizes: Sequence[int]) -> Any:
    import matplotlib as mpl

    known = [size / 1e6 for size in sizes if size] or [1.0]
    low, high = min(known), max(known)
    if high <= 1.05 * low:
        low, high = low / 1.5, high * 1.5
    return mpl.cm.ScalarMappable(mpl.colors.LogNorm(low, high), mpl.colormaps["viridis"])


def _families_legend(figure: "Figure", families: set[Family]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GRAY, marker=mark, linestyle="", label=f"{family} teacher")
        for family, (_, mark) in FAMILIES.items()
        if family in families
    ]
    handles.append(Line2D([], [], color="#c0392b", linewidth=1, label="gain = loss"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)


def students_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 8: mean Delta_transf of each student by its accuracy, size and family; of the best method.

    Students of one family are connected; P3 picks pairs that are alike in all but one property, which a
    small set of models does not offer.
    """
    several = [method for method in result.methods if len(method.by_student) > 1]
    if not several:
        console.note("no fig8-students: no method was tried on two students")
        return None
    best = max(several, key=lambda method: (method.whole.delta_transf.mean or 0.0, method.method))
    figure = figure_of(9.6, 3.4)
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 2])
    families = [family for family in FAMILIES if family in best.by_family]
    for family in families:
        color, mark = FAMILIES[family]
        own = [each for each in best.by_student if each.family == family]
        deltas = {each.student: 100 * (each.group.delta_transf.mean or 0) for each in own}
        accuracies = [(100 * each.accuracy, deltas[each.student]) for each in own]
        sizes = [(each.parameters / 1e6, deltas[each.student]) for each in own if each.parameters]
        for axes, dots in ((panels[0], sorted(accuracies)), (panels[1], sorted(sizes))):
            line = [x for x, _ in dots], [y for _, y in dots]
            axes.plot(*line, mark + "-", color=color, label=family, linewidth=1)
        xs = [families.index(family) + 0.12 * jitter(index) for index in range(len(own))]
        panels[2].plot(xs, list(deltas.values()), mark, color=color)
    for axes in panels:
        axes.axhline(0, color=SOFT, linewidth=1, zorder=0)
        axes.grid()
    panels[0].set_ylabel(f"mean Δ transf of {short(best.method)}, points")
    panels[0].set_xlabel("accuracy of the student, %")
    panels[1].set_xlabel("parameters of the student, millions")
    panels[1].set_xscale("log")
    log_sizes(panels[1].xaxis)
    panels[2].set_xticks(range(len(families)), families)
    panels[2].set_xlim(-0.5, len(families) - 0.5)
    panels[2].set_xlabel("family of the student")
    legend(panels[0])
    return figure


def stages_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 11: gain, loss and Delta_transf after each stage of a sequence of teachers; a panel a sequence."""
    going_on = {change.origin for change in result.changes}
    last = [change for change in result.changes if change.stage > 1 and change.after not in going_on]
    sequences = [_stages_up_to(change, result.changes) for change in last]
    if not sequences:
        console.note("no fig11-stages: no student was taught by one teacher after another")
        return None
    sequences = sequences[:_MOST_PANELS]
    figure = figure_of(1.0 + 3.6 * len(sequences), 3.8)
    panels = figure.subplots(1, len(sequences), squeeze=False)[0]
    for axes, stages in zip(panels, sequences, strict=True):
        places = range(len(stages) + 1)
        for label, color, mark, values in (
            ("gain, % of what the teachers so far could give", BLUE, "o", [s.gain for s in stages]),
            ("loss, % of what was right before", ORANGE, "s", [s.loss for s in stages]),
            ("Δ transf, points", INK, "D", [s.delta_transf for s in stages]),
        ):
            ys = [0.0, *(100 * (value or 0.0) for value in values)]
            axes.plot(places, ys, mark + "-", color=color, label=label)
        axes.axhline(0, color=LINE, linewidth=1, zorder=0)
        names = [short(stage.teachers[-1]) if stage.teachers else "-" for stage in stages]
        axes.set_xticks(places, ["start", *(f"after\n{name}" for name in names)])
        axes.set_title(f"{short(stages[0].student)}, {short(stages[0].method)}", color=INK)
        axes.grid(axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1, frameon=False, fontsize=9)
    return figure


def _stages_up_to(last: Change, changes: Sequence[Change]) -> list[Change]:
    """The stages of a sequence in order: each taught by all teachers of the one before, and by one more."""
    found = [last]
    while found[0].stage > 1:
        before = {change.after: change for change in changes}[found[0].origin]
        found.insert(0, before)
    return found
