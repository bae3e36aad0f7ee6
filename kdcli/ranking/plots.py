"""P2's figures from one's own students: Fig. 1 (schemes), 3 (accuracies), 4 (scores), 6 (power), as SVG and PNG."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.console import console
from kdcli.errors import MissingExtraError
from kdcli.ranking.evidence import Evidence, Target
from kdcli.ranking.students import LABELS_ONLY
from kdcli.runtime import storage_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _SOFT, _LINE = "#1c2024", "#5c646d", "#dfe3e7"
_BLUE, _ORANGE, _GREEN, _PURPLE, _GRAY = "#3180dc", "#dd6f00", "#27715f", "#86157b", "#97909a"
_SETTINGS: Any = {  # matplotlib's stubs want its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "kd",
    "text.parse_math": False,
    "font.size": 10.0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
}
_MARKS = {
    "nearest": (">", _GREEN),
    "equal": ("<", _GRAY),
    "weighted(1)": ("v", _BLUE),
    "weighted(12)": ("^", _ORANGE),
}
_LONGEST_NAME = 24


def require_matplotlib() -> None:
    """Refuse ``--plot`` before anything is computed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "--plot needs the package matplotlib, which is not installed", "pip install 'kdcli[report]'"
        ) from error


def write_plots(evidence: Evidence, folder: Path) -> list[Path]:
    """Write the figures that the evidence is enough for; say which are left out and why.

    Returns:
        The files, an SVG and a PNG of each figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError, NoSpaceError: a file cannot be written.
    """
    require_matplotlib()
    drawings: dict[str, Callable[[Evidence], Figure | None]] = {
        "fig1-schemes": schemes_figure,
        "fig3-accuracies": accuracies_figure,
        "fig4-scores": scores_figure,
        "fig6-power": power_figure,
    }
    written = []
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            with _style():
                figure = draw(evidence)
                if figure is None:
                    continue
                for ending, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                    path = folder / f"{name}.{ending}"
                    figure.savefig(path, **options)
                    written.append(path)
    return written


# --- the figures ------------------------------------------------------------------------------


def schemes_figure(evidence: Evidence) -> "Figure | None":
    """P2 Fig. 1: accuracy of each weighting scheme, averaged over the targets."""
    values = {name: 100 * _mean(per.values()) for name, per in evidence.schemes().items()}
    if len(values) < 2:
        console.note("no fig1-schemes: fewer than two schemes have students on every target")
        return None
    order = sorted(values, key=values.__getitem__)
    figure = _figure(6.4, 0.8 + 0.34 * len(order))
    axes = figure.subplots()
    ours = ("nearest", "weighted")
    colors = [_ORANGE if name.startswith(ours) else _INK if name == LABELS_ONLY else _GRAY for name in order]
    for place, (name, color) in enumerate(zip(order, colors, strict=True)):
        axes.plot(values[name], place, "o", color=color, markersize=8)
        axes.annotate(
            f"{values[name]:.1f}", (values[name], place), (8, 0), textcoords="offset points",
            va="center_baseline",
        )  # fmt: skip
    axes.margins(x=0.12)
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", labelcolor=_INK)
    count = len(evidence.targets)
    axes.set_xlabel(f"test accuracy, %, mean over {count} targets" if count > 1 else "test accuracy, %")
    for place in range(len(order)):
        axes.axhline(place, color=_LINE, linewidth=0.5, zorder=0)
    axes.grid(axis="x")
    return figure


def accuracies_figure(evidence: Evidence) -> "Figure":
    """P2 Fig. 3: the student of each single source, coloured by score, beside the students of schemes."""
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    targets = evidence.targets
    figure = _figure(max(7.4, 2.2 + 1.25 * len(targets)), 4.4)
    axes = figure.subplots()
    shade = mpl.colormaps["plasma_r"]
    for place, target in enumerate(targets):
        scores, accuracies = target.pairs(evidence.column) or ([], [])
        low, high = min(scores), max(scores)
        shares = [(score - low) / ((high - low) or 1) for score in scores]
        colors = [shade(0.1 + 0.9 * share) for share in shares]
        xs = [place + 0.16 * _jitter(index) for index in range(len(scores))]
        axes.scatter(xs, [100 * value for value in accuracies], s=34, c=colors, linewidth=0, zorder=3)
        baseline = target.schemes.get(LABELS_ONLY)
        if baseline is not None:
            axes.hlines(100 * baseline, place - 0.4, place + 0.4, color=_INK, linewidth=1.6, zorder=2)
        for number, (scheme, (marker, color)) in enumerate(_MARKS.items()):
            if scheme in target.schemes:
                x = place + 0.24 + 0.06 * number
                axes.plot(x, 100 * target.schemes[scheme], marker, color=color, markersize=7, zorder=4)
    axes.set_xticks(
        range(len(targets)),
        [f"{_short(target.name)}\n({_correlation(evidence, target)})" for target in targets],
    )
    axes.tick_params(axis="x", labelcolor=_INK)
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
        Line2D([], [], color=_GRAY, marker="o", linestyle="", label="one source"),
        *([Line2D([], [], color=_INK, linewidth=1.6, label=LABELS_ONLY)] if LABELS_ONLY in shown else []),
        *(
            Line2D([], [], color=color, marker=marker, linestyle="", markersize=7, label=scheme)
            for scheme, (marker, color) in _MARKS.items()
            if scheme in shown
        ),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9,
                  handletextpad=0.4, columnspacing=1.2)  # fmt: skip
    figure.supxlabel("in parentheses: Spearman correlation of score and accuracy", fontsize=9, color=_SOFT)
    return figure


def scores_figure(evidence: Evidence) -> "Figure":
    """P2 Fig. 4: score of each source against the accuracy of its student, a panel per target."""
    targets = evidence.targets
    lines = math.ceil(len(targets) / 4)
    columns = math.ceil(len(targets) / lines)
    figure = _figure(max(5.6, 2.7 * columns), 0.6 + (2.5 if len(targets) > 1 else 3.0) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(targets) :]:
        axes.remove()
    for axes, target in zip(panels.flat, targets, strict=False):
        scores, accuracies = target.pairs(evidence.column) or ([], [])
        percents = [100 * value for value in accuracies]
        axes.scatter(scores, percents, s=34, color=_BLUE, linewidth=0, zorder=3)
        axes.set_title(f"{_short(target.name)}   ({_correlation(evidence, target)})", color=_INK)
        axes.margins(x=0.1, y=0.12)
        axes.grid()
    figure.supxlabel(
        f"{evidence.column} score of a source (in parentheses: Spearman correlation)",
        color=_SOFT,
        fontsize=10,
    )
    figure.supylabel("test accuracy of its student, %", color=_SOFT, fontsize=10)
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
    figure = _figure(6.0, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color=_SOFT, linewidth=1)
    for place, power in enumerate(powers):
        axes.plot([place - 0.14] * len(gains[power]), gains[power], "o", color=_GRAY, markersize=5, alpha=0.8)
    places = [powers.index(power) for power in whole]
    axes.plot(
        places, [_mean(gains[power]) for power in whole], "o-", color=_ORANGE, markersize=8, linewidth=1.6
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
        Line2D([], [], color=_GRAY, marker="o", linestyle="", markersize=5, label="a target"),
        Line2D([], [], color=_ORANGE, marker="o", linewidth=1.6, markersize=8, label=f"mean of {targets}"),
    ]
    figure.legend(handles=handles[: 2 if targets > 1 else 1], loc="outside upper left", ncols=2, frameon=False,
                  fontsize=9)  # fmt: skip


def _correlation(evidence: Evidence, target: Target) -> str:
    value = evidence.grid[evidence.column][target.name]["spearman"].value
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _mean(values: Any) -> float:
    known = list(values)
    return float(sum(known) / len(known))


def _jitter(index: int) -> float:
    """In [-1, 1), spread evenly and the same each time (multiples of the golden ratio)."""
    return 2 * (index * 0.6180339887 % 1) - 1


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        yield
