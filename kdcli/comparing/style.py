"""How P3's figures look: the same ink as the other figures of kd."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcli.models.properties import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1c2024", "#5c646d", "#dfe3e7"
BLUE, ORANGE, GREEN, PURPLE, OLIVE, GRAY = "#3180dc", "#dd6f00", "#27715f", "#86157b", "#544e10", "#97909a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, OLIVE, GRAY)
MARKS = ("o", "s", "^", "D", "v", "P", "X")
FAMILIES: dict[Family, tuple[str, str]] = {
    "cnn": (BLUE, "o"),
    "transformer": (ORANGE, "s"),
    "mlp": (GREEN, "^"),
    "unknown": (GRAY, "D"),
}
"""Colour and marker of each family."""
_LONGEST_NAME = 22
_SETTINGS: Any = {  # matplotlib's stubs want its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "kd",
    "text.parse_math": False,
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
}


@contextmanager
def style() -> Iterator[None]:
    """The settings of matplotlib for the time of the block."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        yield


def figure_of(width: float, height: float) -> "Figure":
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(axes: "Axes", **options: Any) -> None:
    """A quiet legend above the panel."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    look = {"frameon": False, "fontsize": 9, "handletextpad": 0.4, "columnspacing": 1.2}
    axes.legend(**{**place, **look, "ncols": 3 if axes.get_legend_handles_labels()[1] and _short_labels(axes) else 1}
                | options)  # fmt: skip


def _short_labels(axes: "Axes") -> bool:
    return all(len(label) < _LONGEST_NAME for label in axes.get_legend_handles_labels()[1])


def color_of(number: int) -> str:
    """The colour of the ``number``-th of several things."""
    return SERIES[number % len(SERIES)]


def mark_of(number: int) -> str:
    """The marker of the ``number``-th of several things."""
    return MARKS[number % len(MARKS)]


def jitter(index: int) -> float:
    """In [-1, 1), spread evenly and the same each time (multiples of the golden ratio)."""
    return 2 * (index * 0.6180339887 % 1) - 1


def short(name: str) -> str:
    """A name that fits a legend."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def log_sizes(axis: Any) -> None:
    """Make an axis of sizes logarithmic with plain numbers at 1, 2 and 5 (texts are not parsed as formulas)."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
