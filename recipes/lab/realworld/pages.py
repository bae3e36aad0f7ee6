"""A page of claims, written before anything is run, and one of results, written by the run."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, final

from kdcli.plotting import figure_of, write_drawings
from lab.realworld.claims import Claim, Values, Verdict
from lab.realworld.statistics import Effect, effect
from lab.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"holds": "#27715f", "does not hold": "#b3261e"}
_KINDS = {
    "above": "difference above 0",
    "not below": "difference above -{margin:g}",
    "same": "difference within ± {margin:g}",
}


@final
@dataclass(frozen=True, slots=True)
class Words:
    """What is on a page beside what is made of claims and values.

    Attributes:
        head: what it begins with.
        titles: by paper.
        pictures: name of their folder, beside the page.
    """

    head: str
    titles: Mapping[str, str]
    pictures: str = ""


def claims_page(words: Words, claims: Sequence[Claim], settings: Mapping[str, Settings]) -> str:
    """The claims, and every number of the run.

    Args:
        words: of the page.
        claims: all of them.
        settings: by form, ``core`` and ``full``.
    """
    parts = [words.head]
    for paper in dict.fromkeys(claim.paper for claim in claims):
        rows = [_claim_row(claim) for claim in claims if claim.paper == paper]
        parts.append(
            f"## {words.titles[paper]}\n\n"
            + markdown(["claim", "place", "what is compared", "holds if"], rows)
        )
    core, full = settings["core"], settings["full"]
    rows = [
        [
            f"`{name}`",
            f"`{_short(core[name])}`",
            f"`{_short(full[name])}`" if full[name] != core[name] else "",
            each.ours,
        ]
        for name, each in core.settings.items()
    ]
    parts.append("## Settings\n\n" + markdown(["setting", "core", "full", "why"], rows))
    return "\n".join(parts)


def results_page(
    words: Words, verdicts: Sequence[Verdict], values: Mapping[str, Values], told: Sequence[str]
) -> str:
    """One table for a reader in a hurry, then a picture and the numbers of each paper.

    Args:
        words: of the page.
        verdicts: on all claims.
        values: by paper.
        told: lines about the run: what, where, how long, what was left out.
    """
    counts = Counter(verdict.word for verdict in verdicts)
    counted = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    parts = [
        words.head,
        f"Of {len(verdicts)} claims: {counted}.\n",
        markdown(["claim", "verdict", "difference, 95 % interval", "seeds"], map(_verdict_row, verdicts)),
    ]
    for paper in dict.fromkeys(verdict.claim.paper for verdict in verdicts):
        parts.append(f"## {words.titles[paper]}\n")
        if _with_interval([verdict for verdict in verdicts if verdict.claim.paper == paper]):
            parts.append(f"![Differences of {paper} and their intervals]({words.pictures}/{paper}.svg)\n")
        parts.append(values_table(values.get(paper, {})))
    parts.append("## The run\n\n" + "".join(f"* {line}\n" for line in told))
    return "\n".join(parts)


def draw(verdicts: Sequence[Verdict], folder: Path) -> None:
    """A picture a paper, ``p1.svg``, ``p1.png``: each claim's difference with its interval."""
    papers = dict.fromkeys(verdict.claim.paper for verdict in verdicts)
    drawings: dict[str, Callable[[Sequence[Verdict]], Figure | None]] = {
        paper: lambda all_, paper=paper: _forest([each for each in all_ if each.claim.paper == paper])  # type: ignore[misc]
        for paper in papers
    }
    write_drawings(drawings, verdicts, folder)


def _with_interval(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that a picture shows."""
    return [
        verdict for verdict in verdicts if verdict.effect is not None and math.isfinite(verdict.effect.low)
    ]


def _forest(verdicts: Sequence[Verdict]) -> "Figure | None":
    shown = _with_interval(verdicts)
    if not shown:
        return None
    figure = figure_of(9.0, 0.9 + 0.42 * len(shown))
    axes = figure.add_subplot()
    axes.axvline(0, color="#5c646d", linewidth=0.8)
    limit = _limit([found for verdict in shown if (found := verdict.effect)])
    for place, verdict in enumerate(reversed(shown)):
        found = verdict.effect
        assert found is not None
        color = _COLORS.get(verdict.word, "#97909a")
        if verdict.claim.margin:
            sides = [-verdict.claim.margin, verdict.claim.margin if verdict.claim.kind == "same" else 0]
            axes.plot(sides, [place, place], color="#dfe3e7", linewidth=9, solid_capstyle="butt", zorder=0)
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.6)
        outside = abs(found.mean) > limit
        marker = (">" if found.mean > 0 else "<") if outside else "o"
        shown_at = max(-limit, min(limit, found.mean))
        axes.plot([shown_at], [place], marker, color=color, markersize=5, clip_on=False)
        axes.annotate(
            f"{plus_minus(found, signed=True)}  {verdict.word}",
            (1.03, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=color,
        )
    axes.set_xlim(-limit, limit)
    axes.set_yticks(range(len(shown)), [verdict.claim.says for verdict in reversed(shown)], fontsize=8)
    axes.set_xlabel("difference, 95 % interval", loc="right", fontsize=9)
    axes.grid(axis="x")
    return figure


def _limit(effects: Sequence[Effect]) -> float:
    """Of the axis, on either side of 0: one difference far from 0 must not squeeze the others."""
    reaches = [max(abs(each.low), abs(each.high)) for each in effects]
    return 1.05 * min(max(reaches), 3 * median(reaches)) or 1.0


def values_table(values: Values) -> str:
    """Means over seeds and half the widths of their 95 % intervals."""
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = list(dict.fromkeys(column for _, column in values))
    return markdown(
        ["", *columns], [[row, *(_cell(values, row, column) for column in columns)] for row in rows]
    )


def _cell(values: Values, row: str, column: str) -> str:
    known = values.get((row, column))
    return plus_minus(effect(list(known.values()))) if known else ""


def plus_minus(found: Effect, signed: bool = False) -> str:
    """``12.3 ± 0.4``; without an interval where there is one seed."""
    sign = "+" if signed else ""
    if not math.isfinite(found.low):
        return f"{found.mean:{sign}.1f}"
    return f"{found.mean:{sign}.1f} ± {(found.high - found.low) / 2:.1f}"


def markdown(head: Sequence[str], rows: "Sequence[Sequence[str]] | map[list[str]]") -> str:
    """A table; bars in texts are escaped."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def _claim_row(claim: Claim) -> list[str]:
    other = claim.than if isinstance(claim.than, str) else f"{claim.than:g}"
    judged = ""
    if claim.given is not None:
        row, column, least = claim.given
        judged = f"; not judged where {row}, {column} is below {least:g}"
    compared = f"{claim.row} with {other}, {claim.column}"
    return [claim.says, claim.where, compared, _KINDS[claim.kind].format(margin=claim.margin) + judged]


def _verdict_row(verdict: Verdict) -> list[str]:
    found = verdict.effect
    word = f"**{verdict.word}**" if verdict.word == "does not hold" else verdict.word
    shown = plus_minus(found, signed=True) if found is not None else "–"
    paper = verdict.claim.paper.replace("p", "P")
    return [f"{paper}: {verdict.claim.says}", word, shown,
            str(found.seeds) if found is not None else ""]  # fmt: skip


def _short(value: object) -> str:
    return str(value).replace("'", "")
