"""How figures of kd look: one set of colours and settings of matplotlib, for files and for pages."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from kdcli.files import atomic_write_bytes, storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, GROUND = "#1c2024", "#5c646d", "#dfe3e7", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, OLIVE, GRAY = "#3180dc", "#dd6f00", "#27715f", "#86157b", "#544e10", "#97909a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, OLIVE, GRAY)
"""Distinguishable with each kind of colour blindness, >= 3:1 on white."""
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_LONGEST_NAME = 22


@final
@dataclass(frozen=True, slots=True)
class Look:
    """Colours of a figure, as matplotlib writes them.

    Attributes:
        ink, soft, line, ground: of text, of labels, of axes and grids, of what is below.
        series: of several things, in order.
    """

    ink: str
    soft: str
    line: str
    ground: str
    series: tuple[str, ...]

    def color(self, number: int) -> str:
        """The colour of the ``number``-th of several things."""
        return self.series[number % len(self.series)]


LIGHT = Look(INK, SOFT, LINE, GROUND, SERIES)
"""On white paper."""


@contextmanager
def style(look: Look = LIGHT, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The settings of matplotlib for the time of the block.

    Args:
        look: colours.
        settings: that differ from those of all figures.
    """
    import matplotlib as mpl

    merged: Any = {**_settings(look), **(settings or {})}
    with mpl.rc_context(merged):
        yield


def _settings(look: Look) -> Any:  # matplotlib's stubs want its keys as literals
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "kd",
        "text.parse_math": False,
        "font.size": 10.0,
        "text.color": look.ink,
        "axes.edgecolor": look.line,
        "axes.labelcolor": look.soft,
        "axes.titlesize": 10.0,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": look.line,
        "grid.linewidth": 0.7,
        "xtick.color": look.line,
        "ytick.color": look.line,
        "xtick.labelcolor": look.soft,
        "ytick.labelcolor": look.soft,
        "xtick.major.size": 0.0,
        "ytick.major.size": 0.0,
    }


Drawn = TypeVar("Drawn")


def write_drawings(
    drawings: "Mapping[str, Callable[[Drawn], Figure | None]]", value: Drawn, folder: Path
) -> list[Path]:
    """Draw a value in every way, and write NAME.svg and NAME.png of each figure that there is.

    Args:
        drawings: by name; None: the value is not enough for that figure.
        value: what is drawn.
        folder: made where it is not there.

    Raises:
        StorageError, NoSpaceError: a file cannot be written.
    """
    written = []
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            with style():
                figure = draw(value)
                if figure is None:
                    continue
                for ending, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
                    path, content = folder / f"{name}.{ending}", io.BytesIO()
                    figure.savefig(content, format=ending, **options)
                    atomic_write_bytes(path, content.getvalue())
                    written.append(path)
    return written


def figure_of(width: float, height: float) -> "Figure":
    """An empty figure, which a notebook shows without more; sizes in inches."""
    return _figure_class()(figsize=(width, height), layout="constrained")


@cache
def _figure_class() -> "type[Figure]":
    from matplotlib.figure import Figure

    @final
    class Drawing(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png", dpi=100)
            return content.getvalue()

    return Drawing


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
    return LIGHT.color(number)


def mark_of(number: int) -> str:
    """The marker of the ``number``-th of several things."""
    return MARKS[number % len(MARKS)]


def jitter(index: int) -> float:
    """In [-1, 1), spread evenly and the same each time (multiples of the golden ratio)."""
    return 2 * (index * 0.6180339887 % 1) - 1


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that fits a legend."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def log_sizes(axis: Any) -> None:
    """Make an axis of sizes logarithmic with plain numbers at 1, 2 and 5 (texts are not parsed as formulas)."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
