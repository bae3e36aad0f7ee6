"""P2's figures from one's own students: Fig. 1 (schemes), 3 (accuracies), 4 (scores), 6 (power), as SVG and PNG."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.console import console
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
    short,
    write_drawings,
)
from kdcli.ranking.evidence import Evidence, Target
from kdcli.ranking.students import LABELS_ONLY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {
    "nearest": (">", GREEN),
    "equal": ("<", GRAY),
    "weighted(1)": ("v", BLUE),
    "weighted(12)": ("^", ORANGE),
}
_LONGEST_NAME = 24


def write_plots(evidence: Evidence, folder: Path) -> list[Path]:
    """Write the figures that the evidence is enough for; say which are left out and why.

    Returns:
        The files, an SVG and a PNG of each figure.

    Raises:
        StorageError, NoSpaceError: a file cannot be written.
    """
    drawings: dict[str, Callable[[Evidence], Figure | None]] = {
        "fig1-schemes": schemes_figure,
        "fig3-accuracies": accuracies_figure,
        "fig4-scores": scores_figure,
        "fig6-power": power_figure,
    }
    return write_drawings(drawings, evidence, folder)


# --- the figures ------------------------------------------------------------------------------


def schemes_figure(evidence: Evidence) -> "Figure | None":
    """P2 Fig. 1: accuracy of each weighting scheme, averaged over the targets."""
    values = {name: 100 * _mean(per.values()) for name, per in evidence.schemes().items()}
    if len(values) < 2:
        console.note("no fig1-schemes: fewer than two schemes have students on every target")
        return None
    order = sorted(values, key=values.__getitem__)
    figure = figure_of(6.4, 0.8 + 0.34 * len(order))
    axes = figure.subplots()
    ours = ("nearest", "weighted")
    colors = [ORANGE if name.startswith(ours) else INK if name == LABELS_ONLY else GRAY for name in order]
    for place, (name, color) in enumerate(zip(order, colors, strict=True)):
        axes.plot(values[name], place, "o", color=color, markersize=8)
        axes.annotate(
            f"{values[name]:.1f}", (values[name], place), (8, 0), textcoords="offset points",
            va="center_baseline",
        )  # fmt: skip
    axes.margins(x=0.12)
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", labelcolor=INK)
    count = len(evidence.targets)
    axes.set_xlabel(f"test accuracy, %, mean over {count} targets" if count > 1 else "test accuracy, %")
    for place in range(len(order)):
        axes.axhline(place, color=LINE, linewidth=0.5, zorder=0)
    axes.grid(axis="x")
    return figure


def accuracies_figure(evidence: Evidence) -> "Figure":
    """P2 Fig. 3: the student of each single source, coloured by score, beside the students of schemes."""
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    targets = evidence.targets
    figure = figure_of(max(7.4, 2.2 + 1.25 * len(targets)), 4.4)
    axes = figure.subplots()
    shade = mpl.colormaps["plasma_r"]
    for place, target in enumerate(targets):
        scores, accuracies = target.pairs(evidence.column) or ([], [])
        low, high = min(scores), max(scores)
        shares = [(score - low) / ((high - low) or 1) for score in scores]
        colors = [shade(0.1 + 0.9 * share) for share in shares]
        xs = [place + 0.16 * jitter(index) for index in range(len(scores))]
        axes.scatter(xs, [100 * value for value in accuracies], s=34, c=colors, linewidth=0, zorder=3)
        baseline = target.schemes.get(LABELS_ONLY)
        if baseline is not None:
            axes.hlines(100 * baseline, place - 0.4, place + 0.4, color=INK, linewidth=1.6, zorder=2)
        for number, (scheme, (marker, color)) in enumerate(_MARKS.items()):
            if scheme in target.schemes:
                x = place + 0.24 + 0.06 * number
                axes.plot(x, 100 * target.schemes[scheme], marker, color=color, markersize=7, zorder=4)
    axes.set_xticks(
        range(len(targets)),
        [f"{short(target.name, _LONGEST_NAME)}\n({_correlation(evidence, target)})" for target in targets],
    )
    axes.tick_params(axis="x", labelcolor=INK)
    axes.set_xlim(-0.55, len(targets) - 0.35)
    axes.set_ylabel("test accuracy, %")
    axes.margins(y=0.08)
    axes.grid(axis="y")
    bar = figure.colorbar(mpl.cm.ScalarMappable(cmap=shade.resampled(256)), ax=axes, fraction=0.03, pad=0.02)
    bar.set_ticks([0, 1], labels=["least", "most"])
    bar.set_label(f"{evidence.column} of the source")
    bar.outline.set_visible(False)
    shown = {scheme for target in targets for scheme in target.schemes}
    handles = [
        Line2D([], [], color=GRAY, marker="o", linestyle="", label="one source"),
        *([Line2D([], [], color=INK, linewidth=1.6, label=LABELS_ONLY)] if LABELS_ONLY in shown else []),
        *(
            Line2D([], [], color=color, marker=marker, linestyle="", markersize=7, label=scheme)
            for scheme, (marker, color) in _MARKS.items()
            if scheme in shown
        ),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9,
                  handletextpad=0.4, columnspacing=1.2)  # fmt: skip
    figure.supxlabel("in parentheses: Spearman correlation of score and accuracy", fontsize=9, color=SOFT)
    return figure


def scores_figure(evidence: Evidence) -> "Figure":
    """P2 Fig. 4: score of each source against the accuracy of its student, a panel per target."""
    targets = evidence.targets
    lines = math.ceil(len(targets) / 4)
    columns = math.ceil(len(targets) / lines)
    figure = figure_of(max(5.6, 2.7 * columns), 0.6 + (2.5 if len(targets) > 1 else 3.0) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(targets) :]:
        axes.remove()
    for axes, target in zip(panels.flat, targets, strict=False):
        scores, accuracies = target.pairs(evidence.column) or ([], [])
        percents = [100 * value for value in accuracies]
        axes.scatter(scores, percents, s=34, color=BLUE, linewidth=0, zorder=3)
        axes.set_title(f"{short(target.name, _LONGEST_NAME)}   ({_correlation(evidence, target)})", color=INK)
        axes.margins(x=0.1, y=0.12)
        axes.grid()
    figure.supxlabel(
        f"{evidence.column} score of a source (in parentheses: Spearman correlation)",
        color=SOFT,
        fontsize=10,
    )
    figure.supylabel("test accuracy of its student, %", color=SOFT, fontsize=10)
    return figure


def power_figure(evidence: Evidence) -> "Figure | None":
    """P2 Fig. 6: improvement over labels only by the power p; 0 is equal, inf is nearest."""
    known = [
        target for target in evidence.targets if LABELS_ONLY in target.schemes and len(target.powers) > 1
    ]
    if not known:
        console.note("no fig6-power: no target has a labels-only student and students of two powers p")
        return None
    powers = sorted({power for target in known for power in target.powers})
    gains = {
        power: [100 * (t.powers[power] - t.schemes[LABELS_ONLY]) for t in known if power in t.powers]
        for power in powers
    }
    whole = [power for power in powers if len(gains[power]) == len(known)]
    figure = figure_of(6.0, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color=SOFT, linewidth=1)
    for place, power in enumerate(powers):
        axes.plot([place - 0.14] * len(gains[power]), gains[power], "o", color=GRAY, markersize=5, alpha=0.8)
    places = [powers.index(power) for power in whole]
    axes.plot(
        places, [_mean(gains[power]) for power in whole], "o-", color=ORANGE, markersize=8, linewidth=1.6
    )
    axes.set_xticks(range(len(powers)), ["∞" if math.isinf(power) else f"{power:g}" for power in powers])
    axes.set_xlim(-0.5, len(powers) - 0.5)
    axes.set_xlabel("power p (0: equal, ∞: nearest)")
    axes.set_ylabel("gain over labels only, points")
    axes.grid(axis="y")
    _legend_of_power(figure, len(known))
    return figure


# --- pieces -----------------------------------------------------------------------------------


def _legend_of_power(figure: "Figure", targets: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GRAY, marker="o", linestyle="", markersize=5, label="a target"),
        Line2D([], [], color=ORANGE, marker="o", linewidth=1.6, markersize=8, label=f"mean of {targets}"),
    ]
    figure.legend(handles=handles[: 2 if targets > 1 else 1], loc="outside upper left", ncols=2, frameon=False,
                  fontsize=9)  # fmt: skip


def _correlation(evidence: Evidence, target: Target) -> str:
    value = evidence.grid[evidence.column][target.name]["spearman"].value
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _mean(values: Any) -> float:
    known = list(values)
    return float(sum(known) / len(known))
