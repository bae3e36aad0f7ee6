"""Charts as inline SVG, whose colours are the page's own, so that light, dark and paper follow it; and as files.

In a page figures are drawn in placeholder colours that become CSS variables, on a transparent ground, text as
text.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kdcli.plotting import LIGHT, Look, style
from kdcli.reporting.document import Chart, Mark
from kdcli.reporting.markup import Html, element, join
from kdcli.reporting.style import SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW, PHONE = 9.77, 7.1, 3.9  # inches: 880, 640 and 350 CSS pixels
_PLACEHOLDERS = Look(
    "#0a0001", "#0a0002", "#0a0003", "#0a0004", tuple(f"#0b000{index}" for index in range(SERIES))
)
_VARIABLES = {
    _PLACEHOLDERS.ink: "ink",
    _PLACEHOLDERS.soft: "soft",
    _PLACEHOLDERS.line: "line",
    _PLACEHOLDERS.ground: "ground",
} | {color: f"s{index}" for index, color in enumerate(_PLACEHOLDERS.series)}
_PIXELS = 1.25  # CSS pixels of a point
_SETTINGS = {
    "font.family": "DejaVu Sans",
    "axes.facecolor": "none",
    "axes.labelsize": 9.5,
    "axes.spines.bottom": True,
    "axes.spines.left": True,
    "axes.unicode_minus": True,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "lines.solid_capstyle": "round",
}
_DOTS_PER_INCH = 150


def inline(chart: Chart) -> Html:
    """A chart as a part of a page, for wide screens and paper, and for phones; its legend is the page's."""

    def narrow(figure: "Figure", buffer: io.BytesIO) -> None:
        _narrow(figure)
        _save_svg(figure, buffer)

    wide = _drawn(chart, _PLACEHOLDERS, _save_svg).decode()
    phone = _drawn(chart, _PLACEHOLDERS, narrow).decode()
    return join(
        _inline(wide, chart.name, chart.label, "desk"),
        _inline(phone, f"{chart.name}-phone", chart.label, "phone"),
    )


def _narrow(figure: "Figure") -> None:
    """Make a figure as narrow as a phone, its text as large as before; panels stand below each other."""
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    width, height = figure.get_size_inches()
    spec = panels[0].get_subplotspec() if panels else None
    grid = None if spec is None else spec.get_gridspec()
    shared = any(axes.get_shared_y_axes().joined(panels[0], axes) for axes in panels[1:])
    if grid is not None and grid.ncols > 1 and not shared:
        below = figure.add_gridspec(len(panels), 1)
        for place, axes in enumerate(panels):
            axes.set_subplotspec(below[place])
        height = height / grid.nrows * len(panels)
    figure.set_size_inches(min(width, PHONE), height)


def as_file(chart: Chart, kind: Literal["svg", "png"]) -> bytes:
    """A chart by itself, on white, with its legend in it."""

    def save(figure: "Figure", buffer: io.BytesIO) -> None:
        if chart.legend:
            _draw_legend(figure, chart.legend)
        if kind == "svg":
            _save_svg(figure, buffer, facecolor=LIGHT.ground)
        else:
            figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, facecolor=LIGHT.ground)

    return _drawn(chart, LIGHT, save)


def legend(marks: Sequence[Mark]) -> Html:
    """The legend of a chart in a page."""
    items = [
        element("li", element("svg", _key(mark), viewBox="0 0 30 10", aria_hidden="true"), mark.text)
        for mark in marks
    ]
    return element("ul", *items, class_="legend")


def _drawn(chart: Chart, look: Look, save: "Callable[[Figure, io.BytesIO], None]") -> bytes:
    buffer = io.BytesIO()
    with style(look, _SETTINGS | {"svg.hashsalt": chart.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has its own fonts
        save(chart.draw(look), buffer)
    return buffer.getvalue()


def _save_svg(figure: "Figure", buffer: io.BytesIO, **options: Any) -> None:
    figure.savefig(
        buffer, format="svg", **(options or {"transparent": True}), metadata={"Date": None, "Creator": "kd"}
    )


def _draw_legend(figure: "Figure", marks: Sequence[Mark]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for mark in marks:
        color = LIGHT.ink if mark.color == "ink" else LIGHT.color(mark.color)
        shape = mark.shape.strip("-")
        line = mark.shape in ("", "-D-")
        handle = Line2D(
            [], [], color=color, marker=shape or None, markersize=6, linewidth=mark.width, label=mark.text,
            linestyle="-" if line else "", markerfacecolor=LIGHT.ground if mark.shape == "-D-" else color,
        )  # fmt: skip
        if mark.dashes:
            handle.set_dashes(mark.dashes)
        handles.append(handle)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _key(mark: Mark) -> Html:
    color = "var(--ink)" if mark.color == "ink" else f"var(--s{mark.color % SERIES})"
    match mark.shape:
        case "":
            pattern = " ".join(f"{mark.width * part:g}" for part in mark.dashes) or None
            return element(
                "path", d="M 0 5 H 30", style=f"stroke: {color}; stroke-width: {mark.width}",
                stroke_dasharray=pattern,
            )  # fmt: skip
        case "o":
            return element("circle", cx="15", cy="5", r="4.2", style=f"fill: {color}")
        case "s":
            return element("rect", x="11", y="1", width="8", height="8", style=f"fill: {color}")
        case _:
            outline = "M 3 5 H 27 " if mark.shape == "-D-" else ""
            return element(
                "path", d=f"{outline}M 15 1 L 19 5 L 15 9 L 11 5 Z",
                style=f"fill: var(--ground); stroke: {color}; stroke-width: 1.5",
            )  # fmt: skip


def _inline(document: str, name: str, label: str, kind: str) -> Html:
    """SVG file of matplotlib as a part of a page: own ids, the page's colours and fonts, nothing external."""
    view = document.partition('viewBox="')[2].partition('"')[0]
    body = document[document.index('<g id="figure_1">') : document.rindex("</svg>")]
    body = re.sub(r"font-family: [^;\"]*?(?=[;\"])", "font-family: inherit", body)
    body = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font-size: \1", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"#0[ab]000\d", lambda color: f"var(--{_VARIABLES.get(color[0], 'ink')})", body)
    width = f"max-width: {float(view.split()[2]) * _PIXELS / 16:.4g}rem"
    return element("svg", Html(body), viewBox=view, style=width, role="img", aria_label=label, class_=kind)
