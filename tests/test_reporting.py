"""The report: complete, self-contained, escaped, and readable by a strict parser and by a browser."""

import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import StorageError
from kdcli.reporting import charts
from kdcli.reporting.cells import Cell, number, percent, word
from kdcli.reporting.curves import fidelity_curves, training_curves
from kdcli.reporting.document import Column, Command, Commands, Document, Facts, Notes, Part, Section, Table
from kdcli.reporting.page import write_page
from kdcli.types import RankedSource, Ranking

VOID = {"meta", "br", "hr", "link", "img", "input", "col"}
EVIL = "<img src=x onerror=alert(1)> & \"quoted\" 'x' $a_b$ #0a0001"

RANKING = Ranking(
    "c1", "parc", "features", {"size": 500, "seed": 0},
    (RankedSource("generalist", "i1", 0.412, 0.955), RankedSource("latin", "i2", -0.021, 0.045)),
)  # fmt: skip


def history(epochs: int, *parts: str) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "loss": 3 / epoch, **dict.fromkeys(parts, 2 / epoch), "lr": 0.1, "view": 1, "steps": epoch,
         "images_per_second": 9.0, "seconds": 2.0}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A student, as a row of a table and a line of a chart."""

    name: str
    method: str = "distill-equal"
    accuracy: float | None = None
    probe: tuple[float, float] | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a page is made of here: every kind of part once, or none of it."""

    title: str
    intro: str = ""
    commands: Sequence[tuple[str, str, float]] = ()
    ranking: Ranking | None = None
    rows: Sequence[Row] = ()
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    score_points: Sequence[tuple[str, float, float]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def document(self) -> Document:
        sections: tuple[tuple[str, Sequence[Part]], ...] = (
            ("Students", self._students()),
            ("Ranking", [charts.ranking_bars(self.ranking)] if self.ranking else []),
            ("Scores", [charts.score_scatter(self.score_points, "PARC")] if self.score_points else []),
            ("Training", [training_curves(self.histories, caption="Losses.")] if self.histories else []),
            (
                "Commands",
                [Commands(tuple(Command(*step) for step in self.commands))] if self.commands else [],
            ),
            ("Versions", [Facts(tuple(self.versions.items()))] if self.versions else []),
        )
        known = tuple(Section(title, tuple(parts)) for title, parts in sections if parts)
        return Document(self.title, "The lead.", self.intro, known)

    def _students(self) -> list[Part]:
        if not self.rows:
            return []
        columns = (
            Column("Student", "name"), Column("Method", "text"), Column("Test accuracy, %", best="high"),
            Column("Few-shot probe, %", best="high"), Column("Training, s"), Column("Note", "note"),
        )  # fmt: skip
        rows = tuple(
            (
                Cell(row.name, row.name), word(row.method), percent(row.accuracy),
                percent(*row.probe) if row.probe else percent(None), number(row.seconds), word(row.note),
            )
            for row in self.rows
        )  # fmt: skip
        reached = [
            charts.Reached(row.name, row.accuracy, row.probe) for row in self.rows if row.accuracy is not None
        ]
        notes = [Notes(tuple(self.notes))] if self.notes else []
        return [
            Table("students", columns, rows).trimmed(),
            *notes,
            *([charts.accuracies(reached)] if reached else []),
        ]


FULL = Report(
    title="A title",
    intro="An introduction.",
    commands=[("Cache", "kd cache-teachers photos --cache 'a b.kd'", 41.14), ("Rank", "kd rank-sources", 0.6)],
    ranking=RANKING,
    rows=[
        Row("plain", "labels-only", 0.8123, (0.7731, 0.0112), 12.34),
        Row("both", "distill-weighted", 0.8741, (0.8663, 0.01), 18.0),
        Row("heads", "consolidation", None, (0.8809, 0.009), 3600.0, "it has no classifier"),
    ],
    histories={"plain": history(20, "label"), "both": history(10, "label", "distill", "distill/generalist")},
    score_points=[("generalist", 0.412, 0.87), ("latin", -0.021, 0.82), ("greek", 0.2, 0.81)],
    versions={"kd": "0.1.0", "torch": "2.15.0+cu130"},
    notes=["A note on the numbers."],
)  # fmt: skip


class Page(HTMLParser):
    """Checks nesting while it collects elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes itself outside of SVG"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", data.replace("\N{NO-BREAK SPACE}", " ")))

    def words(self, *tags: str) -> str:
        """All text, or that of some elements."""
        return "\n".join(
            data for tag, data in self.text if (tag in tags if tags else tag not in ("style", "script"))
        )


def written(report: Report, folder: Path) -> Page:
    path = folder / "deep" / "report.html"
    write_page(report.document(), path)
    return Page(path.read_text(encoding="utf-8"))


def test_a_report_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = written(FULL, tmp_path)
    references = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert references
    assert all(reference.startswith("#") for reference in references)
    text = (tmp_path / "deep/report.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", text))
    assert not {"link", "img", "iframe", "base"} & {tag for tag, _ in page.elements}


def test_every_reference_inside_a_chart_finds_its_one_target(tmp_path: Path) -> None:
    page = written(FULL, tmp_path)
    text = (tmp_path / "deep/report.html").read_text(encoding="utf-8")
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)) <= set(names)


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = written(FULL, tmp_path)
    words = page.words()
    for expected in (
        "A title", "An introduction.", "A note on the numbers.", "81.2", "77.3 ± 1.1", "12.3", "3,600.0",
        "it has no classifier", "cache-teachers", "41.1 s", "2.15.0+cu130", "0.412", "−0.021", "0.955",
    ):  # fmt: skip
        assert expected in words, expected
    assert next(data for tag, data in page.text if tag == "p") == "The lead."
    assert page.words("title") == "A title"
    assert len([tag for tag, _ in page.elements if tag == "svg"]) >= 4


def test_charts_name_sources_runs_and_parts_as_text(tmp_path: Path) -> None:
    drawn = written(FULL, tmp_path).words("text")
    for name in ("generalist", "latin", "greek", "plain", "both", "PARC score", "weight", "epoch"):
        assert name in drawn, name


def test_a_rank_correlation_is_that_of_the_points(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    _, scores, accuracies = zip(*FULL.score_points, strict=True)
    expected = spearmanr(scores, accuracies).statistic
    assert f"Rank correlation {expected:.2f} over 3 sources" in written(FULL, tmp_path).words("figcaption")
    two = written(replace(FULL, score_points=FULL.score_points[:2]), tmp_path).words("figcaption")
    assert "correlation" not in two


def test_the_best_value_of_a_column_is_marked_and_ties_as_shown_are_all_best(tmp_path: Path) -> None:
    def best(report: Report) -> list[str]:
        write_page(report.document(), tmp_path / "r.html")
        return re.findall(r'class="best"[^>]*>([^<]*)<', (tmp_path / "r.html").read_text(encoding="utf-8"))

    assert best(FULL) == ["87.4", "88.1 ± 0.9"]
    rows = [Row("a", "distill-equal", 0.50001), Row("b", "distill-nearest", 0.50002)]
    lower = Row("c", "labels-only", 0.4)
    assert best(replace(FULL, rows=[*rows, lower])) == ["50.0", "50.0"]
    assert best(replace(FULL, rows=rows)) == []  # what all have is no distinction
    assert best(replace(FULL, rows=rows[:1])) == []


def test_whatever_a_name_holds_it_stays_text(tmp_path: Path) -> None:
    report = Report(
        title=EVIL, intro=EVIL, commands=[(EVIL, EVIL, 1.0)],
        ranking=replace(RANKING, sources=(RankedSource(EVIL, None, 0.5, 1.0),), metric="parc"),
        rows=[Row(EVIL, EVIL + "m", 0.5, None, None, EVIL), Row("b", "x", 0.1)],
        histories={EVIL: history(2, EVIL)}, score_points=[(EVIL, 0.1, 0.2)],
        versions={EVIL: EVIL}, notes=[EVIL],
    )  # fmt: skip
    page = written(report, tmp_path)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for tag in ("h1", "title", "dt", "dd", "li"):
        assert EVIL in page.words(tag), tag
    command = "".join(data for tag, data in page.text if tag in ("pre", "span"))
    assert "onerror=alert(1)>" in command


def test_a_command_is_in_the_page_character_by_character(tmp_path: Path) -> None:
    command = "kd  train-student 'a b@n=5' \\\n  --out " + "x/" * 60 + " | tee -a log"
    path = tmp_path / "r.html"
    write_page(replace(FULL, commands=[("step", command, 1.0)]).document(), path)
    from html import unescape

    block = re.search(r"<pre[^>]*>(.*?)</pre>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    assert unescape(re.sub(r"</?span>", "", block[1])) == command


@pytest.mark.parametrize(
    "report",
    [
        Report("only a title"),
        replace(FULL, ranking=None),
        replace(FULL, ranking=replace(RANKING, probe={}, sources=(RankedSource("one", None, 0.0, 0.0),))),
        replace(FULL, ranking=replace(RANKING, sources=(RankedSource("odd", None, math.nan, 1.0),))),
        replace(FULL, rows=[]),
        replace(FULL, rows=[Row("a", "labels-only")]),
        replace(FULL, rows=[Row("a", "labels-only", None, (math.nan, math.nan), math.inf)] * 2),
        replace(FULL, histories={"a": history(1, "label"), "b": []}),
        replace(FULL, histories={"a": [{"epoch": 1, "loss": math.nan}, {"epoch": 2, "loss": None, "extra": "text"}]}),
        replace(FULL, histories={f"run{i}": history(3, *(f"distill/t{j}" for j in range(40))) for i in range(7)}),
        replace(FULL, score_points=[("a", 0.5, 0.5)] * 9),
        replace(
            FULL,
            ranking=replace(RANKING, sources=tuple(RankedSource(f"s{i}", None, -i / 9, 0.1) for i in range(60))),
        ),
        replace(FULL, rows=[Row("漢字 émoji 🙂 \x00\x1b[0m\n" + "long " * 30, "m", 0.5)] * 2),
    ],
    ids=lambda report: None,
)  # fmt: skip
def test_missing_pieces_and_odd_values_leave_a_valid_page(report: Report, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    shown = page.words("td", "span", "th", "text", "p")
    assert not re.search(r"\b(nan|inf|None)\b", shown)
    if not report.rows:
        assert "table" not in dict(page.elements)


def test_columns_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    rows = [Row("labels-only", accuracy=0.5), Row("distill-equal", accuracy=0.6)]
    assert written(replace(FULL, rows=rows), tmp_path).words("button").split("\n") == [
        "Student",
        "Method",
        "Test accuracy, %",
    ]


def test_the_same_report_over_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(FULL.document(), path)
    first = path.read_text(encoding="utf-8")
    write_page(FULL.document(), path)
    dated = re.compile(r"Written .* UTC")
    assert dated.sub("", path.read_text(encoding="utf-8")) == dated.sub("", first)
    assert [place.name for place in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_an_error_with_a_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_page(FULL.document(), tmp_path / "file" / "report.html")


@pytest.mark.slow
def test_a_browser_sorts_the_table_and_reports_no_error(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    path = tmp_path / "r.html"
    write_page(FULL.document(), path)
    probe = """<script>
      const order = () => [...document.querySelectorAll("tbody th")].map((cell) => cell.textContent).join(",");
      const found = [], heads = document.querySelectorAll("th button");
      for (const clicks of [0, 2, 2, 0]) { heads[clicks].click(); found.push(order()); }
      const said = document.createElement("p");
      said.id = "said"; said.textContent = found.join("|"); document.body.append(said);
    </script></body>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = re.search(r'id="said">([^<]*)<', done.stdout)
    assert said, done.stderr
    # By name; by accuracy, highest first, then lowest first, with the missing one always last; by name again.
    assert said[1] == "both,heads,plain|both,plain,heads|plain,both,heads|both,heads,plain"
    assert "CONSOLE" not in done.stderr, done.stderr


def test_r2_of_the_teachers_has_a_chart_of_its_own() -> None:
    epochs = [
        {"epoch": 1, "loss": 0.5, "distill/a": 0.2, "r2/a/features": 0.1, "cos/a/features": 0.3, "val_r2": 0.2,
         "val_cos": 0.4, "val_r2/a/features": 0.2, "val_cos/a/features": 0.4},
    ]  # fmt: skip
    of_loss = training_curves({"run": epochs})
    assert [mark.text for mark in of_loss.legend] == ["loss", "distill/a"]
    chart = fidelity_curves({"run": epochs, "other": [{"epoch": 1, "loss": 0.5}]}, "fidelity")
    assert chart is not None
    assert [mark.text for mark in chart.legend] == ["a/features"]
    assert "1 runs" in chart.label  # the other has none
    assert fidelity_curves({"other": [{"epoch": 1, "loss": 0.5}]}, "fidelity") is None
