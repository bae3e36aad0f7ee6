"""What reaches a terminal, a page or a spreadsheet is only shown: names of others are not obeyed."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console as RichConsole
from rich.progress import Progress

from kdcli.console import Console, RichBar, bar_columns, counted, inert, shown
from kdcli.errors import BadDataError
from kdcli.options.resolving import yaml_text
from kdcli.reporting.cells import number, word
from kdcli.reporting.document import Column, Table
from kdcli.reporting.formats import _csv
from kdcli.reporting.markup import element

EVIL = "a\x1b]0;owned\x07\x1b[31mred\x9b31m\u202egpj.exe\u2066\rb\x08"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text())
def test_nothing_obeyed_is_left_and_what_is_printable_stays(text: str) -> None:
    result = shown(text)
    assert not OBEYED.search(result)
    assert not {"\n", "\t"} & set(result)
    assert not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in result)
    if text.isprintable():
        assert result == text


def test_names_of_people_stay_as_they_are() -> None:
    for name in ("café", "日本語", "Ünïcödé", "ﷺ", "می‌خواهم", "👩‍👩‍👧", "a b", "<b>[red]"):
        assert shown(name) == name


@given(st.text())
def test_a_cell_is_no_formula(text: str) -> None:
    (row,) = csv.reader(io.StringIO(_line(inert(text)), newline=""))
    assert not row[0].lstrip().startswith(("=", "+", "-", "@"))
    assert not row[0].startswith(("\t", "\r"))


def _line(*cells: object) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def test_numbers_stay_numbers() -> None:
    assert [inert(each) for each in (-1.5, 3, True, "x", "", "-x")] == [-1.5, 3, True, "x", "", "'-x"]


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"]
)
def test_a_table_for_spreadsheets_is_inert(name: str) -> None:
    table = Table("t", (Column("Name", "name"), Column("Value")), ((word(name), number(-1.5)),))
    header, row = csv.reader(io.StringIO(_csv(table)))
    assert header == ["Name", "Value"]
    assert row[0].startswith("'")
    assert float(row[1]) == -1.5


def test_everything_that_speaks_shows_names(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.verbose = True
    console.note(EVIL)
    console.detail(EVIL)
    console.warn(EVIL)
    console.error(BadDataError(EVIL).message, BadDataError(EVIL, EVIL).hint)
    console.say(EVIL)
    console.table(["x", EVIL], [[EVIL, 1]])
    console.traceback(ValueError(EVIL))
    with console.progress(1, "images", EVIL) as bar:
        bar.advance(1, teacher=EVIL)
    out, err = capsys.readouterr()
    assert not OBEYED.search(out + err)
    assert "\\x1b" in out
    assert "\\u202e" in err


def test_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    Console().document({EVIL: EVIL})
    out = capsys.readouterr().out
    assert json.loads(out) == {EVIL: EVIL}
    assert not OBEYED.search(out)


def test_printed_options_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    for name in (EVIL, "café", "日本"):
        text = yaml_text({"out": name})
        assert yaml.safe_load(text) == {"out": name}
        assert not OBEYED.search(text)
    assert "café" in yaml_text({"out": "café"})


def test_a_page_turns_nothing_around() -> None:
    page = element("p", f"<script>{EVIL}", title=EVIL)
    assert not OBEYED.search(page.replace("\r", ""))
    assert "<script>" not in page


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_bar_keeps_bar_count_and_time_left_and_cuts_facts_from_the_right(width: int) -> None:
    screen = RichConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    clock = iter(range(100))
    progress = Progress(*bar_columns(width), console=screen, expand=True, get_time=lambda: float(next(clock)))
    bar = RichBar(progress, progress.add_task("training", total=45_600, facts=""), "steps")
    for _ in range(10):
        bar.advance(2_280, "waiting for images: add --workers", loss="0.6931", val_acc="81.2 %", epoch="3/20")
    screen.print(progress.get_renderable())
    (line,) = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(line) == width
    assert re.match(r"training ━{3,}", line)
    assert " 22800/45600 " in line
    assert re.search(r" \d:\d\d:\d\d ", line)
    told = line.partition("steps/s")[2].strip()
    whole = "loss 0.6931  val acc 81.2 %  epoch 3/20  waiting for images: add --workers"
    assert whole.startswith(told.rstrip("… "))
    assert (told == whole) is (width == 200)


def test_a_bar_that_knows_images_a_second_tells_no_other_rate() -> None:
    screen = RichConsole(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    progress = Progress(*bar_columns(60), console=screen, expand=True)
    bar = RichBar(progress, progress.add_task("training", total=900, facts=""), "steps")
    for _ in range(3):
        bar.advance(150, loss="0.6931", val_acc="81.2 %", **{"images/s": "512"})
    screen.print(progress.get_renderable())
    assert "450/900 " in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "loss 0.6931  val acc 81.2" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_notebook_gets_a_bar_of_its_own(tmp_path: Path) -> None:
    """In a real kernel: one output, drawn again in place, and no lines on stderr."""
    import nbformat
    from nbclient import NotebookClient

    cell = nbformat.v4.new_code_cell(
        "from kdcli.console import console\n"
        "with console.progress(40, 'images', '<b>cache') as bar:\n"
        "    for _ in range(4):\n"
        "        bar.advance(10, 'waiting for the disk', written='3 MB')"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    (output,) = notebook.cells[0].outputs
    assert '<progress value="40" max="40">' in output.data["text/html"]
    assert "&lt;b&gt;cache" in output.data["text/html"]
    assert "40/40" in output.data["text/html"]
    assert "written 3 MB, waiting for the disk" in output.data["text/html"]


def test_the_end_of_a_command_goes_to_stderr_and_not_to_the_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.finished("a.kd: 3.4 MB", "kd one", "kd other")
    console.legend(rho_plus="share of images")
    out, err = capsys.readouterr()
    assert not out
    assert err == "a.kd: 3.4 MB, in 0s\nnext: kd one\n      kd other\nrho plus: share of images\n"
    console.quiet = True
    console.finished("a.kd", "kd one")
    console.legend(a="b")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "things", "text"),
    [(1, "images", "1 image"), (2, "images", "2 images"), (1, "classes", "1 class"), (0, "tests", "0 tests")],
)
def test_one_is_one(count: int, things: str, text: str) -> None:
    assert counted(count, things) == text


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """What a command writes to a terminal, in all of its colours."""
    main, side = pty.openpty()
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", *arguments],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=cwd,
        env=environment,
    )
    os.close(side)
    read = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the terminal is gone with the process
            break
        if not part:
            break
        read += part
    os.close(main)
    process.wait()
    return read.decode(errors="replace")


def test_nothing_of_a_name_is_obeyed_on_a_terminal(tmp_path: Path) -> None:
    mark, turned = "\x1b]0;owned\x07", "\u202e"
    for name, colour in (("one", 10), (f"two{mark}{turned}[red]", 200)):
        folder = tmp_path / f"data{mark}{turned}[bold]" / name
        folder.mkdir(parents=True)
        for place in range(3):
            Image.new("RGB", (40, 40), (colour, place, 7)).save(folder / f"{place}{mark}.png")
        (folder / f"bad{mark}{turned}.png").write_bytes(b"no image")
    data = f"data{mark}{turned}[bold]"
    for arguments in (
        ["train-student", data, "--method", "xe-kl", "--student", f"x{mark}", "--out", "o"],
        ["audit", data],
        ["cache", "ls", data],
        ["report", data],
        ["train-student", data, "--method", f"{mark}{turned}"],
        ["cache-teachers", data, "--teacher", f"x{mark}=resnet18", "--out", f"c{mark}"],
        ["methods", f"x{mark}{turned}"],
        [f"x{mark}"],
        ["cache", "info", f"{data}/none"],
        ["train-student", data, f"--{mark}", "3"],
    ):
        text = on_a_terminal(*arguments, cwd=tmp_path)
        assert "]0;owned" not in text or "\\x1b]0;owned" in text, arguments
        assert mark not in text, arguments
        assert turned not in text, arguments
