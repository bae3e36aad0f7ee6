"""Charts as inline SVG. matplotlib draws; colours are the page's own, so light, dark and paper follow it.

Figures are drawn in placeholder colours that become CSS variables, on a transparent ground, with text as text.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcli.errors import MissingExtraError
from kdcli.reporting.markup import Html, clean, element
from kdcli.reporting.style import SERIES
from kdcli.reporting.values import ReportRow
from kdcli.types import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _LINE, _GROUND = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_SERIES = tuple(f"#0b000{index}" for index in range(SERIES))
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", _GROUND: "ground"} | {
    color: f"s{index}" for index, color in enumerate(_SERIES)
}
_DASHES: tuple[tuple[float, ...], ...] = ((), (7, 2.2), (2, 1.6), (7, 2, 1.5, 2), (4, 2), (9, 2, 2, 2, 2, 2))
_SETTINGS: Any = {  # matplotlib's stubs want its keys as literals
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
}
_PIXELS = 1.25  # CSS pixels of a point
_WIDE, _NARROW = 9.77, 7.1  # inches: 880 and 640 CSS pixels
_EPOCH_FACTS = frozenset({"epoch", "loss", "lr", "view", "steps", "images_per_second", "seconds"})
_LONGEST_NAME = 30


def require_matplotlib() -> None:
    """Refuse before anything is done.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "the report's charts need the package matplotlib, which is not installed",
            "pip install 'kdcli[report]'",
        ) from error


# --- the charts -------------------------------------------------------------------------------


def ranking_bars(ranking: Ranking) -> Html:
    """Scores and weights of the sources, best first."""
    names = [_short(source.name) for source in ranking.sources]
    scores = [source.score for source in ranking.sources]
    weights = [source.weight for source in ranking.sources]
    places = range(len(names))
    with _figure("ranking", _NARROW, 0.75 + 0.3 * len(names)) as (figure, svg):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for axes, values, color, title in (
            (left, scores, _SERIES[0], f"{ranking.metric.upper()} score"),
            (right, weights, _SERIES[5], "weight"),
        ):
            axes.barh(places, _finite(values), height=0.62, color=color)
            axes.set_title(title, color=_SOFT, fontsize=9.5)
            axes.axvline(0, color=_LINE, linewidth=1)
            low, high = _span([0.0, *values])
            room = 0.16 * (high - low)
            axes.set_xlim(low - (2 * room if low < 0 else 0), high + room)
            for place, value in zip(places, values, strict=True):
                _value_beside(axes, value, place)
            axes.spines[:].set_visible(False)
            axes.set_xticks([])
        left.set_yticks(places, names)
        left.tick_params(axis="y", labelcolor=_INK, labelsize=10)
        left.set_ylim(len(names) - 0.5, -0.5)
        right.tick_params(axis="y", labelleft=False)
        return svg(f"Ranking of {len(names)} sources by {ranking.metric.upper()}: scores and weights")


def accuracies(rows: Sequence[ReportRow]) -> Html:
    """Test accuracy and few-shot probe of each student, in the table's order."""
    with _figure("accuracies", _NARROW, 0.75 + 0.34 * len(rows)) as (figure, svg):
        axes = figure.subplots()
        for place, row in enumerate(rows):
            if row.probe is not None:
                mean, half = (100 * value for value in row.probe)
                axes.plot([mean - half, mean + half], [place + 0.13] * 2, color=_SERIES[1], linewidth=1.4)
                axes.plot(mean, place + 0.13, "D", color=_SERIES[1], markersize=5, markerfacecolor=_GROUND)
            if row.test_top1 is not None:
                axes.plot(100 * row.test_top1, place - 0.13, "o", color=_SERIES[0], markersize=6.5)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        axes.tick_params(axis="y", labelcolor=_INK, labelsize=10)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.set_xlabel("accuracy, %")
        axes.spines[:].set_visible(False)
        axes.grid(axis="x")
        for place in range(len(rows)):
            axes.axhline(place, color=_LINE, linewidth=0.5, zorder=0)
        return svg(f"Accuracy of {len(rows)} students")


def accuracy_legend(rows: Sequence[ReportRow]) -> Html:
    """What the marks of :func:`accuracies` mean, those that are there."""
    dot = element("circle", cx="15", cy="5", r="4.2", style="fill: var(--s0)")
    diamond = element(
        "path", d="M 3 5 H 27 M 15 1 L 19 5 L 15 9 L 11 5 Z",
        style="fill: var(--ground); stroke: var(--s1); stroke-width: 1.5",
    )  # fmt: skip
    entries = [
        (dot, "test accuracy", any(row.test_top1 is not None for row in rows)),
        (diamond, "few-shot probe, 95 % interval", any(row.probe is not None for row in rows)),
    ]
    return _legend([(mark, text) for mark, text, shown in entries if shown])


def score_scatter(points: Sequence[tuple[str, float, float]], metric: str) -> Html:
    """Score against accuracy, one named point per source."""
    with _figure("scatter", _NARROW, 3.7) as (figure, svg):
        axes = figure.subplots()
        scores = [score for _, score, _ in points]
        percents = [100 * accuracy for _, _, accuracy in points]
        axes.scatter(scores, percents, s=46, color=_SERIES[0], linewidth=0, zorder=3)
        axes.set_xlabel(f"{metric} score")
        axes.set_ylabel("accuracy, %")
        axes.margins(x=0.12, y=0.15)
        _open_axes(axes)
        axes.grid(axis="x")
        figure.draw_without_rendering()
        _place_names(
            axes, [(_short(name), x, y) for (name, _, _), x, y in zip(points, scores, percents, strict=True)]
        )
        return svg(f"Score against accuracy for {len(points)} sources")


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Html, Html]:
    """The loss and its parts over the epochs, one panel per run; and the legend."""
    parts = list(dict.fromkeys(name for epochs in histories.values() for name in _parts(epochs)))
    columns = min(3, len(histories))
    lines = math.ceil(len(histories) / columns)
    width = _WIDE if columns == 3 else _NARROW
    with _figure("curves", width, 0.4 + 2.15 * lines) as (figure, svg):
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
        panels = figure.subplots(lines, columns, squeeze=False)
        for axes in panels.flat[len(histories) :]:
            axes.remove()
        for place, (axes, (name, epochs)) in enumerate(zip(panels.flat, histories.items(), strict=False)):
            marker = "o" if len(epochs) == 1 else None
            numbers = [epoch.get("epoch", index + 1) for index, epoch in enumerate(epochs)]
            loss = _finite([epoch.get("loss") for epoch in epochs])
            axes.plot(numbers, loss, color=_INK, linewidth=2.2, marker=marker)
            for part in _parts(epochs):
                values = _finite([epoch.get(part) for epoch in epochs])
                color, dashes = _line(parts.index(part))
                axes.plot(
                    numbers, values, color=color, dashes=dashes, linewidth=1.5, marker=marker, markersize=3
                )
            axes.set_title(_short(name), color=_INK)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if place >= (lines - 1) * columns:
                axes.set_xlabel("epoch")
            _open_axes(axes)
        label = f"Loss over the epochs of {len(histories)} runs"
        return svg(label), _legend(
            [
                (_key("var(--ink)", (), 2.4), "loss"),
                *(
                    (_key(f"var(--{_VARIABLES[color]})", dashes, 1.8), part)
                    for part, (color, dashes) in ((part, _line(index)) for index, part in enumerate(parts))
                ),
            ]
        )


# --- pieces -----------------------------------------------------------------------------------


def _parts(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the loss's parts in a history."""
    return [
        name
        for name in dict.fromkeys(name for epoch in epochs for name in epoch)
        if name not in _EPOCH_FACTS and all(isinstance(epoch.get(name, 0.0), int | float) for epoch in epochs)
    ]


def _finite(values: Sequence[Any]) -> list[float]:
    """Numbers to draw; what is none leaves a gap."""
    return [
        float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
        for value in values
    ]


def _span(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low, low + 1)


def _line(index: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of part number ``index``; every pair of both comes once in 36."""
    return _SERIES[index % SERIES], _DASHES[(index + index // SERIES) % len(_DASHES)]


def _short(name: str) -> str:
    name = " ".join(clean(name).split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _open_axes(axes: "Axes") -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")


def _value_beside(axes: "Axes", value: float, place: int) -> None:
    """The number at the end of a bar; a missing one at its root."""
    known = math.isfinite(value)
    below = known and value < 0
    axes.annotate(
        f"{value:.3f}".replace("-", "−") if known else "–", (value if known else 0.0, place),
        (-4 if below else 4, 0), textcoords="offset points", va="center_baseline",
        ha="right" if below else "left", fontsize=9.5,
    )  # fmt: skip


def _place_names(axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point where it covers no other name and no point."""
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
            if (
                free
                and frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
            ):
                taken.append(box)
                break
            text.remove()
        else:  # too crowded: the name stays, over another
            axes.annotate(name, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=9.5)


def _key(color: str, dashes: tuple[float, ...], width: float) -> Html:
    pattern = " ".join(f"{width * part:g}" for part in dashes) or None
    return element(
        "path", d="M 0 5 H 30", style=f"stroke: {color}; stroke-width: {width}", stroke_dasharray=pattern
    )


def _legend(entries: Sequence[tuple[Html, str]]) -> Html:
    items = [
        element("li", element("svg", mark, viewBox="0 0 30 10", aria_hidden="true"), text)
        for mark, text in entries
    ]
    return element("ul", *items, class_="legend")


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple["Figure", Callable[[str], Html]]]:
    """A figure in the page's style, and the function that makes SVG of it."""
    import matplotlib
    from matplotlib.figure import Figure

    def svg(label: str) -> Html:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _inline(buffer.getvalue(), name, label)

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has its own fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, svg


def _inline(document: str, name: str, label: str) -> Html:
    """SVG file of matplotlib as a part of a page: own ids, the page's colours and fonts, nothing external."""
    view = document.partition('viewBox="')[2].partition('"')[0]
    body = document[document.index('<g id="figure_1">') : document.rindex("</svg>")]
    body = re.sub(r"font-family: [^;\"]*?(?=[;\"])", "font-family: inherit", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"#0[ab]000\d", lambda color: f"var(--{_VARIABLES.get(color[0], 'ink')})", body)
    width = f"max-width: {float(view.split()[2]) * _PIXELS / 16:.4g}rem"
    return element("svg", Html(body), viewBox=view, style=width, role="img", aria_label=label)
