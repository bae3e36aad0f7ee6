"""P3's figures of one's own models: Fig. 1, 2, 4, 5, 6, 7, 8 and 11, each as SVG and PNG."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.comparing.result import Change, CompareResult
from kdcli.console import console
from kdcli.methods.base import method_names
from kdcli.metrics.flips import TOP_SHARES
from kdcli.metrics.transfer_summary import grouped, success_rates
from kdcli.plotting import (
    BLUE,
    GRAY,
    INK,
    LINE,
    ORANGE,
    SOFT,
    color_of,
    figure_of,
    jitter,
    legend,
    mark_of,
    short,
    write_drawings,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CONTRASTIVE = "only_features"
"""Trait of the methods of P3's Fig. 6, which Fig. 4 does not show."""


def write_figures(result: CompareResult, folder: Path) -> list[Path]:
    """Write the figures that the comparison has data for; print which are left out and why.

    Returns:
        The files, an SVG and a PNG of each figure.

    Raises:
        StorageError, NoSpaceError: a file cannot be written.
    """
    from kdcli.comparing.transfers import gains_figure, rates_figure, stages_figure, students_figure

    drawings: dict[str, Callable[[CompareResult], Figure | None]] = {
        "fig1-complementary": complementary_figure,
        "fig2-classes": classes_figure,
        "fig4-success": success_figure,
        "fig5-rates": rates_figure,
        "fig6-contrastive": contrastive_figure,
        "fig7-gain-loss": gains_figure,
        "fig8-students": students_figure,
        "fig11-stages": stages_figure,
    }
    return write_drawings(drawings, result, folder)


# --- pairs ------------------------------------------------------------------------------------


def complementary_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 1: positive flips, and the entropy of their classes, by Delta_acc; a dot a pair."""
    if not result.pairs:
        console.note("no fig1-complementary: no pair of teacher and student")
        return None
    figure = figure_of(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    xs = [100 * pair.delta_acc for pair in result.pairs]
    left.plot(
        xs,
        [100 * p.independent_rho_pos for p in result.pairs],
        "_",
        color=GRAY,
        markersize=9,
        label="independent errors",
    )
    left.plot(
        xs, [100 * p.chance_rho_pos for p in result.pairs], "_", color=INK, markersize=9, label="guessing"
    )
    left.plot(xs, [100 * p.rho_pos for p in result.pairs], "o", color=BLUE, markersize=6, label="teacher")
    left.set_ylabel("ρ⁺: teacher right, student wrong, % of images")
    left.set_ylim(bottom=0)
    legend(left)
    known = [(100 * p.delta_acc, p.entropy) for p in result.pairs if p.entropy is not None]
    right.plot([x for x, _ in known], [y for _, y in known], "o", color=BLUE, markersize=6)
    ceiling = math.log(len(result.data["classes"]))
    right.axhline(ceiling, color=SOFT, linewidth=1)
    right.annotate(
        "evenly over all classes",
        (min(xs), ceiling),
        (0, -12),
        textcoords="offset points",
        color=SOFT,
        fontsize=9,
    )
    right.set_ylabel("entropy of ρ⁺ over classes, nats")
    right.set_ylim(0, 1.06 * ceiling)
    for axes in (left, right):
        _delta_axis(axes)
    return figure


def classes_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 2: positive flips per class for a weak, an equal and a strong teacher; closeness of the top classes."""
    flipped = [pair for pair in result.pairs if pair.positive]
    if not flipped:
        console.note("no fig2-classes: no pair has a positive flip")
        return None
    closer = {
        percent: [
            top.similarity_gain
            for pair in flipped
            for top in pair.top
            if top.percent == percent and top.similarity_gain is not None
        ]
        for percent in TOP_SHARES
    }
    shown = [percent for percent in TOP_SHARES if closer[percent]]
    figure = figure_of(9.6 if shown else 6.0, 3.6)
    panels = figure.subplots(1, 2, squeeze=False, width_ratios=[3, 2])[0] if shown else [figure.subplots()]
    by_strength = sorted(flipped, key=lambda pair: pair.delta_acc)
    equal = min(flipped, key=lambda pair: abs(pair.delta_acc))
    three = {"weak": (by_strength[0], ORANGE), "equal": (equal, GRAY), "strong": (by_strength[-1], BLUE)}
    sizes = result.data["class_sizes"]
    for label, (pair, color) in three.items():
        shares = sorted(
            (100 * count / size for count, size in zip(pair.per_class, sizes, strict=True) if size),
            reverse=True,
        )
        name = f"{label}: {short(pair.teacher)} → {short(pair.student)} ({100 * pair.delta_acc:+.1f})"
        panels[0].step(range(1, len(shares) + 1), shares, where="mid", color=color, linewidth=1.6, label=name)
    panels[0].set_xlabel("classes, by their share of positive flips")
    panels[0].set_ylabel("positive flips, % of the class")
    panels[0].set_ylim(bottom=0)
    panels[0].grid(axis="y")
    legend(panels[0])
    if shown:
        _closeness(panels[1], result, {percent: closer[percent] for percent in shown})
    return figure


def _closeness(axes: "Axes", result: CompareResult, closer: dict[int, list[float]]) -> None:
    axes.axhline(0, color=SOFT, linewidth=1)
    for place, (percent, values) in enumerate(closer.items()):
        xs = [place + 0.12 * jitter(index) for index in range(len(values))]
        axes.plot(xs, [100 * value for value in values], "o", color=GRAY, markersize=4, alpha=0.7)
        axes.plot(place, 100 * sum(values) / len(values), "o", color=ORANGE, markersize=8)
        axes.annotate(f"{percent} %", (place, 0), xycoords=("data", "axes fraction"), xytext=(0, -14),
                      textcoords="offset points", ha="center", color=SOFT)  # fmt: skip
    axes.set_xticks(range(len(closer)), [""] * len(closer))
    axes.set_xlim(-0.5, len(closer) - 0.5)
    axes.set_xlabel("classes with the top X % of positive flips", labelpad=14)
    about = result.similarity or {}
    axes.set_ylabel("similarity over that of all classes, %")
    title = f"{about.get('source')}" + ("\n(a substitute for P3's CLIP)" if about.get("substitute") else "")
    axes.set_title(title, fontsize=9, color=SOFT)
    axes.grid(axis="y")


# --- methods ----------------------------------------------------------------------------------


def success_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 4: success rate of each method, and Delta_transf by Delta_acc (best quarter of each bin)."""
    contrastive = method_names(_CONTRASTIVE)
    methods = [method for method in result.methods if method.method not in contrastive]
    if not methods:
        console.note("no fig4-success: no student was distilled")
        return None
    binned = [method for method in methods if method.bins]
    figure = figure_of(10.2, 3.4 if len(methods) < 7 else 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    _success(left, result, [method.method for method in methods])
    right.axhline(0, color=SOFT, linewidth=1)
    for number, method in enumerate(binned):
        points = [
            (50 * (each.low + each.high), 100 * each.top_mean)
            for each in method.bins
            if each.top_mean is not None
        ]
        right.plot([x for x, _ in points], [y for _, y in points], mark_of(number) + "-", color=color_of(number),
                   linewidth=1.6, markersize=6, label=method.method)  # fmt: skip
    _delta_axis(right)
    right.set_ylabel("Δ transf, points\n(mean of the best quarter of a bin)")
    if binned:
        legend(right)
    return figure


def contrastive_figure(result: CompareResult) -> "Figure | None":
    """P3 Fig. 6: success rates of contrastive distillation beside all other methods."""
    methods = [method.method for method in result.methods]
    contrastive = method_names(_CONTRASTIVE)
    if not set(methods) & set(contrastive):
        console.note(f"no fig6-contrastive: no student was distilled by {' or '.join(contrastive)}")
        return None
    figure = figure_of(5.6, 1.4 + 0.4 * len(methods))
    ordered = sorted(methods, key=lambda name: name not in contrastive)
    _success(figure.subplots(), result, ordered)
    return figure


def _success(axes: "Axes", result: CompareResult, methods: list[str]) -> None:
    """A row a method: the median over students as a bar, the students as dots."""
    own = grouped((c for c in result.changes if c.stage == 1), lambda change: change.method)
    medians = {method.method: method.success_rate_median for method in result.methods}
    for place, name in enumerate(reversed(methods)):
        rates = _rates_of(own[name])
        xs = [100 * rate for rate in rates.values()]
        axes.barh(place, 100 * medians[name], height=0.5, color=LINE, zorder=1)
        ys = [place + 0.16 * jitter(index) if len(xs) > 1 else place for index in range(len(xs))]
        axes.plot(xs, ys, "o", color=BLUE, markersize=5, zorder=3, alpha=0.8)
        axes.plot(
            [100 * medians[name]] * 2, [place - 0.25, place + 0.25], color=ORANGE, linewidth=2, zorder=2
        )
    axes.set_yticks(range(len(methods)), [short(name) for name in reversed(methods)])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("teachers with Δ transf > 0, % (dot: a student; line: median)")
    axes.grid(axis="x")


def _rates_of(changes: list[Change]) -> dict[str, float]:
    return success_rates([c.student for c in changes], [c.delta_transf for c in changes])


def _delta_axis(axes: "Axes") -> None:
    axes.axvline(0, color=LINE, linewidth=1, zorder=0)
    axes.set_xlabel("Δ acc: teacher less student, points")
    axes.grid()
